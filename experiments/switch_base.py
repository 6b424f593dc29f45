"""Switch-Base with 128 experts (Fedus et al. 2021, 2101.03961), as a causal decoder on one corpus folder.

The released checkpoints' sizes: 12 layers, 768 wide, 12 heads, ReLU mlps of 3,072 without biases and, in every second
layer, 128 of them with one chosen; RMS norms before each sublayer, dropout 0.1, coefficients 0.01 (paper, section 2.2)
and 0.001 (the released router's z-loss). Adafactor and T5's rate over 2^20 tokens a step.
Departures: kernels are drawn at scale 1, not the paper's 0.1 (section 2.4), and dense mlps have no dropout inside;
the paper's model is T5's encoder and decoder on span corruption, this one a decoder with rotary positions on next
tokens, so that it has 3.7B parameters with 32,128 pieces, not 7B. Experts are not dropped out, and the router's input
gets no jitter. Capacity is counted in each row of 512 tokens, not over a device's rows, where chance spreads choices
more unevenly: of the paper's factors (2, 1.25, 1) the largest, room for 8 tokens an expert and row.
Command: lm train --experiment=switch_base --corpus=DIR --workdir=DIR
Hardware and time: 32 TPU v3 cores (paper, table 1); not run by us.
"""

from lm.data.stream import Data
from lm.layers.block import Layer
from lm.layers.moe import Experts
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.parallel.mesh import Mesh
from lm.train.optimizers import Adafactor
from lm.train.run import Evals, Run, Train
from lm.train.schedules import InverseSqrt


def run() -> Run:
    """6 of 12 layers routed; 550,000 steps of 2,048 rows of 512."""
    experts = Experts(count=128, chosen=1, normalize=False, capacity_factor=2.0, balance=0.01, router_z=0.001)
    return Run(
        model=Decoder(
            layers=12,
            width=768,
            heads=12,
            mlp_width=3072,
            pattern=(Layer(), Layer(experts=experts)),
            positions="rotary",
            norm="rmsnorm",
            norm_bias=False,
            norm_eps=1e-6,
            activation="relu",
            attention_bias=False,
            mlp_bias=False,
            embed_dropout=0.1,
            residual_dropout=0.1,
            attention_dropout=0.1,
            init="fan_in",
            init_std=1.0,
            logit_scale=768**-0.5,
            dtype="bfloat16",
            remat="attention",
        ),
        objective=Causal(),
        data=Data(tokenizer="unigram:32000"),  # As published; a corpus brings its own.
        optimizer=Adafactor(decay_rate=0.8),
        schedule=InverseSqrt(peak=1e-2, warmup_steps=10_000, hold=True),
        mesh=Mesh(expert=8),
        train=Train(steps=550_000, batch_size=2048, seq_len=512, eval_every=5000, save_every=5000),
        evals=Evals(max_tokens=10_000_000),
    )
