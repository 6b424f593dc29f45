"""N-gram models of Penn Treebank, counted: the classic that each neural language model was first measured against.

Claim: test perplexity 141.19 at order 5 and 148.28 at order 3 (valid 148.01 and 157.77), modified Kneser-Ney; 141.2 in
Mikolov's thesis (2012), table 4.1. With a cache of 200 words 126.77 (there 125.7).
Command: lm corpus --source=text:ptb.train.txt --tokenizer=word --validation_source=text:ptb.valid.txt --out=runs/ptb
         lm train --experiment=ngram_kn5[:kn3|katz|add_k|cache] --corpus=runs/ptb --workdir=runs/kn5
Hardware and time: 1 CPU core, 2 seconds.
"""

import dataclasses

from lm.models.ngram import NGram
from lm.models.ngram_cache import Cached
from lm.objectives.causal import Causal
from lm.train.run import Run


def run() -> Run:
    """Interpolated modified Kneser-Ney of order 5."""
    return Run(model=NGram(order=5), objective=Causal())


def kn3() -> Run:
    """The same of order 3."""
    return Run(model=NGram(order=3), objective=Causal())


def katz() -> Run:
    """Katz's backoff of order 3, without cutoffs: test perplexity 167.00."""
    return Run(model=NGram(order=3, smoothing="katz"), objective=Causal())


def add_k() -> Run:
    """What a better estimate is worth: 0.01 more of each bigram, test perplexity 274.27."""
    return Run(model=NGram(order=2, smoothing="add_k", k=0.01), objective=Causal())


def cache() -> Run:
    """`run` that expects recent words again."""
    base = run()
    return dataclasses.replace(base, model=Cached(base.model))
