"""The text of a run: its corpus, opened or built, and the batches of training and validation made from it."""

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.data import corpus as corpora
from lm.data.stream import Stream, open_stream, prefetch, stack
from lm.evals import perplexity
from lm.main.corpus import progress_bar
from lm.objectives import carry as carries
from lm.parallel import hosts, rules
from lm.parallel.mesh import Mesh, under
from lm.train.counted import is_counted

Batches = Iterator[dict[str, jax.Array]]


def check_named(run: Any) -> None:
    """Raises UsageError for a run that names no text, before anything is made or started."""
    if not (run.data.corpus or run.data.mixture or run.data.source):
        raise UsageError("this experiment brings no text: build a corpus with lm corpus, and pass --corpus=DIR")
    for folder in (run.data.corpus, *(folder for folder, _ in run.data.mixture)):
        if folder:
            corpora.Corpus(folder)


def named(run: Any) -> corpora.Corpus | None:
    """The corpus that the run names, the first where it mixes several; None where it brings its own text."""
    folder = run.data.corpus or (run.data.mixture and run.data.mixture[0][0])
    return corpora.Corpus(folder) if folder else None


def of_run(run: Any, workdir: str) -> corpora.Corpus:
    """The corpus that the run names, or the one it builds from `data.source` in its folder.

    Process 0 builds; the others wait.
    """
    if found := named(run):
        return found
    folder = os.path.join(workdir, "corpus")
    if hosts.is_main():
        _build(run.data, folder)
    if jax.process_count() > 1:
        hosts.barrier("corpus")
    return corpora.Corpus(folder)


def of_sweep(run: Any, workdir: str, opened: dict[str, corpora.Corpus]) -> corpora.Corpus:
    """The same in the folder of a sweep, whose runs share what they bring alike; starts no devices.

    `opened` holds, by folder, what the runs before have opened or built.
    """
    folder = run.data.corpus or (run.data.mixture and run.data.mixture[0][0])
    if not folder:
        source = repr((run.data.source, run.data.tokenizer, run.data.validation))
        folder = os.path.join(workdir, f"corpus-{hashlib.sha256(source.encode()).hexdigest()[:8]}")
        if folder not in opened:
            _build(run.data, folder)
    if folder not in opened:
        opened[folder] = corpora.Corpus(folder)
    return opened[folder]


def _build(data: Any, folder: str) -> None:
    try:
        with progress_bar() as progress:
            corpora.build(data.source, data.tokenizer, folder, validation=data.validation, progress=progress)
    except UsageError as error:
        if corpora.is_built(folder):
            raise UsageError(f"{error}; or pass --corpus={folder} to go on with it as it is") from None
        raise


def fingerprint(run: Any, corpus: corpora.Corpus) -> str:
    """What the run's tokens are: the digest of its corpus, or of all that it mixes, with their weights."""
    if not run.data.mixture:
        return corpus.digest
    return "+".join(f"{weight}x{corpora.Corpus(folder).digest}" for folder, weight in run.data.mixture)


def training_batches(run: Any, corpus: corpora.Corpus, mesh: jax.sharding.Mesh, start: int, steps: int) -> Batches:
    """The next `steps` global batches from example `start` on, prepared ahead; each process reads its own rows."""
    data = run.data if run.data.mixture else _pointed_at(run.data, corpus)
    size = run.train.batch_size
    stream = open_stream(data, run.objective, run.train.seq_len, size)
    first, count = hosts.host_rows(mesh, size)
    rows = prefetch(
        stream, start, size, steps=steps, host=first // count, hosts=size // count, workers=run.data.workers
    )
    place = rules.batch_sharding(mesh)
    return (hosts.global_array(batch, place) for batch in rows)


def validation(
    run: Any, corpus: corpora.Corpus, mesh: jax.sharding.Mesh | None
) -> Callable[[Any], dict[str, float]] | None:
    """A function from weights to val_loss and val_bits_per_byte; None where the corpus has no validation split."""
    if "validation" not in corpus.splits:
        return None
    size = run.evals.batch_size or run.train.batch_size
    split, length = corpus.splits["validation"], run.train.seq_len
    return scorer(run.model, run.objective, split, mesh, size, run.evals, length, run.mesh)


def scorer(
    model: Any,
    objective: Any,
    split: Any,
    mesh: jax.sharding.Mesh | None,
    batch_size: int,
    evals: Any,
    seq_len: int,
    settings: Mesh = Mesh(),
) -> Callable[[Any], dict[str, float]]:
    """A function from weights to the figures of a split, every token of it once in a row.

    They are val_loss, each other term of the objective as val_<name>, and val_bits_per_byte where the objective
    predicts the text, every token of it and nothing else (its `scores_text`). Under `evals.max_tokens` the bits per
    byte take the tokens a byte of the whole split. A counted model scores its tokens one after another, the first
    among them, and needs no mesh. Rows of a model that hands on a state are as many lanes: each continues the row of
    the batch before.
    """
    if is_counted(model):
        return lambda tables: _val(perplexity.score_counted(model, tables, split, evals.max_tokens), split, objective)
    assert mesh is not None  # There is one for all models with weights.
    length = evals.seq_len or seq_len
    stream = Stream(split, objective, length, order="sequential")
    examples = stream.examples
    if evals.max_tokens is not None:
        examples = min(examples, -(-evals.max_tokens // length))
    shards = math.prod(mesh.shape[axis] for axis in rules.BATCH_AXES) * (settings.micro_batches or mesh.shape["stage"])
    batch_size = -(-batch_size // shards) * shards  # Rows past the end weigh nothing.
    first, count = hosts.host_rows(mesh, batch_size)
    place = rules.batch_sharding(mesh)
    evaluate = under(mesh, perplexity.make_evaluate(model, objective), settings)
    carry_spec = carries.carry_spec(model, objective, batch_size)
    steps = -(-examples // batch_size)
    places = np.arange(steps * batch_size)
    order = places.reshape(steps, batch_size) if carry_spec is None else places.reshape(batch_size, steps).T

    def rows(index: np.ndarray) -> dict[str, Any]:
        batch = stack(stream.examples_at(index, index))
        for name in batch:
            if name.startswith("weights"):
                batch[name][index >= examples] = 0
        return batch

    def score(weights: Any) -> dict[str, float]:
        batches = (hosts.global_array(rows(index[first : first + count]), place) for index in order)
        carry = None
        if carry_spec is not None:
            begin = functools.partial(specs.initialize, carry_spec)
            carry = jax.jit(begin, out_shardings=rules.shardings(carry_spec, mesh))(jax.random.key(0))
        means = evaluate(weights, None, batches, carry)
        return _val(means, split, objective)

    return score


def _val(means: dict[str, float], split: Any, objective: Any) -> dict[str, float]:
    """The means under their names in metrics, and the bits per byte."""
    loss, error = means.pop("loss"), means.pop("loss_error")
    figures = {"val_loss": means.pop("nll", loss)} | ({} if math.isnan(error) else {"val_loss_error": error})
    if objective.scores_text:
        bits = perplexity.bits_per_byte(figures["val_loss"], split.tokens, split.text_bytes)
        figures["val_bits_per_byte"] = bits
    return figures | {f"val_{name}": value for name, value in means.items()}


def _pointed_at(data: Any, corpus: corpora.Corpus) -> Any:
    return dataclasses.replace(data, corpus=os.fspath(corpus.folder))
