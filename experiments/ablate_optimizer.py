"""AdamW, Muon, Lion, Adafactor and SGD, each over learning rates of its own.

Claim: Muon is far ahead of AdamW at equal steps, Adafactor level with AdamW, Lion behind, and SGD with momentum last.
Seen with one seed: 1.409, Adafactor 1.765, AdamW 1.779, Lion 1.884, SGD 2.114 (LOG.md).
Command: lm sweep --experiment=ablate_optimizer --workdir=runs/opt --parallel=2 && lm report --workdir=runs/opt
Hardware and time: 2 CPU cores, 30 minutes; `:small` 4 minutes, one rate and two seeds.
"""

import dataclasses

from experiments import ablate_positions
from lm.report import ladder
from lm.train.optimizers import SGD, Adafactor, AdamW, Lion, Muon
from lm.train.run import Run

# Rates on a grid of factors of two around the best of trials with one seed.
ARMS = {
    "adamw": (AdamW(weight_decay=0.1), (2e-3, 4e-3, 8e-3)),
    "muon": (Muon(weight_decay=0.1), (8e-3, 1.6e-2, 3.2e-2)),
    "lion": (Lion(weight_decay=1.0), (5e-4, 1e-3, 2e-3)),
    "adafactor": (Adafactor(), (4e-2, 8e-2, 1.6e-1)),
    "sgd": (SGD(momentum=0.9), (6.25e-2, 1.25e-1, 2.5e-1)),
}


def run() -> list[Run]:
    """Each optimizer at three rates with three seeds."""
    return ladder.seeds(_rates(lambda peaks: peaks), 3)


def small() -> list[Run]:
    """Each at its middle rate with two seeds."""
    return ladder.seeds(_rates(lambda peaks: peaks[1:2]), 2)


def _rates(chosen) -> list[Run]:
    start = ablate_positions.base()
    return [
        run
        for name, (optimizer, peaks) in ARMS.items()
        for run in ladder.learning_rates([dataclasses.replace(start, name=name, optimizer=optimizer)], chosen(peaks))
    ]
