"""Where a token stands: tables, sinusoids, rotations, distances or nothing at all, on the standard library's bytes.

Claim: rotary positions need the fewest nats, a causal decoder learns without any, and a learned table is last but one.
Seen over 3 seeds: 1.787, sinusoids 1.914, learned 2.115, none 2.252; all differences significant (LOG.md).
Command: lm sweep --experiment=ablate_positions --workdir=runs/abl --parallel=2 && lm report --workdir=runs/abl
Hardware and time: 2 CPU cores, 40 minutes for 6 arms x 3 rates x 3 seeds; `:small` 5 minutes, one rate and two seeds.
"""

from lm.data.stream import Data
from lm.layers.relative import Relative
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.report import ladder
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine

PEAKS = (2e-3, 4e-3, 8e-3)


def base() -> Run:
    """3 layers, 96 wide, rotary positions; 400 steps of 16 rows of 128 bytes."""
    return Run(
        model=Decoder(layers=3, width=96, heads=4, positions="rotary", scan=False),
        objective=Causal(),
        data=Data(source="python", tokenizer="byte"),
        optimizer=AdamW(weight_decay=0.1, clip_norm=1.0),
        schedule=Cosine(peak=4e-3, final=4e-4, warmup_steps=20),
        train=Train(steps=400, batch_size=16, seq_len=128, eval_every=100, save_every=400, log_every=20),
        evals=Evals(batch_size=64, max_tokens=100_000),
    )


def arms() -> list[Run]:
    """Each form of positions, and none."""
    start = base()
    width = start.model.width
    forms = {
        "rotary": {},
        # With tokens as large as sinusoids, as Vaswani et al. 2017 have them (1706.03762, section 3.4).
        "sinusoidal": {"positions": "sinusoidal", "embed_scale": width**0.5, "init_std": width**-0.5},
        "learned": {"positions": "learned", "max_len": 128},
        "alibi": {"positions": "alibi"},
        "shaw": {"positions": "none", "relative": Relative(clip=16)},
        "none": {"positions": "none"},
    }
    return ladder.models(start, forms)


def run() -> list[Run]:
    """Each arm at three rates with three seeds."""
    return ladder.seeds(ladder.learning_rates(arms(), PEAKS), 3)


def small() -> list[Run]:
    """Each arm at one rate with two seeds."""
    return ladder.seeds(arms(), 2)
