"""ELECTRA-Small (Clark et al. 2020, 2003.10555, section 3.3 and table 6) on one corpus folder.

Claim: none of our own; the paper reports tasks alone.
Command: lm train --experiment=electra_small --corpus=DIR --workdir=DIR
Hardware and time: one V100, 4 days (paper, table 1).
"""

import dataclasses

from lm.data.stream import Data
from lm.models.electra import Electra
from lm.models.encoder import Encoder
from lm.objectives.detect import Detect
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Linear


def run() -> Run:
    """12 layers, 256 wide, embeddings of 128: 14M parameters; a generator a quarter as wide; 128 rows of 128 a step."""
    discriminator = Encoder(
        layers=12,
        width=256,
        heads=4,
        mlp_width=1024,
        embed_width=128,
        outputs=("detect",),
        embed_dropout=0.1,
        residual_dropout=0.1,
        attention_dropout=0.1,
        dtype="bfloat16",
    )
    generator = dataclasses.replace(discriminator, width=64, heads=1, mlp_width=256, outputs=("tokens",))
    return Run(
        model=Electra(discriminator, generator),
        objective=Detect(),
        data=Data(tokenizer="wordpiece:30522"),  # As published; a corpus brings its own.
        optimizer=AdamW(b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, clip_norm=1.0),
        schedule=Linear(peak=5e-4, warmup_steps=10_000),
        train=Train(steps=1_000_000, batch_size=128, seq_len=128, eval_every=5000, save_every=5000),
        evals=Evals(max_tokens=10_000_000),
    )
