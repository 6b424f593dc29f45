"""Counted character models of Shakespeare: what a neural model of the same context must beat.

Claim: validation loss 1.719, 1.561, 1.523 and 1.516 nats a character at orders 4 to 7, modified Kneser-Ney. Markov
chains of order 1 and 2, unsmoothed, have an infinite one (187 and 1,366 of 111,540 characters were never seen so), and
2.452 and 1.903 on the training text.
Command: lm corpus --source=text:input.txt --tokenizer=char --validation=0.1 --out=runs/shk
         lm train --experiment=ngram_char[:markov1|markov2] --corpus=runs/shk --workdir=runs/ngram_char
Hardware and time: 1 CPU core, 3 seconds.
"""

from lm.models.ngram import NGram
from lm.objectives.causal import Causal
from lm.train.run import Run


def run() -> Run:
    """Modified Kneser-Ney of order 7; --set=model.order=4 for others."""
    return Run(model=NGram(order=7), objective=Causal())


def markov1() -> Run:
    """A Markov chain of order 1, by maximum likelihood."""
    return Run(model=NGram(order=2, smoothing="maximum_likelihood"), objective=Causal())


def markov2() -> Run:
    """A Markov chain of order 2, by maximum likelihood."""
    return Run(model=NGram(order=3, smoothing="maximum_likelihood"), objective=Causal())
