"""A stream of batch rows is a pure function of (data seed, example index)."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from lm.core.config import setting
from lm.core.errors import UsageError, check_choice
from lm.data import corpus, mix, order

ORDERS = ("shuffled", "lanes", "sequential")
PADDING = -1  # In `documents`: this token is no text.

Rows = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads: a corpus folder, a mixture of (folder, whole weight) pairs, or a source to build one from."""

    corpus: str | None = setting(None, identity=False)
    mixture: tuple[tuple[str, int], ...] = ()
    source: str | None = None  # With `tokenizer` and `validation`: the corpus that is built where none is named.
    tokenizer: str = "bpe:4096"
    validation: float | None = None
    seed: int = 0
    order: str = "shuffled"
    workers: int = setting(0, identity=False)  # Processes that prepare batches; 0 takes threads.

    def __post_init__(self):
        check_choice("data.order", self.order, ORDERS)
        if self.seed < 0 or self.workers < 0:
            raise UsageError(f"data.seed={self.seed} and data.workers={self.workers} must not be negative")
        if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in self.mixture):
            raise UsageError(f"data.mixture={self.mixture} must hold pairs of a corpus folder and a whole weight")
        if self.corpus and self.mixture:
            raise UsageError("data.corpus and data.mixture exclude each other: put the corpus into the mixture")


class Objective(Protocol):
    """What a stream needs of an objective.

    `corrupt` takes a row of "tokens" [window] int32, "documents" [window] int32 (counted from 0 in the row,
    -1 at padding, which must get no weight), "index", and the "split" that they come from, for an objective that
    needs other places of the text too, with the "start" of the window in it, the "epoch" and the data's "seed". It
    returns arrays by their names in a batch; those that count are "weights_*". One that pairs documents has
    `least_documents`, one that predicts from the tokens before a `context`: so many at a window's begin are seen only.
    """

    def window(self, seq_len: int) -> int: ...

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> Rows: ...


@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows of one split.

    shuffled: endless epochs of permuted windows. lanes: endless, row r of `batch_size` continuing row r of the
    step before, with "resets_B" where it starts over. sequential: each token after the first `context` is in one
    window's part to predict; past the end come rows of padding alone.
    """

    split: corpus.Split
    objective: Objective
    seq_len: int
    seed: int = 0
    order: str = "shuffled"
    batch_size: int | None = None

    def __post_init__(self):
        check_choice("data.order", self.order, ORDERS)
        if self.order == "lanes" and not self.batch_size:
            raise UsageError("data.order=lanes needs the batch size")
        shortest = self.window if self.order != "sequential" else self.window - self.stride + 1
        if self.split.tokens < shortest:
            raise UsageError(
                f"split {self.split.name} has {self.split.tokens} tokens, fewer than a window of {shortest}: "
                f"lower seq_len={self.seq_len}, or build a larger corpus"
            )
        least = getattr(self.objective, "least_documents", 1)
        if self.split.documents < least:
            raise UsageError(
                f"split {self.split.name} has {self.split.documents} document, fewer than the {least} that the "
                "objective pairs: build the corpus from several (lines:, jsonl:, or text: with a pattern)"
            )
        _ = self.examples

    @property
    def window(self) -> int:
        return self.objective.window(self.seq_len)

    @property
    def stride(self) -> int:
        """The tokens from one window to the next, which overlap by the context alone."""
        return self.window - getattr(self.objective, "context", 0)

    @property
    def examples(self) -> int:
        """The examples of one epoch."""
        size = self.split.tokens, self.stride, self.window
        if self.order == "lanes":
            return self._lanes * order.lane_steps(*size, self._lanes)
        return {"shuffled": order.shuffled_examples, "sequential": order.sequential_examples}[self.order](*size)

    def rows(self, start: int, count: int) -> Rows:
        """Examples [start, start + count), stacked: {"tokens_BL": [count, ...], ...}."""
        index = np.arange(start, start + count)
        return stack(self.examples_at(index, index))

    def examples_at(self, index: np.ndarray, keys: np.ndarray) -> list[Rows]:
        """The examples at `index` of this stream, corrupted as examples `keys` of the run."""
        window = self.window
        size = self.split.tokens, self.stride, window
        resets = None
        if self.order == "shuffled":
            starts = order.shuffled(index, *size, self.seed)
        elif self.order == "lanes":
            starts, resets = order.lanes(index, *size, self._lanes)
        else:
            starts = index * self.stride
        epochs = index // self.examples
        known = (
            {"split": self.split, "index": key, "start": start, "epoch": epoch, "seed": self.seed}
            for key, start, epoch in zip(keys.tolist(), starts.tolist(), epochs.tolist(), strict=True)
        )
        rows = [
            self.objective.corrupt(rng, self._row(place["start"], window) | place)
            for rng, place in zip(generators(self.seed, keys.tolist()), known, strict=True)
        ]
        return rows if resets is None else [row | {"resets_B": r} for row, r in zip(rows, resets, strict=True)]

    @property
    def _lanes(self) -> int:
        assert self.batch_size is not None  # Asked for at the start where the order is lanes.
        return self.batch_size

    def _row(self, start: int, window: int) -> dict[str, Any]:
        length = min(window, self.split.tokens - start)
        if length <= window - self.stride:  # Context alone: there is nothing left to predict.
            return {"tokens": np.zeros(window, np.int32), "documents": np.full(window, PADDING, np.int32)}
        tokens = self.split.window(start, length)
        documents = _documents(self.split.starts(start, length), length)
        if length == window:
            return {"tokens": tokens, "documents": documents}
        pad = (0, window - length)
        return {"tokens": np.pad(tokens, pad), "documents": np.pad(documents, pad, constant_values=PADDING)}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Rows of several streams, in exact shares by whole weights."""

    streams: tuple[Stream, ...]
    schedule: mix.Schedule

    def rows(self, start: int, count: int) -> Rows:
        """Examples [start, start + count), stacked."""
        keys = np.arange(start, start + count)
        source, index = self.schedule.locate(keys)
        found: list[Rows] = [{}] * count
        for k in np.unique(source):
            places = np.flatnonzero(source == k)
            rows = self.streams[k].examples_at(index[places], keys[places])
            for place, row in zip(places, rows, strict=True):
                found[place] = row
        return stack(found)


