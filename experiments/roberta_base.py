"""RoBERTa-Base (Liu et al. 2019, 1907.11692) on one corpus folder: masks drawn anew, full sentences, no pairs.

Claim: none of our own; the paper reports tasks, and a perplexity of hidden tokens on held-out text that is not ours.
Command: lm train --experiment=roberta_base --corpus=DIR --workdir=DIR
Hardware and time: 1,024 V100, about a day for the large model's first 100,000 steps (paper, section 5).
"""

import dataclasses

from experiments import bert_base
from lm.data.stream import Data
from lm.objectives.mlm import MaskedLM
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Linear


def run() -> Run:
    """12 layers, 768 wide, 8,192 rows of 512 a step."""
    model = dataclasses.replace(bert_base.run().model, position_offset=2, types=1, norm_eps=1e-5, outputs=("tokens",))
    return Run(
        model=model,
        objective=MaskedLM(),
        data=Data(tokenizer="bpe:50265"),  # As published; a corpus brings its own.
        optimizer=AdamW(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01, clip_norm=None),
        schedule=Linear(peak=6e-4, warmup_steps=24_000),
        train=Train(steps=500_000, batch_size=8192, seq_len=512, accumulate=32, eval_every=5000, save_every=5000),
        evals=Evals(batch_size=256, max_tokens=10_000_000),
    )
