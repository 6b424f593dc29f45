"""Word similarity and analogies: what the angles between a model's word vectors say, beside people."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from lm.core import files
from lm.core.errors import UsageError, check_choice
from lm.data.words import is_word
from lm.objectives import subwords

_SYNTACTIC = "gram"  # How the syntactic sections of Google's questions begin; the others are semantic.
_AT_ONCE = 512  # Words composed, or questions scored.


class Vectors:
    """The unit vectors of a vocabulary's words, and with n-grams of any others; capitals make no difference.

    Of words that differ in capitals alone the first stands for all: the most frequent, in a vocabulary of kind word.
    """

    def __init__(self, model: Any, params: Any, pieces: Sequence[str], ngrams: tuple[int, int] | None):
        self._model, self._params, self._pieces, self._ngrams = model, params, pieces, ngrams
        ids: dict[str, int] = {}
        for i in np.flatnonzero(is_word(pieces)).tolist():
            ids.setdefault(pieces[i].lower(), i)
        self.places = {word: place for place, word in enumerate(ids)}
        self.table = self._unit(list(ids.values()), [pieces[i] for i in ids.values()])

    def find(self, words: Iterable[str]) -> dict[str, np.ndarray]:
        """{word: its unit vector [D]} of those that have one."""
        words = {word.lower() for word in words}
        known = {word: self.table[self.places[word]] for word in words if word in self.places}
        others = sorted(words - known.keys())
        if not self._ngrams or not others:
            return known
        return known | dict(zip(others, self._unit([-1] * len(others), others), strict=True))

    def _unit(self, ids: Sequence[int], words: Sequence[str]) -> np.ndarray:
        parts = [self._compose(ids[i : i + _AT_ONCE], words[i : i + _AT_ONCE]) for i in range(0, len(ids), _AT_ONCE)]
        table = np.concatenate(parts)
        return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), np.finfo(np.float32).tiny)

    def _compose(self, ids: Sequence[int], words: Sequence[str]) -> np.ndarray:
        batch = {"tokens_BL": np.array([ids], np.int32)}
        if self._ngrams:
            found = [subwords.hashes(word, *self._ngrams) for word in words]
            owners = np.repeat(np.arange(len(words), dtype=np.int32), list(map(len, found)))
            batch |= {"ngrams_BG": np.concatenate(found)[None], "owners_BG": owners[None]}
        return np.asarray(self._model.apply(self._params, batch).hidden_BLD[0], np.float32)


def suite(name: str, vectors: Vectors) -> dict[str, float]:
    """The figures of "similarity:FILE" or "analogies:FILE"."""
    kind, _, path = name.partition(":")
    check_choice("suite", kind, ("similarity", "analogies"))
    if not path or not files.path(path).exists():
        raise UsageError(f"suite {name!r}: there is no file {path!r}; the form is {kind}:FILE")
    lines = files.path(path).read_text().splitlines()
    return {"similarity": similarity, "analogies": analogies}[kind](lines, vectors, os.path.basename(path))


def similarity(lines: Iterable[str], vectors: Vectors, name: str = "the file") -> dict[str, float]:
    """{"spearman": the rank correlation of cosines with people's scores over pairs of known words, "known", "pairs"}.

    A line is word, word and score, parted by tabs.
    """
    rows = [tuple(line.split("\t")) for line in lines if line.strip()]
    if any(len(row) != 3 for row in rows):
        raise UsageError(f"{name}: a line of word similarity is word, word and score, parted by tabs")
    found = vectors.find(word for row in rows for word in row[:2])
    pairs = [(found[a.lower()], found[b.lower()], float(s)) for a, b, s in rows if {a.lower(), b.lower()} <= {*found}]
    if len(pairs) < 2:
        raise UsageError(f"{name}: {len(pairs)} of {len(rows)} pairs have known words, too few to rank")
    cosines = [float(a @ b) for a, b, _ in pairs]
    spearman = stats.spearmanr(cosines, [score for _, _, score in pairs]).statistic
    return {"spearman": float(spearman), "known": len(pairs), "pairs": len(rows)}


def analogies(lines: Iterable[str], vectors: Vectors, name: str = "the file") -> dict[str, float]:
    """{section: share right, section + "_right", section + "_known": of how many}, and of semantic, syntactic and all.

    "skipped" counts the questions with a word outside the vocabulary. The answer to a : b = c : ? is the word nearest
    in angle to b - a + c (3CosAdd; Mikolov et al. 2013, 1301.3781, section 4.1) but for these three.
    """
    sections: dict[str, list[list[str]]] = {}
    for line in lines:
        if line.startswith(":"):
            section = sections.setdefault(line[1:].strip(), [])
        elif line.strip():
            if not sections or len(line.split()) != 4:
                raise UsageError(f"{name}: analogies are lines of four words in sections headed ': name'")
            section.append(line.lower().split())
    known = {title: [q for q in rows if {*q} <= vectors.places.keys()] for title, rows in sections.items()}
    right = {title: _right(rows, vectors) for title, rows in known.items()}
    syntactic = [title for title in sections if title.startswith(_SYNTACTIC)]
    semantic = [title for title in sections if title not in syntactic]
    groups = {title: [title] for title in sections}
    groups |= {"semantic": semantic, "syntactic": syntactic, "all": list(sections)}
    figures: dict[str, float] = {}
    for group, titles in groups.items():
        count, of = sum(right[title] for title in titles), sum(len(known[title]) for title in titles)
        figures |= {group: count / of if of else 0.0, f"{group}_right": count, f"{group}_known": of}
    return figures | {"skipped": sum(map(len, sections.values())) - sum(map(len, known.values()))}


def _right(questions: Sequence[Sequence[str]], vectors: Vectors) -> int:
    """How many are answered right."""
    count = 0
    for start in range(0, len(questions), _AT_ONCE):
        rows = np.array([[vectors.places[w] for w in q] for q in questions[start : start + _AT_ONCE]])
        a, b, c = (vectors.table[rows[:, i]] for i in range(3))
        scores = (b - a + c) @ vectors.table.T
        np.put_along_axis(scores, rows[:, :3], -np.inf, 1)
        count += int((scores.argmax(1) == rows[:, 3]).sum())
    return count
