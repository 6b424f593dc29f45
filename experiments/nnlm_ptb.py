"""The neural probabilistic language model of Bengio et al. 2003 on Penn Treebank, a 5-gram.

Claim: test perplexity 149.8, one seed (Mikolov's thesis has 140.2 for a feed-forward network with more units).
Command: lm train --experiment=nnlm_ptb --corpus=runs/ptb --workdir=runs/nnlm
Hardware and time: 2 CPU cores, 15 minutes.
"""

from lm.models.nnlm import NNLM
from lm.objectives.causal import Causal
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import WSD


def run() -> Run:
    """4 words of 100 features, 200 hidden units, dropout 0.3, 6 epochs of 1,024 words a step."""
    return Run(
        model=NNLM(context=4, width=100, hidden=200, dropout=0.3),
        objective=Causal(),
        optimizer=AdamW(b2=0.999, weight_decay=0.0),
        schedule=WSD(peak=1e-3, decay_fraction=0.4),
        train=Train(steps=5440, batch_size=4, seq_len=256, eval_every=907, save_every=907, log_every=100),
        evals=Evals(seq_len=1024),
    )
