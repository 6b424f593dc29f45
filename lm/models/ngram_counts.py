"""The n-grams of a text and how often they occur, counted in files, with memory for a chunk of the text at a time.

The n-grams of an order are sorted integers, rank of the first n - 1 words among the n-grams of that length x number of
classes + last word: so all that follow one context lie side by side, and a lookup is a binary search. Chunks give
sorted runs, which are merged: with numpy a few lines, where a key-value store would sort the same keys again.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lm.core.errors import UsageError

Progress = Callable[[str, int, int], None]  # (stage, done, total)


@dataclasses.dataclass(frozen=True)
class Grams:
    """The n-grams of one order: keys and counts, int64 [n-grams], mapped from files."""

    keys: np.ndarray
    counts: np.ndarray


def lookup(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The rank of each query among the sorted keys, -1 where it is not one of them."""
    ranks = keys.searchsorted(queries).clip(max=len(keys) - 1)
    return np.where(keys[ranks] == queries, ranks, -1)


def spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, end) of pieces of at most that size."""
    for first in range(0, total, size):
        yield first, min(first + size, total)


def count(
    split: Any,
    order: int,
    classes: int,
    boundary_id: int | None,
    folder: pathlib.Path,
    chunk_tokens: int,
    progress: Progress,
) -> list[Grams]:
    """The n-grams of each order up to `order`, in files in the folder.

    A text starts with a boundary, which is counted at the end of n-grams and then stands for the end of a line, or at
    their begin and then stands for its start; none has one within. Raises UsageError for a text without n-grams of
    that order, and without the boundary.
    """
    # Of each position, the rank of the n-gram that ends there, which is the context of the next one: -1 for none.
    ranks_T = np.memmap(folder / "ranks", np.int64, "w+", shape=(split.tokens,))
    grams: list[Grams] = []
    for n in range(1, order + 1):
        first = 0 if n == 1 else _start(grams, boundary_id) if n == 2 and boundary_id is not None else -1
        within = boundary_id if n > 1 else None
        chunks = _chunks(split, ranks_T, chunk_tokens, lambda done, n=n: progress(f"{n}-grams", done, split.tokens))
        bounds = _write_runs(chunks, first, classes, within, folder / "runs")
        if bounds[-1] == 0:
            raise UsageError(
                f"order={order} is longer than any line of the text: order={n - 1} is the longest there is"
            )
        runs = np.memmap(folder / "runs", np.int64, "r").reshape(-1, 2)
        grams.append(_merge(runs, bounds, chunk_tokens, folder, n))
        if n < order:
            for (a, b), low, high in zip(spans(split.tokens, chunk_tokens), bounds, bounds[1:], strict=False):
                places = ranks_T[a:b]
                found = grams[-1].keys.searchsorted(runs[low:high, 0])
                ranks_T[a:b] = np.where(places < 0, -1, found[places]) if high > low else -1
    return grams


def suffixes(grams: list[Grams], classes: int, folder: pathlib.Path, chunk_tokens: int) -> list[np.ndarray]:
    """Of each n-gram the rank of its last n - 1 words among the n-grams of that length, int64, one array an order."""
    found: list[np.ndarray] = []
    for n, gram in enumerate(grams, 1):
        found.append(np.memmap(folder / f"suffixes_{n}", np.int64, "w+", shape=gram.keys.shape))
        if n == 1:
            continue
        for a, b in spans(len(gram.keys), chunk_tokens):
            prefixes, words = np.divmod(gram.keys[a:b], classes)
            found[-1][a:b] = grams[n - 2].keys.searchsorted(found[-2][prefixes] * classes + words)
    return found


def keep_starts(grams: list[Grams], classes: int, boundary_id: int | None) -> None:
    """Sets all counts below the highest order to zero, but for those of n-grams that begin with the boundary."""
    low, high = (0, 0) if boundary_id is None else grams[0].keys.searchsorted((boundary_id, boundary_id + 1))
    for n, gram in enumerate(grams[:-1], 1):
        if n == 1:
            gram.counts[:] = 0
            continue
        low, high = gram.keys.searchsorted((low * classes, high * classes))
        gram.counts[:low] = 0
        gram.counts[high:] = 0


def add_neighbours(
    grams: list[Grams], suffixes: list[np.ndarray], first_tokens: np.ndarray, classes: int, chunk_tokens: int
) -> None:
    """Adds to each count below the highest order in how many words' company, to the left, the n-gram was seen.

    What stands at the begin of a text without boundaries, `first_tokens`, has the begin as one such neighbour.
    """
    rank = 0
    for n, gram in enumerate(grams[:-1], 1):
        for a, b in spans(len(suffixes[n]), chunk_tokens):
            np.add.at(gram.counts, suffixes[n][a:b], 1)
        if n <= len(first_tokens):
            rank = int(gram.keys.searchsorted(rank * classes + int(first_tokens[n - 1])))
            gram.counts[rank] += 1


def sorted_last(split: Any, order: int, classes: int, boundary_id: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """(words seen before it, occurrences) of the n-gram of each length below `order`, while none begins a line, that is
    last when sorted by the last word, then the one before it and so on, words in the order in which they first occur.
    """
    first_V = np.full(classes, -1)
    for a, b in spans(split.tokens, chunk_tokens):
        words, places = np.unique(split.window(a, b - a), return_index=True)
        first_V[words] = np.where(first_V[words] < 0, a + places, first_V[words])
    first_V[boundary_id] = -1
    last = int(first_V.argmax())
    chunks = ((a, split.window(a, b - a)) for a, b in spans(split.tokens, chunk_tokens))
    ends = np.concatenate([a + np.flatnonzero(tokens == last) for a, tokens in chunks])
    found: list[tuple[int, int]] = []
    while len(found) < order - 1 and last != boundary_id:
        before = [int(split.window(i, 1)[0]) if i >= 0 else boundary_id for i in ends - len(found) - 1]
        found.append((len(set(before)), len(ends)))
        last = max(before, key=lambda word: first_V[word])
        ends = ends[np.array(before) == last]
    return found


def _start(grams: list[Grams], boundary_id: int) -> int:
    """The rank of the boundary as a context."""
    rank = int(lookup(grams[0].keys, np.array([boundary_id]))[0])
    if rank < 0:
        raise UsageError(f"boundary_id={boundary_id} does not occur in the text: boundary_id=None makes it one line")
    return rank


def _chunks(split: Any, ranks_T: np.ndarray, chunk_tokens: int, show: Callable) -> Iterator[tuple]:
    """(tokens, their part of ranks_T) of each chunk."""
    for a, b in spans(split.tokens, chunk_tokens):
        yield split.window(a, b - a), ranks_T[a:b]
        show(b)


def _write_runs(
    chunks: Iterator[tuple[np.ndarray, np.ndarray]], context: int, classes: int, within: int | None, file: pathlib.Path
) -> list[int]:
    """Where each chunk's run ends in the file of rows (key, count), after a zero.

    The ranks of contexts in each chunk become places of n-grams in its run, -1 where there is none, and where the
    token is `within`, which no context has inside. `context` is the rank before the first token.
    """
    bounds = [0]
    with open(file, "wb") as f:
        for tokens, ranks in chunks:
            if tokens.max() >= classes:
                raise UsageError(f"token {tokens.max()} of the text is not below the vocabulary of {classes} ids")
            contexts = np.concatenate([[context], ranks[:-1]])
            context, known = int(ranks[-1]), contexts >= 0
            keys, places, counts = np.unique(
                contexts[known] * classes + tokens[known], return_inverse=True, return_counts=True
            )
            np.stack([keys, counts], 1).tofile(f)
            bounds.append(bounds[-1] + len(keys))
            ranks[:] = -1
            ranks[known] = places
            if within is not None:
                ranks[tokens == within] = -1
    return bounds


def _merge(runs: np.ndarray, bounds: list[int], size: int, folder: pathlib.Path, n: int) -> Grams:
    """One sorted run of all, equal keys added up, with about `size` rows in memory."""
    heads, ends, step = bounds[:-1], bounds[1:], max(1, size // (len(bounds) - 1))
    with open(folder / f"keys_{n}", "wb") as keys_file, open(folder / f"counts_{n}", "wb") as counts_file:
        while live := [i for i, head in enumerate(heads) if head < ends[i]]:
            parts = {i: runs[heads[i] : min(heads[i] + step, ends[i])] for i in live}
            # No run has keys up to here beyond its part.
            limit = min(part[-1, 0] for part in parts.values())
            parts = {i: part[: part[:, 0].searchsorted(limit, "right")] for i, part in parts.items()}
            for i, part in parts.items():
                heads[i] += len(part)
            rows = np.concatenate(list(parts.values()))
            keys, places = np.unique(rows[:, 0], return_inverse=True)
            counts = np.zeros(len(keys), np.int64)
            np.add.at(counts, places, rows[:, 1])
            keys.tofile(keys_file)
            counts.tofile(counts_file)
    keys, counts = (np.memmap(folder / f"{name}_{n}", np.int64, "r+") for name in ("keys", "counts"))
    return Grams(keys, counts)
