"""IsoFLOP curves on the bytes of the standard library: the compute-optimal size, measured on a laptop or on one GPU.

Claim: at each budget the loss over size has its minimum inside the grid, and the optimal size grows as a power of
compute, which lm fit --form=isoflop reads off with an interval: N* ~ C^0.58 (0.37 to 0.72; by parabolas 0.57, 0.52 to
0.64) on the laptop, with 139 bytes a parameter at 3e12 FLOPs (LOG.md). The GPU's sizes have not been run.
Command: lm sweep --experiment=scaling_python --workdir=runs/iso --parallel=2 && lm fit --runs=runs/iso --form=isoflop
--out=runs/iso_fit
Hardware and time: 2 CPU cores, 20 minutes; `scaling_python:gpu` one H100 or H200, an hour.
"""

import dataclasses

from experiments import ablate_positions
from lm.report import ladder
from lm.train.run import Evals, Run

BYTES = 256  # The vocabulary; given, so that sizes are known before the corpus is read.


def run() -> list[Run]:
    """Widths from 8 to 96 in 2 to 3 layers at four budgets, 1e11 to 3e12."""
    start = _start()
    models = {f"d{width}": _shape(start, width, layers) for width, layers in _LAPTOP}
    # The best size is small here: what a byte needs to be told is mostly the last few bytes.
    return ladder.isoflop(start, models, (1e11, 3e11, 1e12, 3e12), ratios=(5, 3000))


def gpu() -> list[Run]:
    """Widths from 64 to 512 in 2 to 8 layers at four budgets from 1e14 to 3e15, in bfloat16; text repeats."""
    start = _start()
    start = dataclasses.replace(
        start, train=dataclasses.replace(start.train, batch_size=64, seq_len=256, eval_every=10_000, save_every=10_000)
    )
    models = {f"d{w}x{n}": _shape(start, w, n, dtype="bfloat16", scan=True) for w, n in _GPU}
    return ladder.isoflop(start, models, (1e14, 3e14, 1e15, 3e15), ratios=(1, 300))


_LAPTOP = ((8, 2), (12, 2), (16, 2), (24, 2), (32, 2), (40, 2), (48, 2), (64, 3), (96, 3))
_GPU = ((64, 2), (96, 3), (128, 4), (160, 4), (192, 4), (256, 4), (256, 6), (384, 6), (512, 8))


def _start() -> Run:
    start = ablate_positions.base()
    train = dataclasses.replace(start.train, eval_every=10_000, save_every=10_000)
    schedule = dataclasses.replace(start.schedule, final=0.0)
    return dataclasses.replace(start, train=train, schedule=schedule, evals=Evals(batch_size=64))


def _shape(start: Run, width: int, layers: int, **settings) -> object:
    heads = max(2, width // 32)
    sizes = {"layers": layers, "width": width, "heads": heads, "vocab_size": BYTES, "valid_vocab_size": BYTES}
    return dataclasses.replace(start.model, **sizes, **settings)