def stack(rows: Sequence[Rows]) -> Rows:
    """One array a field, with the rows as its first dimension."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def open_stream(data: Data, objective: Objective, seq_len: int, batch_size: int) -> Stream | Mixture:
    """The training stream that the config names; raises UsageError where corpora and settings do not fit."""
    pairs = data.mixture
    if not pairs:
        if data.corpus is None:
            raise UsageError("the run names no corpus: give --corpus=DIR")
        pairs = ((data.corpus, 1),)
    corpora = [corpus.Corpus(folder) for folder, _ in pairs]
    if len({c.tokenizer_digest for c in corpora}) > 1:
        raise UsageError("the corpora of data.mixture have different tokenizers: build them with one --tokenizer=FILE")
    if len(corpora) > 1 and data.order == "lanes":
        raise UsageError("data.order=lanes continues one text: it takes data.corpus, not data.mixture")
    streams = tuple(Stream(c.split("train"), objective, seq_len, data.seed, data.order, batch_size) for c in corpora)
    return streams[0] if len(streams) == 1 else Mixture(streams, mix.Schedule(tuple(weight for _, weight in pairs)))


def prefetch(
    stream: Stream | Mixture,
    start: int,
    batch_size: int,
    *,
    steps: int,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    threads: int = 2,
    buffer: int = 4,
) -> Iterator[Rows]:
    """`steps` batches of this host, in order, from example `start`, prepared ahead by Grain.

    Host h of H takes rows [h, h + 1) x batch_size / H of each global batch. Threads prepare them, or `workers`
    processes, to which the stream is pickled.
    """
    import grain

    if batch_size % hosts:
        raise UsageError(f"train.batch_size={batch_size} does not divide over {hosts} hosts")
    source = _Batches(stream, start + host * (batch_size // hosts), batch_size, batch_size // hosts, steps)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
    dataset = grain.MapDataset.source(source).to_iter_dataset(options)
    if workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer))
    return iter(dataset)


@dataclasses.dataclass(frozen=True)
class _Batches:
    """A Grain source: batch i."""

    stream: Stream | Mixture
    start: int
    stride: int
    count: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> Rows:
        return self.stream.rows(self.start + int(i) * self.stride, self.count)


def generators(seed: int, keys: Iterable[int]) -> Iterator[np.random.Generator]:
    """For each key the generator of (seed, key), good until the next is taken."""
    # One generator set anew for each key: making it takes ten times as long.
    bits = np.random.Philox(key=0)
    generator, state = np.random.Generator(bits), bits.state
    for key in keys:
        state["state"]["key"][:] = seed, key
        bits.state = state
        yield generator


def _documents(starts: np.ndarray, length: int) -> np.ndarray:
    """For each token the number of documents that began in the window before it, the first not counted."""
    marks = np.zeros(length, np.int32)
    if len(starts) == 0:
        return marks
    marks[starts] = 1
    marks[0] = 0
    return marks.cumsum(dtype=np.int32)
