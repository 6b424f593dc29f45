"""A small XLNet on any corpus folder, on a laptop.

Claim: the loss of predicted tokens falls below the entropy of single tokens, which ignores all context: 5.02 nats on
SQuAD's paragraphs, where that is 6.96.
Command: lm train --experiment=xlnet_tiny --corpus=DIR --workdir=runs/xlnet_tiny
Hardware and time: 2 CPU cores, 10 minutes.
"""

from lm.models.xlnet import XLNet
from lm.objectives.permutation import Permutation
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine


def run() -> Run:
    """4 layers, 128 wide, rows of 128."""
    return Run(
        model=XLNet(layers=4, width=128, heads=4, mlp_width=512, scan=False),
        objective=Permutation(),
        optimizer=AdamW(weight_decay=0.01, clip_norm=1.0),
        schedule=Cosine(peak=1e-3, final=1e-4, warmup_steps=100),
        train=Train(steps=3000, batch_size=16, seq_len=128, eval_every=250, save_every=500),
        evals=Evals(max_tokens=50_000),
    )
