"""ALBERT-Base (Lan et al. 2019, 1909.11942) on one corpus folder of documents: n-grams hidden, sentence order.

Claim: none of our own; the paper reports tasks alone.
Command: lm train --experiment=albert_base --corpus=DIR --workdir=DIR
Hardware and time: 64 to 512 TPU v3 chips (paper, section 4.1).
"""

from lm.data.stream import Data
from lm.models.encoder import Encoder
from lm.objectives.mlm import MaskedLM
from lm.objectives.pairs import Pairs
from lm.train.optimizers import Lamb
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Linear


def run() -> Run:
    """12 layers of one set of parameters, 768 wide, embeddings of 128: 12M parameters, 4,096 rows of 512 a step."""
    return Run(
        model=Encoder(
            layers=12,
            width=768,
            heads=12,
            mlp_width=3072,
            embed_width=128,
            shared_groups=1,
            outputs=("tokens", "pair"),
            activation="gelu_tanh",
            embed_dropout=0.1,
            residual_dropout=0.1,
            attention_dropout=0.1,
            dtype="bfloat16",
        ),
        objective=Pairs("sop", MaskedLM(unit="word", max_ngram=3), short=0.1),
        data=Data(tokenizer="unigram:30000"),  # As published; a corpus brings its own.
        optimizer=Lamb(b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, clip_norm=1.0),
        schedule=Linear(peak=0.00176, warmup_steps=3125),
        train=Train(steps=125_000, batch_size=4096, seq_len=512, accumulate=16, eval_every=5000, save_every=5000),
        evals=Evals(batch_size=256, max_tokens=10_000_000),
    )
