"""A small BART on any corpus folder, on a laptop.

Claim: the loss of the text falls below the entropy of single tokens, which ignores all context, and so does `lost_nll`,
that of tokens which the source has lost: 4.69 nats on SQuAD's paragraphs, where tokens by frequency have 6.96.
Command: lm train --experiment=bart_tiny --corpus=DIR --workdir=runs/bart_tiny
Hardware and time: 2 CPU cores, 15 minutes.
"""

import dataclasses
from typing import Any

from experiments import bart_base
from lm.objectives.denoise import Denoise
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine

SIZES: dict[str, Any] = {"layers": 4, "width": 128, "heads": 4, "mlp_width": 512, "dtype": "float32", "scan": False}
SIZES |= {f"{name}_dropout": 0.0 for name in ("embed", "residual", "attention", "mlp")}


def run() -> Run:
    """4 and 4 layers, 128 wide, rows of 128."""
    return Run(
        model=dataclasses.replace(bart_base.run().model, **SIZES, max_len=128),
        objective=Denoise(),
        optimizer=AdamW(weight_decay=0.01, clip_norm=1.0),
        schedule=Cosine(peak=1e-3, final=1e-4, warmup_steps=100),
        train=Train(steps=3000, batch_size=16, seq_len=128, eval_every=250, save_every=500),
        evals=Evals(max_tokens=50_000),
    )
