"""GPT-2 small (Radford et al. 2019) on a corpus of web text, trained as nanoGPT reproduces it.

The paper gives the architecture; batch, rates and steps are those of nanoGPT's config/train_gpt2.py.
Claim: validation loss 2.85 nats a token on OpenWebText after 600,000 steps (nanoGPT README).
Command: lm train --experiment=gpt2_124m --corpus=DIR --workdir=DIR
Hardware and time: 8 A100 40GB, about 4 days (nanoGPT README).
"""

import dataclasses

from lm.data.stream import Data
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine


def run() -> Run:
    """12 layers, 768 wide: 124M parameters, 0.5M tokens a step."""
    return Run(
        model=Decoder(layers=12, heads=12, width=768, max_len=1024, activation="gelu_tanh", dtype="bfloat16"),
        objective=Causal(),
        data=Data(tokenizer="bpe:50257"),  # As published; a corpus brings its own.
        optimizer=AdamW(b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0),
        schedule=Cosine(peak=6e-4, final=6e-5, warmup_steps=2000),
        train=Train(
            steps=600_000,
            batch_size=480,
            seq_len=1024,
            accumulate=5,
            eval_every=1000,
            save_every=1000,
            keep_every=50_000,
        ),
        evals=Evals(batch_size=96, max_tokens=10_000_000),
    )


def dropout() -> Run:
    """The paper's own regularisation: dropout of 0.1 on embeddings, residuals and attention."""
    base = run()
    model = dataclasses.replace(base.model, embed_dropout=0.1, residual_dropout=0.1, attention_dropout=0.1)
    return dataclasses.replace(base, model=model)
