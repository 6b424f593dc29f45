"""nanoGPT's small character model of Shakespeare, the recipe of its README for a CPU.

Claim: validation loss 1.88 nats a character (nanoGPT README), over the whole validation split 1.88 +- 0.03.
Command: lm corpus --source=text:input.txt --tokenizer=char --validation=0.1 --out=runs/shk
         lm train --experiment=shakespeare_char --corpus=runs/shk --workdir=runs/shk_run
Hardware and time: 2 CPU cores, 1 to 2 minutes.
"""

from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine


def run() -> Run:
    """4 layers, 128 wide, context 64, 2,000 steps of 12 sequences."""
    return Run(
        model=Decoder(
            layers=4, heads=4, width=128, max_len=64, norm_bias=False, attention_bias=False, mlp_bias=False, scan=False
        ),
        objective=Causal(),
        optimizer=AdamW(b2=0.99, weight_decay=0.1, clip_norm=1.0),
        schedule=Cosine(peak=1e-3, final=1e-4, warmup_steps=100),
        train=Train(steps=2000, batch_size=12, seq_len=64, eval_every=500, save_every=500, log_every=20),
        evals=Evals(batch_size=64, sample_tokens=200),
    )
