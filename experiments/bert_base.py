"""BERT-Base (Devlin et al. 2018, 1810.04805) on one corpus folder of documents.

Ten copies fix the masks, as in the authors' code; pairs and cuts, which those fix too, are drawn anew. The paper
trains nine tenths of the steps on rows of 128 tokens and the rest on 512; here all rows are 512. Its Adam
has no bias correction, which the warm-up makes small.
Claim: none of our own; the paper reports tasks alone.
Command: lm train --experiment=bert_base --corpus=DIR --workdir=DIR
Hardware and time: 16 TPU chips, 4 days (paper, appendix A.2).
"""

from lm.data.stream import Data
from lm.models.encoder import Encoder
from lm.objectives.mlm import MaskedLM
from lm.objectives.pairs import Pairs
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Linear


def run() -> Run:
    """12 layers, 768 wide: 110M parameters, 256 rows of 512 a step."""
    return Run(
        model=Encoder(
            layers=12,
            width=768,
            heads=12,
            mlp_width=3072,
            outputs=("tokens", "pair"),
            embed_dropout=0.1,
            residual_dropout=0.1,
            attention_dropout=0.1,
            dtype="bfloat16",
        ),
        objective=Pairs("nsp", MaskedLM(copies=10), short=0.1),
        data=Data(tokenizer="wordpiece:30522"),  # As published; a corpus brings its own.
        optimizer=AdamW(b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, clip_norm=1.0),
        schedule=Linear(peak=1e-4, warmup_steps=10_000),
        train=Train(steps=1_000_000, batch_size=256, seq_len=512, eval_every=5000, save_every=5000),
        evals=Evals(max_tokens=10_000_000),
    )
