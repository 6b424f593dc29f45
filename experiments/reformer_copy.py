"""The duplication task of the Reformer (Kitaev et al. 2020, 2001.04451, section 5): say 0w again, of length 256.

Claim: hashing in 4 rounds copies at least 99 % of the second halves of unseen sequences, as in the paper's table 2 (of
length 1024): val_accuracy is 0.9995 after 250 steps. The same weights, evaluated with 1, 2 and 8 rounds and with full
attention: 0.811, 0.985, 1.000, 1.000.
Command: lm train --experiment=reformer_copy --workdir=runs/reformer_copy
Hardware and time: 2 CPU cores, 5 minutes; `full` 2.
"""

import dataclasses

from lm.data.stream import Data
from lm.layers.lsh import LSH
from lm.models.reformer import Reformer
from lm.objectives.copy import Copy
from lm.train.optimizers import AdamW
from lm.train.run import Run, Train
from lm.train.schedules import WSD


def run() -> Run:
    """One layer, 256 wide, 127 symbols; chunks of 32, 4 rounds of 16 buckets."""
    lsh = LSH(rounds=4, chunk=32, buckets=(16,))
    return Run(
        model=Reformer(layers=1, width=256, heads=4, mlp_width=256, lsh=lsh, max_len=256, remat="none", scan=False),
        objective=Copy(),
        data=Data(source="synthetic:copy?symbols=127&length=256", tokenizer="char", validation=0.02),
        optimizer=AdamW(b2=0.99, weight_decay=0.0, clip_norm=1.0),
        schedule=WSD(peak=3e-3, warmup_steps=50, decay_fraction=0.3),
        train=Train(steps=250, batch_size=32, seq_len=256, eval_every=50, save_every=250),
    )


def one_round() -> Run:
    return _with(rounds=1)


def two_rounds() -> Run:
    return _with(rounds=2)


def eight_rounds() -> Run:
    return _with(rounds=8)


def full() -> Run:
    """Every token sees all before it: one chunk, nothing is hashed."""
    return _with(rounds=1, chunk=256, buckets=None)


def _with(**settings) -> Run:
    base = run()
    lsh = dataclasses.replace(base.model.lsh, **settings)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, lsh=lsh))
