"""A small BERT with both its tasks on any corpus folder of several documents, on a laptop.

Claim: it tells a document's continuation from another document's text, and hidden tokens by their context.
Command: lm train --experiment=bert_tiny --corpus=DIR --workdir=runs/bert_tiny
Hardware and time: 2 CPU cores, minutes.
"""

import dataclasses

from lm.models.encoder import Encoder
from lm.objectives.pairs import Pairs
from lm.train.optimizers import AdamW
from lm.train.run import Run, Train
from lm.train.schedules import Linear


def run() -> Run:
    """4 layers, 128 wide, rows of 128."""
    return Run(
        model=Encoder(layers=4, width=128, heads=4, max_len=128, outputs=("tokens", "pair"), scan=False),
        objective=Pairs("nsp"),
        optimizer=AdamW(weight_decay=0.01, clip_norm=1.0),
        schedule=Linear(peak=1e-3, warmup_steps=100),
        train=Train(steps=2000, batch_size=32, seq_len=128, eval_every=500, save_every=500),
    )


def sop() -> Run:
    base = run()
    return dataclasses.replace(base, objective=Pairs("sop"))
