"""A width whose learning rate was never searched: it is that of a model 64 wide, by muP.

Claim: activations keep their size as the model widens, where without muP (`:sp`) they grow with it, and so the best
learning rate of the base serves: `lm sweep --experiment=coordcheck` checks the first, `lm sweep
--experiment=lr_transfer` the second.
Command: lm train --experiment=mup_width --workdir=runs/mup --set=model.width=512
Hardware and time: 2 CPU cores, seconds at 256 wide.
"""

import dataclasses

from lm.data.stream import Data
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine


def run() -> Run:
    """2 layers, 256 wide, 4 heads that widen with them: 150 steps on a Markov chain of 64 symbols."""
    return Run(
        model=Decoder(
            layers=2,
            width=256,
            heads=4,
            positions="rotary",
            tied=False,
            init="fan_in",
            parametrization="mup",
            base_width=64,
        ),
        objective=Causal(),
        data=Data(source="synthetic:markov?symbols=64&tokens=300000", tokenizer="char", validation=0.1),
        optimizer=AdamW(weight_decay=0.0),
        schedule=Cosine(peak=2**-6, warmup_steps=10),
        train=Train(steps=150, batch_size=8, seq_len=32, eval_every=1000, save_every=1000),
        evals=Evals(batch_size=64, max_tokens=16_384),
    )


def base() -> Run:
    """The width at which the learning rate was found."""
    wide = run()
    return dataclasses.replace(wide, model=dataclasses.replace(wide.model, width=64))


def sp() -> Run:
    """The standard parametrization: the learning rate of the base is too high here."""
    wide = run()
    return dataclasses.replace(wide, model=dataclasses.replace(wide.model, parametrization="sp", base_width=None))
