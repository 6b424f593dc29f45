"""T5-Small (Raffel et al. 2019, 1910.10683, section 3.7), trained like `t5_base`.

Command: lm train --experiment=t5_small --corpus=DIR --workdir=DIR
Hardware: 8 GPUs with 80 GB.
"""

import dataclasses

from experiments import t5_base
from lm.train.run import Run


def run() -> Run:
    """6 and 6 layers, 512 wide: 60M parameters."""
    base = t5_base.run()
    model = dataclasses.replace(base.model, layers=6, width=512, heads=8, mlp_width=2048, logit_scale=512**-0.5)
    return dataclasses.replace(base, model=model)
