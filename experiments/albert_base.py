"""ALBERT-Base (Lan et al. 2019, 1909.11942) on one corpus folder: runs of up to three words, and sentence order.

Architecture and rates are the paper's (sections 3 and 4.1). Its tokens are 30,000 SentencePiece pieces.
Claim: none of our own; the paper reports tasks, and the accuracies of both objectives in its ablations alone.
Command: lm train --experiment=albert_base --corpus=DIR --workdir=DIR, a corpus of whole documents
Hardware and time: 64 to 512 Cloud TPU v3 chips (paper, section 4.1), which gives no time for the base model.
"""

from lm.models.encoder import Encoder
from lm.objectives.mlm import MaskedLM
from lm.objectives.pairs import Pairs
from lm.train.optimizers import Lamb
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Linear


def run() -> Run:
    """12 layers, 768 wide, of one set of parameters, over embeddings of 128: 12M; 2.1M tokens a step."""
    return Run(
        model=Encoder(
            embed_width=128,
            shared_groups=1,
            activation="gelu_tanh",
            outputs=("tokens", "pair"),
            embed_dropout=0.1,
            residual_dropout=0.1,
            attention_dropout=0.1,
            dtype="bfloat16",
        ),
        objective=Pairs("sop", MaskedLM(unit="word", max_ngram=3), short=0.1),
        optimizer=Lamb(b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, clip_norm=1.0),
        schedule=Linear(peak=1.76e-3, warmup_steps=3125),
        train=Train(steps=125_000, batch_size=4096, seq_len=512, accumulate=16, eval_every=2500, save_every=2500),
        evals=Evals(batch_size=256, max_tokens=10_000_000),
    )
