"""RoBERTa-Base (Liu et al. 2019, 1907.11692) on one corpus folder.

Architecture and rates are the paper's (appendix, table 9): full sentences, masks drawn anew, no sentence pairs. Its
tokens are byte-level BPE pieces; position rows and norm are those of the released model, which this converts to.
Claim: none of our own; the paper reports tasks, and on BERT's text a perplexity of 3.77 after 31,000 steps (table 3).
Command: lm train --experiment=roberta_base --corpus=DIR --workdir=DIR
Hardware and time: 1,024 V100 32GB; one day for 100,000 steps of the large model (paper, section 5).
"""

from lm.models.encoder import Encoder
from lm.objectives.mlm import MaskedLM
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Linear


def run() -> Run:
    """12 layers, 768 wide: 125M parameters with 50,265 pieces; 4.2M tokens a step."""
    return Run(
        model=Encoder(
            position_offset=2,
            types=1,
            norm_eps=1e-5,
            embed_dropout=0.1,
            residual_dropout=0.1,
            attention_dropout=0.1,
            dtype="bfloat16",
        ),
        objective=MaskedLM(),
        optimizer=AdamW(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01, clip_norm=None),
        schedule=Linear(peak=6e-4, warmup_steps=24_000),
        train=Train(steps=500_000, batch_size=8192, seq_len=512, accumulate=32, eval_every=5000, save_every=5000),
        evals=Evals(batch_size=256, max_tokens=10_000_000),
    )
