"""A small ALBERT on any corpus folder, on a laptop: runs of up to three words, and the order of sentences.

Claim: it tells the order of a document's two parts, and hidden words by their context.
Command: lm train --experiment=albert_tiny --corpus=DIR --workdir=runs/albert_tiny
Hardware and time: 2 CPU cores, 15 minutes.
"""

import dataclasses

from experiments import bert_tiny
from lm.objectives.mlm import MaskedLM
from lm.objectives.pairs import Pairs
from lm.train.run import Run


def run() -> Run:
    """BERT's tiny model with embeddings half as wide and one set of parameters for all layers."""
    base = bert_tiny.run()
    model = dataclasses.replace(base.model, embed_width=base.model.width // 2, shared_groups=1, activation="gelu_tanh")
    return dataclasses.replace(base, model=model, objective=Pairs("sop", MaskedLM(unit="word", max_ngram=3)))
