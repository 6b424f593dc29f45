"""The gated convolutional language model on Penn Treebank (Dauphin et al. 2016, 1612.08083).

Claim: none of the paper, which trains on larger texts (GCNN-8 on WikiText-103: perplexity 44.9) and finds that Penn
Treebank is too small for it; `run` is small enough for a CPU, and sees 22 tokens. `gcnn8` is the paper's.
Command: lm train --experiment=gated_conv_ptb[:adaptive|sampled] --corpus=runs/ptb --workdir=runs/gated_conv
Hardware and time: 2 CPU cores; a GPU for `gcnn8`.
"""

import dataclasses

from lm.data.stream import Data
from lm.layers.adaptive import Adaptive
from lm.models.convolution import Convolution
from lm.objectives.causal import Causal
from lm.objectives.sampled import Sampled
from lm.train.optimizers import SGD
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Constant

EPOCH = 1327  # Steps: 929,589 tokens in 20 lanes of 35.


def run() -> Run:
    """7 layers of 4 taps, 200 wide, each a residual block of its own; rows go on from the ones before."""
    return Run(
        model=Convolution(blocks=(((4, 200),),) * 7, width=200, dropout=0.2),
        objective=Causal(),
        data=Data(order="lanes"),
        optimizer=SGD(momentum=0.99, nesterov=True, clip_norm=0.1),
        schedule=Constant(peak=1.0),
        train=Train(steps=3 * EPOCH, batch_size=20, seq_len=35, eval_every=EPOCH, save_every=EPOCH, log_every=100),
        evals=Evals(batch_size=10),
    )


def adaptive() -> Run:
    """`run` with an adaptive softmax."""
    base = run()
    return dataclasses.replace(base, model=dataclasses.replace(base.model, adaptive=Adaptive(cutoffs=(1000, 4000))))


def sampled() -> Run:
    """`run` trained on 1,024 sampled words."""
    return dataclasses.replace(run(), objective=Sampled(samples=1024))


def gcnn8() -> Run:
    """The paper's model for WikiText-103 with embeddings of 280: 8 layers of 4 taps, 900 wide; clusters as in fairseq's
    fconv_lm_dauphin_wikitext103. Its corpus has 267,744 words."""
    return dataclasses.replace(run(), model=Convolution(adaptive=Adaptive(cutoffs=(10_000, 20_000, 200_000))))
