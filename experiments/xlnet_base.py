"""XLNet-Base (Yang et al. 2019, 1906.08237, appendix A.4) on one corpus folder.

Rates are the large model's. Each row is one text with [SEP] and [CLS], not two; no memory is carried from step to step,
no half of a batch is fed backwards, and the one dropout also acts within mlps, where the paper's table has 0.
Claim: none of our own; the paper reports tasks alone.
Command: lm train --experiment=xlnet_base --corpus=DIR --workdir=DIR
Hardware and time: 512 TPU v3 chips, 5.5 days for the large model (paper, section 3.1).
"""

from lm.data.stream import Data
from lm.models.xlnet import XLNet
from lm.objectives.permutation import Permutation
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Linear


def run() -> Run:
    """12 layers, 768 wide, rows of 512, 8,192 of them a step."""
    return Run(
        model=XLNet(layers=12, width=768, heads=12, mlp_width=3072, dropout=0.1, dtype="bfloat16"),
        objective=Permutation(share=6),
        data=Data(tokenizer="unigram:32000"),  # As published; a corpus brings its own.
        optimizer=AdamW(b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, clip_norm=1.0),
        schedule=Linear(peak=4e-4, warmup_steps=40_000),
        train=Train(steps=500_000, batch_size=8192, seq_len=512, accumulate=32, eval_every=5000, save_every=5000),
        evals=Evals(batch_size=256, max_tokens=10_000_000),
    )
