"""T5-3B (Raffel et al. 2019, 1910.10683, section 3.7), trained like `t5_base`: T5-Large with wider layers.

Command: lm train --experiment=t5_3b --corpus=DIR --workdir=DIR
Hardware: 64 GPUs with 80 GB, or 64 TPU v5p chips.
"""

import dataclasses

from experiments import t5_large
from lm.parallel.mesh import Mesh
from lm.train.run import Run


def run() -> Run:
    """24 and 24 layers, 1,024 wide, 32 heads of 128, 16,384 in the middle: 2.8B parameters."""
    base = t5_large.run()
    model = dataclasses.replace(base.model, heads=32, head_dim=128, mlp_width=16_384)
    return dataclasses.replace(base, model=model, mesh=Mesh(fsdp=8))
