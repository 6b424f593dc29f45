"""N-gram tables to ARPA's text form and back, as KenLM's and SRILM's tools read and write it.

A piece with whitespace in it is written as its bytes, "<0x20>" for a space. The boundary is `<s>` and `</s>`; a text
without one has them too, since KenLM asks for them, both with SRILM's -99 for log 0.
"""

import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from lm.core.errors import UsageError
from lm.models import ngram, ngram_counts
from lm.models.ngram import NGram, Tables

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
ZERO = -99.0
_ENDS = (END, "<eos>")  # Pieces that are the boundary where a file is read with a vocabulary of its own.
_LINES = 1 << 16  # Formed at once.


def write(model: NGram, tables: Tables, pieces: Sequence[str], file: str | os.PathLike) -> None:
    """Writes the tables, where token i is `pieces[i]`; all classes are listed, those never seen with what they have.

    Raises UsageError for maximum likelihood, which has probabilities of zero, and for pieces that mean something else
    in this form.
    """
    if model.smoothing == "maximum_likelihood":
        raise UsageError("smoothing=maximum_likelihood has probabilities of zero, which an ARPA file cannot hold")
    words = _words(model, pieces)
    left, right = list(words), list(words)
    if model.boundary_id is not None:
        left[model.boundary_id], right[model.boundary_id] = START, END
    unigrams = list(_unigrams(model, tables, words))
    with open(file, "w", encoding="utf-8", newline="\n") as f:
        f.write(f"\\data\\\nngram 1={len(unigrams)}\n")
        f.writelines(f"ngram {n}={size}\n" for n, size in model.counts(tables).items() if n > 1)
        f.write("\n\\1-grams:\n")
        f.writelines(_line(log_p, word, backoff if model.order > 1 else None) for log_p, word, backoff in unigrams)
        for n in range(2, model.order + 1):
            f.write(f"\n\\{n}-grams:\n")
            for a, b in ngram_counts.spans(len(tables[f"keys_{n}"]), _LINES):
                tokens = _tokens(model, tables, n, a, b)
                log_p = tables[f"log_p_{n}"][a:b].tolist()
                backoff = tables[f"backoff_{n}"][a:b].tolist() if n < model.order else [None] * (b - a)
                for p, (first, *middle, last), weight in zip(log_p, tokens, backoff, strict=True):
                    f.write(_line(p, " ".join([left[first], *(words[i] for i in middle), right[last]]), weight))
        f.write("\n\\end\\\n")


def read(
    file: str | os.PathLike, folder: str | os.PathLike, pieces: Sequence[str] | None = None
) -> tuple[NGram, list[str]]:
    """The model, whose tables are written into an existing, empty folder, and the pieces that its tokens stand for.

    Without `pieces` they are the words of the file, in its order. With them `</s>` is the piece of that name or
    `<eos>`, and an `<unk>` that is not among them is the probability of a word outside the vocabulary.
    Raises UsageError for a file that is cut or whose n-grams do not fit together.
    """
    sections = _sections(file)
    log_p, unigrams, backoff = next(sections, ([], [], []))
    values = {words[0]: (p, weight) for p, words, weight in zip(log_p, unigrams, backoff, strict=True)}
    bounded = values.get(END, (ZERO, 0.0))[0] > ZERO
    if pieces is None:
        pieces = [word for word in values if word != START and (bounded or word != END)]
    ids = {_escaped(piece): i for i, piece in enumerate(pieces)}
    boundary_id = next((ids[end] for end in _ENDS if end in ids), None) if bounded else None
    if bounded and boundary_id is None:
        raise UsageError(f"{file} has an {END}, but none of the {len(pieces)} pieces is one of {', '.join(_ENDS)}")
    if boundary_id is not None:
        ids |= {START: boundary_id, END: boundary_id}
    outside = values[UNKNOWN][0] if UNKNOWN in values and UNKNOWN not in ids else None
    _check_words(file, values, ids, outside)
    folder, kinds = pathlib.Path(folder), len(pieces)
    listed = {ids[word]: value for word, value in values.items() if word in ids and word != START}
    if boundary_id is not None:
        listed[boundary_id] = (listed[boundary_id][0], values.get(START, (ZERO, 0.0))[1])
    keys = [np.array(sorted(listed), np.int64)]
    _write(folder, 1, keys[0], *np.array([listed[i] for i in keys[0].tolist()]).T)
    for n, (log_p, grams, backoff) in enumerate(sections, 2):
        try:
            tokens = np.array([[ids[word] for word in words] for words in grams], np.int64)
        except KeyError as error:
            raise UsageError(f"{file} has {error} in its {n}-grams and not in its 1-grams or the vocabulary") from None
        found = _keys(keys, tokens, kinds)
        if found.min() < 0:
            raise UsageError(f"{file} has the {n}-gram {' '.join(grams[int(found.argmin())])!r} without its begin")
        order = found.argsort()
        keys.append(found[order])
        _write(folder, n, keys[-1], np.array(log_p)[order], np.array(backoff)[order])
    top = len(keys)
    (folder / f"backoff_{top}.npy").unlink()
    model = NGram(
        order=top,
        smoothing="arpa",
        open_vocabulary=outside is not None,
        boundary_id=boundary_id,
        vocab_size=kinds,
    )
    # Each class is listed, or else has the probability of a word outside.
    ngram.new_table(folder, "log_p_0", 1)[:] = (ZERO if outside is None else outside) * np.log(10)
    ngram.new_table(folder, "backoff_0", 1)
    ngram.write_manifest(folder, model, [len(k) for k in keys], [{}] * top)
    return model, list(pieces)


