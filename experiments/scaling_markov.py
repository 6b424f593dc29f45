"""A ladder over width and tokens on a source of known entropy rate: 24 runs from one command, exactly evaluated.

A Markov chain of 256 symbols whose logits have singular values falling as k^-0.9, and a model of one symbol's context,
so that the loss is a sum over all pairs: no sampling in the evaluation, and no loss may lie below the entropy rate.
Claim: the excess over the entropy rate falls with every step of width and of tokens; the additive law of lm fit does
not hold here, and says so.
Command: lm sweep --experiment=scaling_markov --workdir=runs/lad --parallel=2 && lm report --workdir=runs/lad &&
lm fit --runs=runs/lad --form=chinchilla --out=runs/fit
Hardware and time: 2 CPU cores, 10 minutes.
"""

import numpy as np

from lm.data.stream import Data
from lm.data.synthetic import parse
from lm.models.nnlm import NNLM
from lm.objectives.causal import Causal
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine

SOURCE = "markov?symbols=256&decay=0.9&tokens=2300000"
WIDTHS = (4, 7, 12, 21, 37, 64)
STEPS = (125, 315, 794, 2000)


def run() -> list[Run]:
    """6 widths x 4 lengths, 1,024 pairs a step, each with a schedule of its own that ends at zero."""
    return [_run(width, steps) for width in WIDTHS for steps in STEPS]


def small() -> list[Run]:
    """9 of them, in 2 minutes."""
    return [_run(width, steps) for width in WIDTHS[::2] for steps in STEPS[:3]]


def measure(run: Run, folder: str) -> dict[str, float | None]:
    """The exact loss, the sum over pairs of symbols of pi P (-ln q), in place of the sampled one."""
    import jax

    import lm

    source = parse(SOURCE)
    model, params = lm.load(folder)
    hidden = model.apply(params, {"tokens_BL": np.arange(source.symbols)[:, None]}).hidden_BLD[:, 0]
    log_q = np.float64(jax.nn.log_softmax(model.logits(model.head(params), hidden)))[:, : source.symbols]
    loss = float(-(source.stationary[:, None] * source.transition * log_q).sum())
    if loss < source.entropy_rate:
        raise AssertionError(f"loss {loss} is below the entropy rate {source.entropy_rate}: the model saw its targets")
    exact = {"loss": loss, "loss_error": 0.0, "bits_per_byte": None}
    return exact | {"entropy_rate": source.entropy_rate, "excess": loss - source.entropy_rate}


def _run(width: int, steps: int) -> Run:
    return Run(
        name=f"w{width}/s{steps}",
        model=NNLM(context=1, width=width, hidden=width, layers=2, activation="gelu"),
        objective=Causal(),
        data=Data(source=f"synthetic:{SOURCE}", tokenizer="char", validation=0.02),
        optimizer=AdamW(b2=0.99, weight_decay=0.0),
        schedule=Cosine(peak=1e-2, warmup_steps=20),
        train=Train(steps=steps, batch_size=32, seq_len=32, log_every=100, eval_every=5000, save_every=5000),
        evals=Evals(batch_size=64),
    )
