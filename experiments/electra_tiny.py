"""A small ELECTRA on any corpus folder, on a laptop.

Claim: the discriminator is right more often than always saying "original" would be; not yet so after 900 of the steps,
while the generator is still at the loss of tokens by frequency (LOG.md).
Command: lm train --experiment=electra_tiny --corpus=DIR --workdir=runs/electra_tiny
Hardware and time: 2 CPU cores, minutes.
"""

import dataclasses

from experiments import bert_tiny
from lm.models.electra import Electra
from lm.objectives.detect import Detect
from lm.train.run import Run


def run() -> Run:
    """A discriminator of 3 layers, 128 wide, and a generator half as wide; rows of 128."""
    base = bert_tiny.run()
    discriminator = dataclasses.replace(base.model, outputs=("detect",))
    generator = dataclasses.replace(discriminator, width=64, heads=2, embed_width=128, outputs=("tokens",))
    return dataclasses.replace(base, model=Electra(discriminator, generator), objective=Detect())
