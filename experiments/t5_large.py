"""T5-Large (Raffel et al. 2019, 1910.10683, section 3.7), trained like `t5_base`.

Command: lm train --experiment=t5_large --corpus=DIR --workdir=DIR
Hardware: 8 GPUs with 80 GB.
"""

import dataclasses

from experiments import t5_base
from lm.train.run import Run


def run() -> Run:
    """24 and 24 layers, 1,024 wide: 738M parameters."""
    base = t5_base.run()
    model = dataclasses.replace(
        base.model, layers=24, width=1024, heads=16, mlp_width=4096, logit_scale=1024**-0.5, remat="attention"
    )
    return dataclasses.replace(base, model=model)
