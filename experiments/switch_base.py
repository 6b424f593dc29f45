"""Switch-Base's layers (Fedus et al. 2021, 2101.03961, table 9) as a causal decoder, with 128 experts.

The paper's model is T5-Base with experts in every other layer of both sides, trained by span corruption. Here its
decoder stands alone, with rotary positions in place of T5's biases, and predicts the next token; routing, capacity,
balance and rates are the paper's.
Claim: none of our own.
Command: lm train --experiment=switch_base --corpus=DIR --workdir=DIR
Hardware: 32 TPU v3 cores (paper, section 2.2).
"""

from lm.layers.block import Layer
from lm.layers.moe import Experts
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.parallel.mesh import Mesh
from lm.train.optimizers import Adafactor
from lm.train.run import Evals, Run, Train
from lm.train.schedules import InverseSqrt


def run() -> Run:
    """12 layers, 768 wide, every second one with 128 experts of 2,048, one a token: 2.6B parameters."""
    return Run(
        model=Decoder(
            layers=12,
            width=768,
            heads=12,
            mlp_width=2048,
            pattern=(Layer(), Layer(experts=Experts(128, 1, normalize=False, capacity_factor=1.25, balance=0.01))),
            positions="rotary",
            norm="rmsnorm",
            norm_bias=False,
            norm_eps=1e-6,
            activation="gelu_tanh",
            gated=True,
            attention_bias=False,
            mlp_bias=False,
            embed_dropout=0.1,
            residual_dropout=0.1,
            init="fan_in",
            init_std=1.0,
            logit_scale=768**-0.5,
            dtype="bfloat16",
        ),
        objective=Causal(z_loss=1e-4),
        optimizer=Adafactor(),
        schedule=InverseSqrt(peak=0.01, warmup_steps=10_000, hold=True),
        mesh=Mesh(expert=8),
        train=Train(steps=550_000, batch_size=2048, seq_len=512, accumulate=8, eval_every=5000, save_every=5000),
        evals=Evals(batch_size=256, max_tokens=10_000_000),
    )
