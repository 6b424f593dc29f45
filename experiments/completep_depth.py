"""A depth whose learning rate was never searched: it is that of a model of 2 layers, by CompleteP.

Claim: what the last of 16 layers leaves has the size that the last of 2 leaves, where the standard parametrization
(`:sp`) grows with the layers. `lm sweep --experiment=coordcheck:depth` shows both.
Command: lm train --experiment=completep_depth --workdir=runs/completep --set=model.layers=32
Hardware and time: 2 CPU cores, seconds at 16 layers.
"""

import dataclasses

from experiments import mup_width
from lm.train.run import Run


def run() -> Run:
    """16 layers, 64 wide, initial values as GPT-2's, otherwise as mup_width."""
    wide = mup_width.run()
    settings = {
        "parametrization": "completep",
        "layers": 16,
        "base_layers": 2,
        "width": 64,
        "base_width": 64,
        "init": "gpt2",
    }
    return dataclasses.replace(wide, model=dataclasses.replace(wide.model, **settings))


def base() -> Run:
    """The depth at which the learning rate was found."""
    deep = run()
    return dataclasses.replace(deep, model=dataclasses.replace(deep.model, layers=2))


def sp() -> Run:
    """The standard parametrization."""
    deep, none = run(), {"base_width": None, "base_layers": None}
    return dataclasses.replace(deep, model=dataclasses.replace(deep.model, parametrization="sp", **none))
