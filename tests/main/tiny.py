"""A model that trains in seconds, for tests of the whole: the text is a Markov chain."""

import dataclasses
import pathlib

from lm.data.stream import Data
from lm.models.decoder import Decoder
from lm.models.ngram import NGram
from lm.models.recurrent import Recurrent
from lm.objectives.causal import Causal
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine, Plateau, StepDecay


def run() -> Run:
    """1 layer, 16 wide, 60 steps."""
    return Run(
        model=Decoder(layers=1, heads=2, width=16, max_len=32, residual_dropout=0.1),
        objective=Causal(),
        data=Data(source="synthetic:markov?symbols=8&tokens=40000&seed=1", tokenizer="char", validation=0.1),
        schedule=Cosine(peak=1e-2, warmup_steps=5),
        train=Train(steps=60, batch_size=8, seq_len=32, log_every=10, eval_every=30, save_every=10, ema_decay=0.9),
        evals=Evals(batch_size=8, sample_tokens=5),
    )


def poisoned() -> Run:
    """Gradients are NaN from step 20 on."""
    base = run()
    return dataclasses.replace(base, train=dataclasses.replace(base.train, poison=(20, 99)))


def hiccup() -> Run:
    """One step in the middle has NaN gradients."""
    base = run()
    return dataclasses.replace(base, train=dataclasses.replace(base.train, poison=(20, 20)))


def sweep() -> list[Run]:
    """Two rates, two seeds."""
    return [_named(peak, seed) for peak in (1e-2, 1e-3) for seed in (0, 1)]


def failing() -> list[Run]:
    """The first run's corpus is smaller than a window; the second is sound."""
    first, second = _named(1e-2, 0), _named(1e-3, 0)
    data = dataclasses.replace(first.data, source="synthetic:markov?symbols=8&tokens=30&seed=1")
    return [dataclasses.replace(first, data=data), second]


def unmeasured() -> list[Run]:
    """A run that `measure` takes offence at."""
    return [dataclasses.replace(_named(1e-2, 0), name="odd/seed0")]


def measure(run: Run, folder: str) -> dict[str, float]:
    """What the sweep writes into each row."""
    if run.name.startswith("odd"):
        raise AssertionError("not to be measured")
    return {"peak": run.schedule.peak}


def verdict(rows: list[dict], folder: pathlib.Path) -> tuple[str, bool]:
    """The sweep's last word."""
    best = min(rows, key=lambda row: row["loss"])
    return f"best: {best['peak']}", best["peak"] == 1e-2


def _named(peak: float, seed: int) -> Run:
    base = run()
    return dataclasses.replace(
        base,
        name=f"lr{peak:g}/seed{seed}",
        schedule=dataclasses.replace(base.schedule, peak=peak),
        train=dataclasses.replace(base.train, seed=seed),
        evals=dataclasses.replace(base.evals, sample_tokens=0),
    )


def lanes() -> Run:
    """An LSTM that carries its states from step to step."""
    base = run()
    return dataclasses.replace(
        base,
        model=Recurrent(layers=1, width=8, embed_dropout=0.1, dropout=0.1),
        data=dataclasses.replace(base.data, order="lanes"),
    )


def plateau() -> Run:
    """No evaluation gains enough: from the second on, each halves the rate."""
    base = run()
    return dataclasses.replace(
        base,
        schedule=Plateau(peak=1e-2, factor=0.5, gain=1e6, every_steps=10),
        train=dataclasses.replace(base.train, steps=50, save_every=8),
    )


def halved() -> Run:
    """The same rates, fixed in advance."""
    return dataclasses.replace(plateau(), schedule=StepDecay(peak=1e-2, factor=0.5, first_steps=20, every_steps=10))


def families() -> list[Run]:
    """A counted model, one that carries its states and one that attends, on one text."""
    runs = {"counted": counted(), "lanes": lanes(), "decoder": run()}
    return [dataclasses.replace(each, name=name) for name, each in runs.items()]


def counted() -> Run:
    """Trigrams."""
    return dataclasses.replace(run(), model=NGram(order=3))
