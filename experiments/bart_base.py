"""BART-Base (Lewis et al. 2019, 1910.13461) on one corpus folder.

The paper gives the architecture and, for its large model (section 5.1), batch, steps and noises; its rates, which it
does not give, are those of RoBERTa-Base (Liu et al. 2019, 1907.11692, table 9), which it follows. Dropout stays on to
the end, where the paper turns it off for the last tenth of the steps.
Claim: none of our own; the paper reports tasks alone.
Command: lm train --experiment=bart_base --corpus=DIR --workdir=DIR
Hardware: 64 GPUs with 80 GB, or 64 TPU v5p chips.
"""

from lm.data.stream import Data
from lm.models.encdec import EncDec
from lm.objectives.denoise import Denoise
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Linear


def run() -> Run:
    """6 and 6 layers, 768 wide: 140M parameters, 8,000 rows of 512 a step."""
    return Run(
        model=EncDec(
            layers=6,
            width=768,
            heads=12,
            mlp_width=3072,
            positions="learned",
            position_offset=2,
            max_len=1024,
            embed_norm=True,
            activation="gelu",
            head_bias=True,
            embed_dropout=0.1,
            residual_dropout=0.1,
            attention_dropout=0.1,
            mlp_dropout=0.1,
            dtype="bfloat16",
        ),
        objective=Denoise(),
        data=Data(tokenizer="bpe:50265"),  # As published; a corpus brings its own.
        optimizer=AdamW(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01, clip_norm=None),
        schedule=Linear(peak=6e-4, warmup_steps=24_000),
        train=Train(steps=500_000, batch_size=8000, seq_len=512, accumulate=25, eval_every=5000, save_every=5000),
        evals=Evals(batch_size=320, max_tokens=10_000_000),
    )
