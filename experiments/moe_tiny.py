"""A small decoder with experts on any corpus folder, on a laptop.

Claim: its loss falls below that of tokens by frequency, and the tokens spread over the experts (balance near 1).
Command: lm train --experiment=moe_tiny --corpus=DIR --workdir=runs/moe_tiny
Hardware and time: 2 CPU cores, minutes.
"""

from lm.layers.block import Layer
from lm.layers.moe import Experts
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine


def run() -> Run:
    """4 layers, 128 wide, every second one with 8 experts, two a token, none dropped."""
    return Run(
        model=Decoder(
            layers=4,
            width=128,
            heads=4,
            mlp_width=256,
            pattern=(Layer(), Layer(experts=Experts(8, 2, balance=0.01, router_z=0.001))),
            positions="rotary",
            norm="rmsnorm",
            norm_bias=False,
            activation="silu",
            gated=True,
            attention_bias=False,
            mlp_bias=False,
            scan=False,
        ),
        objective=Causal(),
        optimizer=AdamW(weight_decay=0.1, clip_norm=1.0),
        schedule=Cosine(peak=2e-3, final=2e-4, warmup_steps=100),
        train=Train(steps=1500, batch_size=16, seq_len=128, eval_every=250, save_every=500),
        evals=Evals(batch_size=16, max_tokens=50_000),
    )
