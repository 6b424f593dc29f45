"""N-gram language models of any order: counted rather than descended, scored as one lookup an order."""

import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lm.core import config, files
from lm.core.errors import UsageError, check_choice, check_given, check_positive
from lm.models import ngram_counts
from lm.models import smoothing as estimates
from lm.models.ngram_counts import Grams, Progress

SMOOTHINGS = ("modified_kneser_ney", "kneser_ney", "katz", "add_k", "maximum_likelihood", "arpa")
MANIFEST = "ngram.json"
Tables = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class NGram:
    """The config, hashable, and the functions over its tables.

    `smoothing`, each down to the uniform distribution, without cutoffs: "modified_kneser_ney" (interpolated: Chen and
    Goodman 1998) and "kneser_ney" (interpolated, one discount: Kneser and Ney 1995) as lmplz defines them, over
    continuation counts, where the three discounts are estimated from the occurrences of the n-gram that lmplz sorts
    last (adjust_counts.cc; of lines alone); "katz" (1987), whose counts up to `cutoff` (5) are discounted; "add_k",
    `k` (1) more of every n-gram, where contexts that were not seen, or are too short, know nothing;
    "maximum_likelihood", where unseen contexts are those of a lower order: a Markov chain. "arpa" has its tables from a
    file, see lm.models.arpa.
    `open_vocabulary` gives words outside the vocabulary one class more, as lmplz does.
    After `boundary_id` contexts start anew: to the left it stands for `<s>`, one a line, to the right for `</s>`; None
    is one endless text. `chunk_tokens` are counted at a time, in some 110 bytes of memory each.
    """

    order: int = 5
    smoothing: str = "modified_kneser_ney"
    k: float | None = None
    cutoff: int | None = None
    open_vocabulary: bool = False
    boundary_id: int | None = None
    vocab_size: int | None = None
    valid_vocab_size: int | None = None
    chunk_tokens: int = config.setting(1 << 22, identity=False)

    offers = ("causal",)  # What an objective may need of it.
    context_limit = None  # It sees the last order - 1 tokens of any length.

    def __post_init__(self):
        check_positive(order=self.order, chunk_tokens=self.chunk_tokens)
        check_choice("smoothing", self.smoothing, SMOOTHINGS)
        check_given(self, "k", "cutoff")
        for name, only in (("k", "add_k"), ("cutoff", "katz")):
            if getattr(self, name) is not None and self.smoothing != only:
                raise UsageError(
                    f"{name}={getattr(self, name)} has no effect on smoothing={self.smoothing}, only {only}"
                )
        if self.open_vocabulary and self.smoothing == "maximum_likelihood":
            raise UsageError("open_vocabulary=True has no effect on maximum_likelihood: unseen words have none")
        if self.valid_vocab_size is not None and not 0 < self.valid_vocab_size <= (self.vocab_size or 0):
            raise UsageError(f"valid_vocab_size={self.valid_vocab_size} is not within vocab_size={self.vocab_size}")
        if self.boundary_id is not None and not 0 <= self.boundary_id < (self.vocab_size or float("inf")):
            raise UsageError(f"boundary_id={self.boundary_id} is not within vocab_size={self.vocab_size}")

    @property
    def classes(self) -> int:
        """How many tokens share the probability."""
        if self.vocab_size is None:
            raise UsageError("vocab_size=None is not resolved: take it from the tokenizer or set it")
        return self.valid_vocab_size or self.vocab_size

    def with_boundary(self, boundary_id: int | None) -> "NGram":
        """The model with that boundary, unless it has one."""
        return self if self.boundary_id is not None else dataclasses.replace(self, boundary_id=boundary_id)

    def fit(self, split: Any, folder: str | os.PathLike, progress: Progress | None = None) -> None:
        """Writes the tables into an existing, empty folder.

        Of each order n the sorted keys_n, int64 (see lm.models.ngram_counts), and log_p_n and backoff_n, natural
        logarithms in float64: p(w | h) is that of h w where it is stored, else backoff(h) p(w | h without its first
        word), of contexts h that are not stored without backoff(h). Order 0 is the uniform distribution.
        """
        if self.smoothing == "arpa":
            raise UsageError("smoothing=arpa has its tables from a file and cannot be counted: name another smoothing")
        folder, show = pathlib.Path(folder), progress or (lambda *_: None)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            scratch = pathlib.Path(name)
            grams = ngram_counts.count(
                split, self.order, self.classes, self.boundary_id, scratch, self.chunk_tokens, show
            )
            suffixes = ngram_counts.suffixes(grams, self.classes, scratch, self.chunk_tokens)
            if self.smoothing in ("add_k", "kneser_ney", "modified_kneser_ney"):
                ngram_counts.keep_starts(grams, self.classes, self.boundary_id)
            if self.smoothing in ("kneser_ney", "modified_kneser_ney"):
                first = split.window(0, min(self.order, split.tokens)) if self.boundary_id is None else np.zeros(0, int)
                ngram_counts.add_neighbours(grams, suffixes, first, self.classes, self.chunk_tokens)
            raw = []
            if self.smoothing == "modified_kneser_ney" and self.boundary_id is not None:
                raw = ngram_counts.sorted_last(split, self.order, self.classes, self.boundary_id, self.chunk_tokens)
            settings = []
            write_uniform(folder, self)
            for n, (gram, suffix) in enumerate(zip(grams, suffixes, strict=True), 1):
                estimate = self._estimate(gram.counts, raw[n - 1 : n])
                settings.append(estimate.keywords)
                self._write_order(folder, n, gram, suffix, estimate)
                show("smoothing", n, self.order)
        write_manifest(folder, self, [len(gram.keys) for gram in grams], settings)

    def open(self, folder: str | os.PathLike) -> Tables:
        """The tables by name, mapped from their files; raises UsageError where they are another model's or damaged."""
        folder = pathlib.Path(folder)
        if not (folder / MANIFEST).is_file():
            raise UsageError(f"{folder} holds no n-gram tables: it has no {MANIFEST}")
        saved = files.read_json(folder / MANIFEST)
        fitted = config.from_json(saved["model"])
        if config.digest(fitted) != config.digest(self):
            raise UsageError(f"{folder} was fitted with other settings: {config.diff(fitted, self)}")
        try:
            tables = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names(self.order)
            }
        except (OSError, ValueError) as error:
            raise UsageError(f"the tables in {folder} are damaged ({error}): fit the model again") from None
        if [len(tables[f"keys_{n}"]) for n in range(1, self.order + 1)] != saved["ngrams"]:
            raise UsageError(f"the tables in {folder} are not those of its {MANIFEST}: fit the model again")
        return tables

    def counts(self, tables: Tables) -> dict[int, int]:
        """How many n-grams of each order are stored."""
        return {n: len(tables[f"keys_{n}"]) for n in range(1, self.order + 1)}

    def score(self, tables: Tables, tokens_T: np.ndarray) -> np.ndarray:
        """ln p of each token given those before it, float64 [T].

        The first one comes after the start of a line where there is a boundary, else after nothing.
        """
        tokens_T = np.asarray(tokens_T)
        log_p_T = np.empty(len(tokens_T))
        for a, b in ngram_counts.spans(len(tokens_T), self.chunk_tokens):
            before = self._context(tokens_T[max(0, a - self.order + 1) : a], whole=a < self.order)
            log_p_T[a:b] = self._score(tables, np.concatenate([before, tokens_T[a:b]]))[len(before) :]
        return log_p_T

    def next_log_probs(self, tables: Tables, context_T: np.ndarray) -> np.ndarray:
        """ln p of every token after those of the context, float64 [V]; an empty one is the start."""
        kept = np.asarray(context_T, np.int64)[max(0, len(context_T) - self.order + 1) :]
        log_p_V = np.full(self.classes, tables["log_p_0"][0])
        walk = self._walk(tables, self._context(kept, whole=len(context_T) < self.order))
        for n, (contexts, _) in enumerate(walk, 1):
            if (context := contexts[-1]) < 0:
                continue
            keys = tables[f"keys_{n}"]
            a, b = keys.searchsorted((context * self.classes, (context + 1) * self.classes))
            log_p_V += tables[f"backoff_{n - 1}"][context]
            log_p_V[keys[a:b] - context * self.classes] = tables[f"log_p_{n}"][a:b]
        return log_p_V

    def _context(self, tokens: np.ndarray, whole: bool) -> np.ndarray:
        """With the boundary that the begin of a text stands for, where the tokens are all there are before."""
        start = [self.boundary_id] if whole and self.boundary_id is not None else []
        return np.concatenate([np.array(start, np.int64), tokens])

    def _score(self, tables: Tables, tokens_T: np.ndarray) -> np.ndarray:
        log_p_T = np.full(len(tokens_T), tables["log_p_0"][0])
        for n, (contexts, ranks) in enumerate(self._walk(tables, tokens_T), 1):
            backoff = tables[f"backoff_{n - 1}"][contexts[:-1].clip(min=0)]
            log_p_T += np.where(contexts[:-1] >= 0, backoff, 0.0)
            stored = ranks >= 0
            log_p_T[stored] = tables[f"log_p_{n}"][ranks[stored]]
        return log_p_T

    def _walk(self, tables: Tables, tokens_T: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each order: the ranks of the contexts before each token and after the last [T + 1], and of the n-grams
        that the tokens end [T]; -1 where one is not stored, or the text does not have it."""
        if len(tokens_T) and not 0 <= tokens_T.min() <= tokens_T.max() < self.classes:
            raise UsageError(f"tokens {tokens_T.min()} to {tokens_T.max()} are not all of the {self.classes} classes")
        contexts = np.zeros(len(tokens_T) + 1, np.int64)
        for n in range(1, self.order + 1):
            ranks = ngram_counts.lookup(tables[f"keys_{n}"], contexts[:-1] * self.classes + tokens_T)
            yield contexts, ranks
            contexts = np.concatenate([[-1], ranks])
            if n > 1:
                contexts[1:][tokens_T == self.boundary_id] = -1

    def _estimate(self, counts: np.ndarray, raw: list[tuple[int, int]]) -> functools.partial:
        """The smoothing of one order, with what it reads off all counts of that order; in the statistics of three
        discounts one n-gram has its number of occurrences in `raw` for its count there."""
        classes = self.classes + self.open_vocabulary
        match self.smoothing:
            case "maximum_likelihood":
                return functools.partial(estimates.maximum_likelihood)
            case "add_k":
                return functools.partial(estimates.add_mass, mass=(self.k or 1.0) * classes)
            case "katz":
                cutoff = self.cutoff or 5
                ratios = estimates.good_turing(self._counts_of_counts(counts, cutoff + 1), cutoff)
                return functools.partial(estimates.katz, ratios=ratios, classes=classes)
            case "kneser_ney":
                discounts = estimates.one_discount(self._counts_of_counts(counts, 2))
            case _:
                n = self._counts_of_counts(counts, 4)
                for count, occurrences in raw:
                    n[count : count + 1] -= 1
                    n[occurrences : occurrences + 1] += 1
                discounts = estimates.three_discounts(n)
        return functools.partial(estimates.kneser_ney, discounts=discounts)

    def _counts_of_counts(self, counts: np.ndarray, top: int) -> np.ndarray:
        """How many n-grams have each count from 0 to `top`."""
        parts = (np.minimum(counts[a:b], top + 1) for a, b in ngram_counts.spans(len(counts), self.chunk_tokens))
        return np.sum([np.bincount(part, minlength=top + 2) for part in parts], axis=0)[: top + 1]

    def _write_order(
        self, folder: pathlib.Path, n: int, gram: Grams, suffix: np.ndarray, estimate: Callable[..., estimates.Estimate]
    ) -> None:
        """The tables of one order, and the backoff of the contexts one order lower."""
        size = len(gram.keys)
        keys, log_p = new_table(folder, f"keys_{n}", size, np.int64), new_table(folder, f"log_p_{n}", size)
        if n < self.order:
            new_table(folder, f"backoff_{n}", size)
        lower_log_p, backoff = (
            np.load(folder / f"{name}_{n - 1}.npy", mmap_mode="r+") for name in ("log_p", "backoff")
        )
        a = 0
        while a < size:
            b = min(a + self.chunk_tokens, size)
            b = int(
                gram.keys.searchsorted((gram.keys[b - 1] // self.classes + 1) * self.classes)
            )  # A context is whole.
            keys[a:b] = gram.keys[a:b]
            contexts = keys[a:b] // self.classes
            starts_U = np.flatnonzero(np.diff(contexts, prepend=-1))
            p_G, weight_U = estimate(gram.counts[a:b], starts_U, np.exp(lower_log_p[suffix[a:b]]))
            with np.errstate(divide="ignore"):  # Maximum likelihood leaves nothing.
                log_p[a:b], backoff[contexts[starts_U]] = np.log(p_G), np.log(weight_U)
            a = b


def names(order: int) -> list[str]:
    """The tables of a model: there is no backoff from the highest order, and order 0 has one entry, without a key."""
    lower = [f"{kind}_{n}" for n in range(order) for kind in ("log_p", "backoff")]
    return [*lower, f"log_p_{order}", *(f"keys_{n}" for n in range(1, order + 1))]


def new_table(folder: pathlib.Path, name: str, size: int, dtype: Any = np.float64) -> np.ndarray:
    """A mapped file of zeros."""
    return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (size,))


def write_uniform(folder: pathlib.Path, model: NGram) -> None:
    """The tables of order 0."""
    new_table(folder, "log_p_0", 1)[:] = -np.log(model.classes + model.open_vocabulary)
    new_table(folder, "backoff_0", 1)


def write_manifest(folder: pathlib.Path, model: NGram, ngrams: list[int], settings: list[dict[str, Any]]) -> None:
    """What the tables are of; written last, so that a folder without it is not whole."""
    manifest = {"model": config.to_json(model), "ngrams": ngrams, "smoothing": settings}
    files.write_json(folder / MANIFEST, manifest)
