"""A hidden Markov model of Penn Treebank by Baum-Welch: each step is one iteration over the whole training text.

Claim: PLACEHOLDER
Command: lm train --experiment=hmm_ptb --corpus=runs/ptb --workdir=runs/hmm
Hardware and time: 2 CPU cores.
"""

from lm.data.stream import Data
from lm.models.hmm import HMM
from lm.objectives.em import Expectation
from lm.train.optimizers import Maximization
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Constant

ROWS, LENGTH = 1024, 907  # 928,768 of the 929,589 tokens.


def run() -> Run:
    """64 states, 40 iterations."""
    return Run(
        model=HMM(states=64),
        objective=Expectation(),
        data=Data(order="lanes"),
        optimizer=Maximization(prior=0.01),
        schedule=Constant(peak=1.0),
        train=Train(steps=40, batch_size=ROWS, seq_len=LENGTH, accumulate=8, eval_every=5, save_every=20, log_every=1),
        evals=Evals(batch_size=16, seq_len=512),
    )
