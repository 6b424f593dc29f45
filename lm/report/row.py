"""What a finished run is to a table or a fit: one row of plain values, `row.json` in its folder."""

import datetime
import functools
import os
import pathlib
import subprocess
from typing import Any

import jax

from lm.core import config, files, params
from lm.data.stream import Stream
from lm.report import conventions, goodput
from lm.report.arms import without_seed
from lm.train import meters, metrics
from lm.train.ledger import Ledger
from lm.train.loop import learning_rates

NAME = "row.json"
CONVENTION = "N = params_trunk + params_head, C = 6 N D"
_DECAYED = 0.2  # A schedule whose last rate is below this share of its highest has decayed.
_LAST_LOSSES = 10  # Logged training losses that are averaged.


def write(
    workdir: str | os.PathLike,
    run: Any,
    corpus: Any,
    digest: str,
    status: str,
    devices: int,
    stored: int | None = None,
) -> None:
    """Writes the row of a resolved run that has ended as `status`, "done" or "diverged".

    `corpus` has the run's splits, and `digest` is that of all that it read. A counted model has `stored` n-grams.
    """
    ended = {"status": status, "corpus": digest}
    sizes = _trained(workdir, run, corpus) if stored is None else _counted(run, corpus, stored)
    files.write_json(files.path(workdir) / NAME, _row(workdir, run, corpus, devices) | sizes | ended)


def read(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """The row of a run folder; None where the run has not ended."""
    name = files.path(workdir) / NAME
    return files.read_json(name) if name.exists() else None


def add(workdir: str | os.PathLike, **figures: Any) -> None:
    """Adds figures that were measured after the run, or puts them in place of its own."""
    files.write_json(files.path(workdir) / NAME, (read(workdir) or {}) | figures)


def _row(workdir: str | os.PathLike, run: Any, corpus: Any, devices: int) -> dict[str, Any]:
    """Loss (validation, nats a token), seed and group, and where its time went."""
    ledger = Ledger(workdir).rows()
    seconds, spent = _seconds(ledger), goodput.classes(ledger)
    return {
        "name": run.name or pathlib.Path(workdir).name,
        "run": os.fspath(workdir),
        "digest": config.digest(run),
        "commit": _commit(),
        **_losses(metrics.read(workdir)),
        "seed": run.train.seed,
        "data_seed": run.data.seed,
        "group": without_seed(run.name),
        "vocab_size": run.model.vocab_size,
        "validation_tokens": corpus.splits["validation"].tokens if "validation" in corpus.splits else 0,
        "seconds": seconds,
        "device_hours": seconds * devices / 3600,
        **{f"seconds_{name}": figure for name, figure in spent.items()},
        **({"goodput": goodput.share(spent)} if spent else {}),
        "config": config.to_json(run),
    }


def _trained(workdir: str | os.PathLike, run: Any, corpus: Any) -> dict[str, Any]:
    """N, D (tokens) and C, and what they were counted from."""
    train, spec, rates = run.train, run.model.spec(), learning_rates(run)
    logged = [row["learning_rate"] for row in metrics.read(workdir) if "learning_rate" in row]  # Evaluations lower it.
    batch = Stream(corpus.splits["train"], run.objective, train.seq_len).rows(0, 1)
    rows = train.steps * train.batch_size
    tokens = rows * train.seq_len
    sizes = conventions.counts(run.model, spec)
    per_token = conventions.flops_per_token(run.model, spec, train.seq_len)
    parameters = sizes["params_trunk"] + sizes["params_head"]
    return {
        "N": parameters,
        "D": tokens,
        "C": 6.0 * parameters * tokens,
        "convention": CONVENTION,
        **sizes,
        **{name: work * tokens for name, work in per_token.items()},
        "flops_model": rows * meters.flops_per_row(run.model, spec, batch),
        "flops_program": rows * _program_flops(run, batch),
        **{name: getattr(run.model, name, None) for name in ("layers", "width", "heads")},
        "seq_len": train.seq_len,
        "steps": train.steps,
        "batch_tokens": train.batch_size * train.seq_len,
        "unique_tokens": None if run.data.mixture else min(tokens, corpus.splits["train"].tokens),
        "optimizer": type(run.optimizer).__name__,
        "learning_rate": run.schedule.peak,
        "weight_decay": run.optimizer.weight_decay,
        "schedule": type(run.schedule).__name__,
        "decayed": bool(min(rates[-1], *logged[-1:]) <= _DECAYED * rates.max()),
    }


def _counted(run: Any, corpus: Any, stored: int) -> dict[str, Any]:
    """The same of a model that is counted: a parameter an n-gram, an addition for each that ends at a token."""
    tokens = corpus.splits["train"].tokens
    return {
        "N": stored,
        "D": tokens,
        "C": float(run.model.order * tokens),
        "convention": "N = stored n-grams, C = order x D additions",
        "params_total": stored,
        "unique_tokens": tokens,
        "flops_model": float(run.model.order * tokens),
        "flops_program": float(run.model.order * tokens),
        "learning_rate": 0.0,
        "decayed": True,
    }


def _program_flops(run: Any, batch: dict[str, Any]) -> float:
    """Of the products of a row's loss and gradient as they are programmed: masked pairs and recomputation count too."""
    return _traced_flops(run.model, run.objective, tuple((k, x.shape, x.dtype.name) for k, x in batch.items()))


@functools.lru_cache(maxsize=4)
def _traced_flops(model: Any, objective: Any, shapes: tuple) -> float:
    def loss(weights, batch):
        terms = objective.loss(model, weights, batch, key=None)
        return sum(coefficient * total for total, _, coefficient in terms.values() if coefficient)

    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes}
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params.abstract(model.spec()), batch)
    return sum(meters.product_flops(jaxpr.jaxpr))


def _losses(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    def series(name):
        return [row[name] for row in rows if row.get(name) is not None]

    training, validation, bits = (series(name) for name in ("loss", "val_loss", "val_bits_per_byte"))
    errors = series("val_loss_error")
    last = training[-_LAST_LOSSES:]
    return {
        "loss": validation[-1] if validation else None,
        "loss_error": errors[-1] if errors else None,
        "train_loss": sum(last) / len(last) if last else None,
        "bits_per_byte": bits[-1] if bits else None,
    }


def _seconds(events: list[dict[str, Any]]) -> float:
    """From each start to the last that its process wrote: a kill leaves no stop, and what comes before the next start,
    such as the lock being taken over, is not of the run's time.
    """
    spans: list[list[datetime.datetime]] = []
    for event in events:
        now = datetime.datetime.fromisoformat(event["time"])
        if event["event"] == "start":
            spans.append([now])
        elif spans and event["event"] in ("saved", "skipped", "not_finite", "stop"):
            spans[-1].append(now)
    return sum((span[-1] - span[0]).total_seconds() for span in spans)


@functools.lru_cache(maxsize=1)
def _commit() -> str | None:
    """The commit of the checkout that `lm` is installed from; None where it is no checkout."""
    command = ["git", "-C", os.fspath(pathlib.Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
