"""ARPA files: there and back, and KenLM's own tools on both sides."""

import shutil
import subprocess

import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.models import arpa
from lm.models.ngram import NGram

V = 12
PIECES = ["<eos>", "the", "a", "b c", "\n", "\u3000", "e", "f", "<unk>", "", "g", "never"]


class Text:
    """A split of given tokens."""

    def __init__(self, tokens):
        self.ids, self.tokens = np.asarray(tokens, np.int32), len(tokens)

    def window(self, start, length):
        return self.ids[start : start + length]


def text(size, seed):
    return (np.random.default_rng(seed).zipf(1.4, size) - 1) % (V - 1)


def fitted(model, tokens, folder):
    folder.mkdir()
    model.fit(Text(tokens), folder)
    return model.open(folder)


@pytest.mark.parametrize("boundary_id", [None, 0])
@pytest.mark.parametrize("smoothing", ["modified_kneser_ney", "kneser_ney", "katz", "add_k"])
@pytest.mark.parametrize("order", [1, 4])
def test_a_model_comes_back(smoothing, boundary_id, order, tmp_path):
    if order == 1 and boundary_id is None:
        boundary_id = 3
    model = NGram(order=order, smoothing=smoothing, vocab_size=V, boundary_id=boundary_id)
    tables, tokens = fitted(model, text(500, 0), tmp_path / "tables"), text(200, 1)
    names = PIECES if boundary_id in (None, 0) else ["x", *PIECES[1:3], "</s>", *PIECES[4:]]
    arpa.write(model, tables, names, tmp_path / "model.arpa")
    (tmp_path / "read").mkdir()
    back, pieces = arpa.read(tmp_path / "model.arpa", tmp_path / "read", names)
    assert (back.order, back.boundary_id, back.classes, pieces) == (order, boundary_id, V, names)
    # The file has nine digits of each number.
    scores = back.score(back.open(tmp_path / "read"), tokens)
    np.testing.assert_allclose(scores, model.score(tables, tokens), rtol=1e-7)


def test_a_file_brings_its_vocabulary(tmp_path):
    model = NGram(order=3, vocab_size=V, boundary_id=0, open_vocabulary=True)
    tables, tokens = fitted(model, text(500, 0), tmp_path / "tables"), text(200, 1)
    names = ["</s>" if piece == "<eos>" else "unknown" if piece == "<unk>" else piece for piece in PIECES]
    arpa.write(model, tables, names, tmp_path / "model.arpa")
    (tmp_path / "read").mkdir()
    back, pieces = arpa.read(tmp_path / "model.arpa", tmp_path / "read")
    assert back.classes == V + 1 and not back.open_vocabulary and pieces[0] == "<unk>"
    ids = np.array([pieces.index(arpa._escaped(name)) for name in names])
    read = back.open(tmp_path / "read")
    np.testing.assert_allclose(back.score(read, ids[tokens]), model.score(tables, tokens), rtol=1e-7)
    assert np.exp(back.next_log_probs(read, ids[tokens])).sum() == pytest.approx(1, abs=1e-7)


def test_what_the_form_cannot_say_is_refused(tmp_path):
    model = NGram(order=2, smoothing="maximum_likelihood", vocab_size=V)
    with pytest.raises(UsageError, match="maximum_likelihood"):
        arpa.write(model, fitted(model, text(100, 0), tmp_path / "ml"), PIECES, tmp_path / "f")
    model = NGram(order=2, vocab_size=V, boundary_id=0)
    tables = fitted(model, text(200, 0), tmp_path / "kn")
    for i, name, message in ((5, "<s>", "begins a line"), (5, "</s>", "ends a line"), (5, "the", "distinct")):
        with pytest.raises(UsageError, match=message):
            arpa.write(model, tables, [*PIECES[:i], name, *PIECES[i + 1 :]], tmp_path / "f")
    arpa.write(model, tables, PIECES, tmp_path / "f")
    cut = (tmp_path / "f").read_text().splitlines(keepends=True)
    (tmp_path / "cut").write_text("".join(cut[:-5]))
    for file, pieces, message in (
        ("cut", PIECES, "damaged"),
        ("f", [*PIECES[:-1], "other"], "do not belong"),
        ("f", ["x", *PIECES[1:]], "none of the 12 pieces"),
    ):
        with pytest.raises(UsageError, match=message):
            arpa.read(tmp_path / file, tmp_path / "kn", pieces)
    with pytest.raises(UsageError, match="cannot be counted"):
        NGram(smoothing="arpa", vocab_size=V).fit(Text([1]), tmp_path)


@pytest.mark.skipif(not (shutil.which("lmplz") and shutil.which("query")), reason="KenLM's tools are not on the PATH")
def test_kenlm_counts_and_scores_the_same(tmp_path):
    """lmplz's model is ours, query scores our file as we do, and we score lmplz's file as query does."""
    classes = 400
    train, held_out = ((np.random.default_rng(seed).zipf(1.3, 4000) - 1) % (classes - 1) for seed in (0, 1))
    # The last new word comes again: lmplz estimates discounts from its occurrences, not from the words before it.
    last = [0, 1, classes - 1, 2, 0, 1, classes - 1, 0, 1, classes - 1, 2, 0]
    train, held_out = np.append(train, last), np.append(held_out[np.isin(held_out, train)], 0)
    pieces = ["</s>", *(f"w{i}" for i in range(1, classes))]
    words = [[pieces[i] if i else "\n" for i in tokens] for tokens in (train, held_out)]
    train_text, held_out_text = (" ".join(text).encode() for text in words)
    # lmplz has only the words that it saw, and its own <unk>.
    seen = np.unique(train)
    model = NGram(order=4, vocab_size=len(seen), boundary_id=0, open_vocabulary=True)
    tables = fitted(model, seen.searchsorted(train), tmp_path / "tables")
    ours = sentences(model.score(tables, seen.searchsorted(held_out)), held_out)
    subprocess.run(
        ["lmplz", "-o", "4", "-S", "100M", "--discount_fallback", "--arpa", tmp_path / "ken.arpa"],
        input=train_text,
        check=True,
        capture_output=True,
    )
    arpa.write(model, tables, [pieces[i] for i in seen], tmp_path / "ours.arpa")
    (tmp_path / "read").mkdir()
    back, names = arpa.read(tmp_path / "ken.arpa", tmp_path / "read")
    ids = np.array([names.index(pieces[i]) for i in held_out])
    theirs = sentences(back.score(back.open(tmp_path / "read"), ids), held_out)
    for file, scores in (("ken.arpa", ours), ("ours.arpa", ours), ("ken.arpa", theirs)):
        # float32 throughout on their side.
        np.testing.assert_allclose(scores, query(tmp_path / file, held_out_text), atol=1e-4)


def sentences(scores, tokens):
    """log10 p of each line."""
    ends = np.flatnonzero(tokens == 0)
    return np.add.reduceat(scores, np.append(0, ends[:-1] + 1)) / np.log(10)


def query(file, text):
    run = subprocess.run(["query", "-v", "sentence", file], input=text, check=True, capture_output=True)
    return [float(line.split()[1]) for line in run.stdout.decode().splitlines() if line.startswith("Total:")]
