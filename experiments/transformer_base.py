"""The base Transformer (Vaswani et al. 2017, 1706.03762), trained to write a text again from a noised copy of it.

Model, batch, rates and steps are the paper's. Its task is not: it translates, and a corpus folder holds no pairs of
sentences, so that this recipe learns from one text with BART's noises in place of a second language.
Claim: none of our own; the paper's 27.3 BLEU on newstest2014 belongs to its pairs.
Command: lm train --experiment=transformer_base --corpus=DIR --workdir=DIR
Hardware and time: 8 P100, 12 hours (paper, section 5.2).
"""

from lm.data.stream import Data
from lm.models.encdec import EncDec
from lm.objectives.denoise import Denoise
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import InverseSqrt


def run() -> Run:
    """6 and 6 layers, 512 wide: 65M parameters, 25,000 tokens on each side a step."""
    return Run(
        model=EncDec(
            layers=6,
            width=512,
            heads=8,
            mlp_width=2048,
            embed_scale=512**0.5,
            embed_dropout=0.1,
            residual_dropout=0.1,
            init="fan_in",
            init_std=512**-0.5,
            dtype="bfloat16",
        ),
        objective=Denoise(label_smoothing=0.1),
        data=Data(tokenizer="bpe:37000"),  # As published; a corpus brings its own.
        optimizer=AdamW(b1=0.9, b2=0.98, eps=1e-9, weight_decay=0.0, clip_norm=None),
        schedule=InverseSqrt(peak=512**-0.5 * 4000**-0.5, warmup_steps=4000),
        train=Train(steps=100_000, batch_size=192, seq_len=128, eval_every=1000, save_every=1000),
        evals=Evals(max_tokens=1_000_000),
    )
