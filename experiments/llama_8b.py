"""Llama 3.1 8B's architecture (Grattafiori et al. 2024, 2407.21783, table 3), trained from scratch.

32 layers, 4,096 wide, 32 heads over 8 of keys and values, SwiGLU of 14,336, rotary base 500,000, 128,256 ids; rows of
8,192 tokens.
Command: lm train --experiment=llama_8b --corpus=DIR --workdir=DIR
Hardware: 64 TPU v5p chips, or 64 GPUs with 80 GB; see lm plan --experiment=llama_8b --hardware=v5p:4x4x4.
"""

import dataclasses

from experiments import llama_1b
from lm.parallel.mesh import Mesh
from lm.train.run import Run


def run() -> Run:
    """1M tokens a step, 200B tokens in all; the mesh is the planner's."""
    return sized(llama_1b.run(), layers=32, width=4096, heads=32, mlp_width=14336, batch_size=128)


def sized(
    base: Run, *, layers: int, width: int, heads: int, mlp_width: int, batch_size: int, steps: int = 200_000
) -> Run:
    """Llama of another size: heads of 128 features, its own head, one pass a step."""
    sizes = {"layers": layers, "width": width, "heads": heads, "mlp_width": mlp_width}
    model = dataclasses.replace(base.model, **sizes, kv_heads=8, head_dim=128, tied=False, vocab_size=128_256)
    train = dataclasses.replace(base.train, steps=steps, batch_size=batch_size, accumulate=1)
    return dataclasses.replace(base, model=model, train=train, mesh=Mesh(preset="auto"))
