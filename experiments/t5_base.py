"""T5-Base (Raffel et al. 2019, 1910.10683) on one corpus folder: span corruption alone, for as long as section 3.7.

The paper mixes its supervised tasks in from then on; the 10 % of dropout stayed. The weight of the z loss is that of
the authors' code, which the paper does not mention.
Claim: none of our own; the paper reports tasks alone.
Command: lm train --experiment=t5_base --corpus=DIR --workdir=DIR
Hardware and time: slices of Cloud TPU pods (paper, section 2); about 1 trillion tokens of source.
"""

from lm.data.stream import Data
from lm.layers.buckets import Buckets
from lm.models.encdec import EncDec
from lm.objectives.span import SpanCorruption
from lm.train.optimizers import Adafactor
from lm.train.run import Evals, Run, Train
from lm.train.schedules import InverseSqrt


def run() -> Run:
    """12 and 12 layers, 768 wide: 223M parameters, 2,048 sources of 512 a step."""
    return Run(
        model=EncDec(
            layers=12,
            width=768,
            heads=12,
            head_dim=64,
            mlp_width=3072,
            positions="none",
            buckets=Buckets(),
            norm="rmsnorm",
            norm_bias=False,
            norm_eps=1e-6,
            norm_place="pre",
            activation="relu",
            attention_bias=False,
            mlp_bias=False,
            attention_scale=1.0,
            logit_scale=768**-0.5,
            embed_dropout=0.1,
            residual_dropout=0.1,
            attention_dropout=0.1,
            mlp_dropout=0.1,
            init="t5",
            init_std=1.0,
            dtype="bfloat16",
        ),
        objective=SpanCorruption(z_loss=1e-4),
        data=Data(tokenizer="unigram:32000"),  # As published; a corpus brings its own.
        optimizer=Adafactor(),
        schedule=InverseSqrt(peak=0.01, warmup_steps=10_000, hold=True),
        train=Train(
            steps=1_000_000,
            batch_size=2048,
            seq_len=512,
            accumulate=8,
            eval_every=5000,
            save_every=5000,
            keep_every=100_000,
        ),
        evals=Evals(batch_size=256, max_tokens=10_000_000),
    )
