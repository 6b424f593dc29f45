"""A small ELECTRA on any corpus folder, on a laptop.

Claim: the discriminator is right more often than always saying "original" would be: 88.0 % against 86.9 % on SQuAD's
paragraphs, of a generator at 5.30 nats.
Command: lm train --experiment=electra_tiny --corpus=DIR --workdir=runs/electra_tiny
Hardware and time: 2 CPU cores, 10 minutes.
"""

import dataclasses

from experiments import bert_tiny
from lm.models.electra import Electra
from lm.objectives.detect import Detect
from lm.train.run import Run


def run() -> Run:
    """A discriminator of 3 layers, 128 wide, and a generator half as wide; rotary positions, rows of 64."""
    base = bert_tiny.run()
    discriminator = dataclasses.replace(base.model, outputs=("detect",))
    generator = dataclasses.replace(discriminator, width=64, heads=2, embed_width=128, outputs=("tokens",))
    return dataclasses.replace(
        base,
        model=Electra(discriminator, generator),
        objective=Detect(),
        train=dataclasses.replace(base.train, steps=5000, batch_size=32, seq_len=64),
    )
