"""Which norm, and where: layer norm or RMS norm, before the sublayers, after the sum, on both sides, on their output.

Claim: before the sublayers RMS norm is as good as layer norm; a norm on the sublayers' output, alone or besides, costs
a quarter of a nat in 400 steps, perhaps because what enters the residual stream is then of size one from the start, and
tokens are a fiftieth of that. Seen with `:small`: 1.78 and 1.79 before, 1.82 after the sum, 2.04 with output norms
(LOG.md).
Command: lm sweep --experiment=ablate_norm --workdir=runs/norm --parallel=2 && lm report --workdir=runs/norm
Hardware and time: 2 CPU cores, 30 minutes; `:small` 4 minutes, one rate and two seeds.
"""

from experiments import ablate_positions
from lm.report import ladder
from lm.train.run import Run

PEAKS = (2e-3, 4e-3, 8e-3)


def arms() -> list[Run]:
    """Layer norm before the sublayers comes first."""
    start = ablate_positions.base()
    rms = {"norm": "rmsnorm", "norm_bias": False}
    forms = {
        "layernorm": {},
        "rmsnorm": rms,
        "after": {"norm_place": "post"},
        "sandwich": rms | {"norm_place": "sandwich"},
        "output": rms | {"norm_place": "output", "qk_norm": "projection"},
    }
    return ladder.models(start, forms)


def run() -> list[Run]:
    """Each arm at three rates with three seeds."""
    return ladder.seeds(ladder.learning_rates(arms(), PEAKS), 3)


def small() -> list[Run]:
    """Each arm at one rate with two seeds."""
    return ladder.seeds(arms(), 2)
