"""BERT-Base (Devlin et al. 2018, 1810.04805) on one corpus folder, with both its tasks.

Architecture and rates are the paper's (appendix A.2); masks are fixed in 10 copies, which the epochs take in turn, as
RoBERTa (1907.11692, section 4.1) says of it. The paper trains nine tenths of the steps on rows of 128: here all are
of 512 (--set=train.seq_len=128 for a first part, --init_from for the second).
Claim: none of our own; the paper reports tasks alone.
Command: lm train --experiment=bert_base --corpus=DIR --workdir=DIR, a corpus of whole documents
Hardware and time: 16 Cloud TPU chips, 4 days (paper, appendix A.2).
"""

from lm.models.encoder import Encoder
from lm.objectives.mlm import MaskedLM
from lm.objectives.pairs import Pairs
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Linear


def run() -> Run:
    """12 layers, 768 wide: 110M parameters with 30,522 pieces; 131,072 tokens a step."""
    return Run(
        model=Encoder(
            outputs=("tokens", "pair"),
            embed_dropout=0.1,
            residual_dropout=0.1,
            attention_dropout=0.1,
            dtype="bfloat16",
        ),
        objective=Pairs("nsp", MaskedLM(copies=10), short=0.1),
        optimizer=AdamW(b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, clip_norm=1.0),
        schedule=Linear(peak=1e-4, warmup_steps=10_000),
        train=Train(steps=1_000_000, batch_size=256, seq_len=512, eval_every=5000, save_every=5000),
        evals=Evals(max_tokens=10_000_000),
    )
