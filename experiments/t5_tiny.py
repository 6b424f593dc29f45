"""A small T5 on any corpus folder, on a laptop.

Claim: the loss of sentinels and lost spans falls below the entropy of single tokens, which ignores all context.
Command: lm train --experiment=t5_tiny --corpus=DIR --workdir=runs/t5_tiny
Hardware and time: 2 CPU cores, minutes.
"""

import dataclasses

from experiments import t5_base
from lm.objectives.span import SpanCorruption
from lm.objectives.ul2 import UL2
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine


def run() -> Run:
    """4 and 4 layers, 128 wide, sources of 128."""
    model = dataclasses.replace(
        t5_base.run().model,
        layers=4,
        width=128,
        heads=4,
        head_dim=32,
        mlp_width=512,
        logit_scale=128**-0.5,
        embed_dropout=0.0,
        residual_dropout=0.0,
        attention_dropout=0.0,
        mlp_dropout=0.0,
        dtype="float32",
        scan=False,
    )
    return Run(
        model=model,
        objective=SpanCorruption(),
        optimizer=AdamW(weight_decay=0.01, clip_norm=1.0),
        schedule=Cosine(peak=2e-3, final=2e-4, warmup_steps=100),
        train=Train(steps=1500, batch_size=16, seq_len=128, eval_every=250, save_every=500),
        evals=Evals(max_tokens=50_000),
    )


def ul2() -> Run:
    """The same under UL2's mixture of denoisers (2205.05131)."""
    return dataclasses.replace(run(), objective=UL2())
