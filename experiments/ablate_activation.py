"""The feed-forward layer's activation, plain and gated, at equal parameters.

Claim: the gated forms (Shazeer 2020, 2002.05202) need fewer nats than the plain ones at the same number of parameters;
among the plain ones ReLU leads at this size. Seen with `:small`: 1.64 gated, ReLU 1.68, GELU 1.78, SiLU 1.85 (LOG.md).
Command: lm sweep --experiment=ablate_activation --workdir=runs/act --parallel=2 && lm report --workdir=runs/act
Hardware and time: 2 CPU cores, 30 minutes; `:small` 4 minutes, one rate and two seeds.
"""

from experiments import ablate_positions
from lm.report import ladder
from lm.train.run import Run

PEAKS = (2e-3, 4e-3, 8e-3)


def arms() -> list[Run]:
    """A gated layer has three matrices, each two thirds as wide."""
    start = ablate_positions.base()
    width = start.model.width
    forms = {name: {"activation": name, "mlp_width": 4 * width} for name in ("gelu", "relu", "silu")}
    forms |= {
        f"{name}_gated": {"activation": name, "gated": True, "mlp_width": 8 * width // 3} for name in ("gelu", "silu")
    }
    return ladder.models(start, forms)


def run() -> list[Run]:
    """Each arm at three rates with three seeds."""
    return ladder.seeds(ladder.learning_rates(arms(), PEAKS), 3)


def small() -> list[Run]:
    """Each arm at one rate with two seeds."""
    return ladder.seeds(arms(), 2)
