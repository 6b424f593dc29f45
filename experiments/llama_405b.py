"""Llama 3.1 405B's architecture (Grattafiori et al. 2024, 2407.21783, table 3), trained from scratch.

126 layers, 16,384 wide, 128 heads over 8 of keys and values, SwiGLU of 53,248; peak rate 8e-5, as published.
Command: lm train --experiment=llama_405b --corpus=DIR --workdir=DIR
Hardware: 1,024 TPU v5p chips; see lm plan --experiment=llama_405b --hardware=v5p:8x8x16.
"""

import dataclasses

from experiments import llama_8b, llama_70b
from lm.train.run import Run


def run() -> Run:
    """16M tokens a step, 1T tokens in all."""
    base = llama_70b.run()
    base = dataclasses.replace(base, schedule=dataclasses.replace(base.schedule, peak=8e-5, final=8e-7))
    sizes = {"layers": 126, "width": 16384, "heads": 128, "mlp_width": 53248}
    return llama_8b.sized(base, **sizes, batch_size=2048, steps=60_000)
