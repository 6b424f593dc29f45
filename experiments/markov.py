"""A Markov chain of 64 symbols, whose entropy rate is known exactly: what a model cannot beat, and should reach.

Claim: validation loss within 0.02 nats of the chain's own -ln p on the same held-out symbols, and never below it.
The entropy rate of this chain is 2.9257 nats.
Command: lm train --experiment=markov --workdir=runs/markov
Hardware and time: 2 CPU cores, 2 minutes.
"""

from lm.data.stream import Data
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import WSD


def run() -> Run:
    """2 layers, 128 wide, context 32, 1,200 steps of 64 sequences: 1.4 epochs of 1.8M symbols."""
    return Run(
        model=Decoder(layers=2, heads=4, width=128, positions="rotary", scan=False),
        objective=Causal(),
        data=Data(source="synthetic:markov?symbols=64", tokenizer="char", validation=0.1),
        optimizer=AdamW(b2=0.99, weight_decay=0.1),
        schedule=WSD(peak=3e-3, warmup_steps=50, decay_fraction=0.5),
        train=Train(steps=1200, batch_size=64, seq_len=32, eval_every=300, save_every=300, log_every=20),
        evals=Evals(batch_size=128),
    )
