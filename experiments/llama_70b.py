"""Llama 3.1 70B's architecture (Grattafiori et al. 2024, 2407.21783, table 3), trained from scratch.

80 layers, 8,192 wide, 64 heads over 8 of keys and values, SwiGLU of 28,672; peak rate 1.5e-4, as published.
Command: lm train --experiment=llama_70b --corpus=DIR --workdir=DIR
Hardware: 512 TPU v5p chips; see lm plan --experiment=llama_70b --hardware=v5p:8x8x8.
"""

import dataclasses

from experiments import llama_1b, llama_8b
from lm.train.run import Run


def run() -> Run:
    """8M tokens a step, 1T tokens in all; every layer's forward pass is made again."""
    base = llama_1b.run()
    base = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, remat="full"),
        schedule=dataclasses.replace(base.schedule, peak=1.5e-4, final=1.5e-6),
    )
    sizes = {"layers": 80, "width": 8192, "heads": 64, "mlp_width": 28672}
    return llama_8b.sized(base, **sizes, batch_size=1024, steps=120_000)
