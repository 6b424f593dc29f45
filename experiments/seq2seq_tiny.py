"""A recurrent encoder-decoder writes a text again of which it sees nine tenths, with attention and without.

Claim: with attention it copies, 0.33 nats a character after 500 steps, and through one vector (`without`) 0.93.
Command: lm train --experiment=seq2seq_tiny --workdir=runs/seq2seq_tiny
Hardware and time: 2 CPU cores, minutes.
"""

import dataclasses

from lm.data.stream import Data
from lm.models.seq2seq import Seq2Seq
from lm.objectives.denoise import Denoise
from lm.objectives.noises import TokenDeletion
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Constant


def run() -> Run:
    """A GRU of 64 that attends (Bahdanau et al. 2014, 1409.0473), rows of 24 characters of a Markov chain."""
    return Run(
        model=Seq2Seq(width=32, hidden=64),
        objective=Denoise(noises=(TokenDeletion(0.1),)),
        data=Data(source="synthetic:markov?symbols=8&tokens=100000&seed=1", tokenizer="char", validation=0.1),
        optimizer=AdamW(weight_decay=0.0, clip_norm=1.0),
        schedule=Constant(peak=3e-3),
        train=Train(steps=1000, batch_size=32, seq_len=24, eval_every=250, save_every=500, log_every=50),
        evals=Evals(max_tokens=5000),
    )


def without() -> Run:
    """The source through one vector, read backwards into two layers of an LSTM (Sutskever et al. 2014, 1409.3215)."""
    model = Seq2Seq(
        cell="lstm", layers=2, decoder_layers=2, directions="backward", attention="none", width=32, hidden=64
    )
    return dataclasses.replace(run(), model=model)
