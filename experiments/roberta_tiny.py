"""A small RoBERTa on any corpus folder, on a laptop.

Claim: the loss of hidden tokens falls well below the entropy of single tokens, which ignores all context.
Command: lm train --experiment=roberta_tiny --corpus=DIR --workdir=runs/roberta_tiny
Hardware and time: 2 CPU cores, 15 minutes.
"""

import dataclasses

from experiments import bert_tiny
from lm.objectives.mlm import MaskedLM
from lm.train.run import Run


def run() -> Run:
    """BERT's tiny model without segments, rows of running text, masks drawn anew."""
    base = bert_tiny.run()
    model = dataclasses.replace(base.model, outputs=("tokens",), types=1, position_offset=2, norm_eps=1e-5)
    return dataclasses.replace(base, model=model, objective=MaskedLM())
