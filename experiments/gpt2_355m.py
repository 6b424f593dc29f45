"""GPT-2 medium (Radford et al. 2019), trained like `gpt2_124m` at the peak rate that GPT-3 gives its size.

Peak learning rate: Brown et al. 2020 (arXiv 2005.14165), table 2.1, the row nearest in size.
Command: lm train --experiment=gpt2_355m --corpus=DIR --workdir=DIR
Hardware: 8 GPUs with 80 GB.
"""

import dataclasses

from experiments import gpt2_124m
from lm.train.run import Run
from lm.train.schedules import Cosine


def run() -> Run:
    """24 layers, 1024 wide: 355M parameters."""
    base = gpt2_124m.run()
    model = dataclasses.replace(base.model, layers=24, heads=16, width=1024, remat="attention")
    return dataclasses.replace(base, model=model, schedule=Cosine(peak=3e-4, final=3e-5, warmup_steps=2000))