def _words(model: NGram, pieces: Sequence[str]) -> list[str]:
    """The pieces as they are written."""
    words = [_escaped(piece) for piece in pieces[: model.classes]]
    if len(words) < model.classes or len(set(words)) < len(words):
        raise UsageError(f"{model.classes} classes need as many distinct pieces, not {len(set(words))}")
    for taken, meaning in ((START, "begins a line"), (END, "ends a line"), (UNKNOWN, "is any word outside")):
        own = words.index(taken) if taken in words else model.boundary_id
        if taken in words and (own != model.boundary_id if taken != UNKNOWN else model.open_vocabulary):
            raise UsageError(f"piece {own} is {taken!r}, which {meaning} in an ARPA file: give it another name")
    return words


def _unigrams(model: NGram, tables: Tables, words: list[str]) -> Iterator[tuple[float, str, float]]:
    outside = float(tables["log_p_0"][0] + tables["backoff_0"][0])
    log_p_V, backoff_V = np.full(model.classes, outside), np.zeros(model.classes)
    log_p_V[tables["keys_1"]] = tables["log_p_1"]
    if model.order > 1:
        backoff_V[tables["keys_1"]] = tables["backoff_1"]
    if model.open_vocabulary:
        yield outside, UNKNOWN, 0.0
    zero, bounds = ZERO * np.log(10), model.boundary_id
    yield zero, START, 0.0 if bounds is None else float(backoff_V[bounds])
    yield zero if bounds is None else float(log_p_V[bounds]), END, 0.0
    for i, (log_p, word, backoff) in enumerate(zip(log_p_V.tolist(), words, backoff_V.tolist(), strict=True)):
        if i != bounds:
            yield log_p, word, backoff


def _tokens(model: NGram, tables: Tables, n: int, a: int, b: int) -> list[list[int]]:
    """The tokens of the n-grams of those ranks."""
    ranks, columns = np.arange(a, b), []
    for m in range(n, 0, -1):
        ranks, last = np.divmod(tables[f"keys_{m}"][ranks], model.classes)
        columns.append(last)
    return np.stack(columns[::-1], 1).tolist()


def _line(log_p: float, words: str, backoff: float | None) -> str:
    # KenLM refuses the 1e-17 that rounding may leave.
    end = "\n" if backoff is None else f"\t{backoff / np.log(10):.9g}\n"
    return f"{min(0.0, log_p / np.log(10)):.9g}\t{words}{end}"


def _escaped(piece: str) -> str:
    if piece and not any(c.isspace() or c == "\0" for c in piece):
        return piece
    return "".join(f"<0x{byte:02X}>" for byte in piece.encode())


def _sections(file: str | os.PathLike) -> Iterator[tuple[list[float], list[list[str]], list[float]]]:
    """(log10 p, words, log10 backoff) of all n-grams of each order, in the order of the file."""
    sizes: dict[int, int] = {}
    with open(file, encoding="utf-8", newline="\n") as f:
        lines = (line.rstrip("\r\n") for line in f)
        for line in lines:
            if line.startswith("ngram "):
                order, total = line.removeprefix("ngram ").split("=")
                sizes[int(order)] = int(total)
            elif line == "\\1-grams:":
                break
        for n, size in sorted(sizes.items()):
            log_p: list[float] = []
            grams: list[list[str]] = []
            backoff: list[float] = []
            for line in lines:
                if not line or line.startswith("\\"):
                    if len(grams) == size:
                        break
                    continue
                p, words, *weight = line.split("\t")
                log_p.append(float(p))
                grams.append(words.split(" "))
                backoff.append(float(weight[0]) if weight else 0.0)
            if len(grams) != size or any(len(words) != n for words in grams):
                raise UsageError(f"{file} is damaged: it has {len(grams)} {n}-grams and not the {size} that it names")
            yield log_p, grams, backoff
    if not sizes:
        raise UsageError(f"{file} is no ARPA file: it names no numbers of n-grams")


def _check_words(file: str | os.PathLike, values: dict, ids: dict[str, int], outside: float | None) -> None:
    strange = [word for word in values if word not in ids and word not in (START, END, UNKNOWN)]
    missing = (
        [] if outside is not None else [word for word in ids if word not in values and word not in (*_ENDS, START)]
    )
    if strange or missing:
        problem = f"{strange[0]!r} is not in the vocabulary" if strange else f"{missing[0]!r} is not in the file"
        raise UsageError(f"{file} and the pieces do not belong together: {problem}")


def _keys(keys: list[np.ndarray], tokens: np.ndarray, classes: int) -> np.ndarray:
    """The keys of n-grams given as rows of tokens; negative where the first n - 1 are not among the n-grams before."""
    ranks = np.zeros(len(tokens), np.int64)
    for shorter, column in zip(keys, tokens.T, strict=False):
        ranks = ngram_counts.lookup(shorter, ranks * classes + column)
    return ranks * classes + tokens[:, -1]


def _write(folder: pathlib.Path, n: int, keys: np.ndarray, log_p: np.ndarray, backoff: np.ndarray) -> None:
    ngram.new_table(folder, f"keys_{n}", len(keys), np.int64)[:] = keys
    ngram.new_table(folder, f"log_p_{n}", len(keys))[:] = log_p * np.log(10)
    ngram.new_table(folder, f"backoff_{n}", len(keys))[:] = backoff * np.log(10)
