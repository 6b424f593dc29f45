"""Word vectors from characters beside a table of them, on Penn Treebank (Kim et al. 2016, 1508.06615).

Claim: the small model's test perplexity is about 93, that of the word model of the same code with as many parameters
about 98 (README of yoonkim/lstm-char-cnn), which has not been tried here. Spelled words are behind at first: `short`
and `short_word` are at valid 200 and 170 after one epoch, 151 and 134 after two, 141 and 128 after three, then test
134.3 and 122.3, one seed.
Command: lm train --experiment=charcnn_ptb[:short|short_word] --corpus=runs/ptb --workdir=runs/charcnn
Hardware and time: a GPU for `run`, `word` and `large`; 2 CPU cores for the others, 12 and 6 minutes.
"""

import dataclasses

from lm.data.stream import Data
from lm.layers.char_cnn import CharCNN
from lm.models.recurrent import Recurrent
from lm.objectives.causal import Causal
from lm.train.optimizers import SGD, AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine, StepDecay

EPOCH = 1327  # Steps: 929,589 tokens in 20 lanes of 35.


def run() -> Run:
    """The small model: 525 filters, a highway layer, an LSTM of 2 x 300; 25 epochs of 20 lanes of 35 tokens.

    The rate halves by itself after every epoch from the 13th on: the paper halves it where an epoch has gained less
    than 1.0 of validation perplexity.
    """
    return Run(
        model=Recurrent(width=300, dropout=0.5, characters=CharCNN(), init_limit=0.05, cell_limit=0.05),
        objective=Causal(),
        data=Data(order="lanes"),
        optimizer=SGD(clip_norm=5.0),
        schedule=StepDecay(peak=1.0, factor=0.5, first_steps=12 * EPOCH, every_steps=EPOCH),
        train=Train(steps=25 * EPOCH, batch_size=20, seq_len=35, eval_every=EPOCH, save_every=EPOCH, log_every=100),
        evals=Evals(batch_size=10),
    )


def large() -> Run:
    """1,100 filters, 2 highway layers, an LSTM of 2 x 650."""
    base = run()
    filters = tuple((width, min(200, 50 * width)) for width in range(1, 8))
    model = dataclasses.replace(base.model, width=650, characters=CharCNN(filters=filters, highways=2))
    return dataclasses.replace(base, model=model)


def word() -> Run:
    """The word model of as many parameters: a table, and an LSTM, of width 200."""
    base = run()
    return dataclasses.replace(base, model=dataclasses.replace(base.model, width=200, characters=None))


def short() -> Run:
    """3 epochs of the small model for a CPU: by Adam, from larger values and with less dropout than the paper's."""
    return _three_epochs(run())


def short_word() -> Run:
    """The same of the word model."""
    return _three_epochs(word())


def _three_epochs(base: Run) -> Run:
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, dropout=0.2, init_limit=0.3, cell_limit=None),
        optimizer=AdamW(b2=0.999, weight_decay=0.0, clip_norm=1.0),
        schedule=Cosine(peak=3e-3, warmup_steps=100),
        train=dataclasses.replace(base.train, steps=3 * EPOCH),
    )
