"""A small ELECTRA on any corpus folder, on a laptop.

Claim: the discriminator tells replaced tokens better than always saying original does.
Command: lm train --experiment=electra_tiny --corpus=DIR --workdir=runs/electra_tiny
Hardware and time: 2 CPU cores, 15 minutes.
"""

import dataclasses

from experiments import bert_tiny
from lm.models.electra import Electra
from lm.objectives.detect import Detect
from lm.train.run import Run


def run() -> Run:
    """BERT's tiny model as the discriminator, and a generator half as wide."""
    base = bert_tiny.run()
    discriminator = dataclasses.replace(base.model, outputs=("detect",))
    width = discriminator.width
    generator = dataclasses.replace(discriminator, width=width // 2, heads=2, embed_width=width, outputs=("tokens",))
    return dataclasses.replace(base, model=Electra(discriminator, generator), objective=Detect())
