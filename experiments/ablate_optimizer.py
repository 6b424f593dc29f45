"""AdamW, Muon, Lion, Adafactor and SGD, each over learning rates of its own.

Claim, not tested by a run yet:
Muon reaches a loss that AdamW needs about half as many steps more for, and SGD with momentum is far behind.
Command: lm sweep --experiment=ablate_optimizer --workdir=runs/opt --parallel=2 && lm report --workdir=runs/opt
Hardware and time: 2 CPU cores, 30 minutes; `:small` 4 minutes, one rate and two seeds.
"""

import dataclasses

from experiments import ablate_positions
from lm.report import ladder
from lm.train.optimizers import SGD, Adafactor, AdamW, Lion, Muon
from lm.train.run import Run

# Rates on a grid of factors of two around the best of short trials.
ARMS = {
    "adamw": (AdamW(weight_decay=0.1), (2e-3, 4e-3, 8e-3)),
    "muon": (Muon(weight_decay=0.1), (2e-3, 4e-3, 8e-3)),
    "lion": (Lion(weight_decay=1.0), (2.5e-4, 5e-4, 1e-3)),
    "adafactor": (Adafactor(), (1e-2, 2e-2, 4e-2)),
    "sgd": (SGD(momentum=0.9), (0.25, 0.5, 1.0)),
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
