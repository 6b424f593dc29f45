"""N-gram models against dictionaries written from the equations, nltk, and what the papers report."""

import collections
import dataclasses
import functools
import gzip
import math

import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.data.tokenizers import Word
from lm.models import ngram_counts, smoothing
from lm.models.ngram import NGram
from lm.models.ngram_cache import Cached

V, BOUNDARY = 7, 0
SMOOTHINGS = ("modified_kneser_ney", "kneser_ney", "katz", "add_k", "maximum_likelihood")


class Text:
    """A split of given tokens."""

    def __init__(self, tokens):
        self.ids, self.tokens = np.asarray(tokens, np.int32), len(tokens)

    def window(self, start, length):
        return self.ids[start : start + length]


def text(size, seed=0, classes=V - 1):
    """Skewed tokens, the last class never; the second half leans on the first, so that long n-grams come back."""
    rng = np.random.default_rng(seed)
    half = np.minimum(rng.geometric(0.35, size // 2) - 1, classes - 1)
    noise = np.where(rng.random(size // 2) < 0.3, rng.integers(0, classes, size // 2), half)
    return np.concatenate([half, noise])


def fitted(model, tokens, folder):
    folder.mkdir()
    model.fit(Text(tokens), folder)
    return model.open(folder)


class Dictionary:
    """The same models, one word at a time: contexts are tuples, "<s>" is -1."""

    def __init__(self, model, tokens):
        self.model, self.uniform = model, 1 / (model.classes + model.open_vocabulary)
        self.grams = [collections.Counter() for _ in range(model.order + 1)]
        for words in self.lines(tokens):
            for i in range(1, len(words)):
                for n in range(1, min(model.order, i + (words[0] == -1)) + 1):
                    self.grams[n][words[i - n + 1 : i + 1]] += 1
        kneser_ney = "kneser_ney" in model.smoothing
        for n in range(1, model.order if kneser_ney else 0):
            left = collections.Counter(gram[1:] for gram in self.grams[n + 1])
            if model.boundary_id is None:
                left[tuple(tokens[:n])] += 1
            raw = self.grams[n]
            self.grams[n] = collections.Counter({g: raw[g] if g[0] == -1 else left[g] for g in raw})
        self.counts_of_counts = [collections.Counter(grams.values()) for grams in self.grams]

    def lines(self, tokens):
        tokens = tuple(int(i) for i in tokens)
        if self.model.boundary_id is None:
            yield (None, *tokens)
            return
        line = (-1,)
        for token in tokens:
            line += (token,)
            if token == self.model.boundary_id:
                yield line
                line = (-1,)
        yield line

    def p(self, context, word):
        """p(word | context), a context of at most order - 1 words."""
        known = len(context) == self.model.order - 1 or context[:1] == (-1,)
        if self.model.smoothing == "add_k" and not (known and self.followers(context)):
            return self.uniform
        if context and not self.followers(context):
            return self.p(context[1:], word)
        n, seen = len(context) + 1, self.followers(context)
        total, count = sum(seen.values()), seen.get(word, 0)
        lower = functools.partial(self.p, context[1:]) if context else lambda _: self.uniform
        match self.model.smoothing:
            case "maximum_likelihood":
                return count / total
            case "add_k":
                k = self.model.k or 1
                return (count + k) / (total + k / self.uniform)
            case "katz":
                kept = {w: c * self.ratio(n, c) for w, c in seen.items()}
                if len(seen) == 1 / self.uniform:
                    return count / total
                if sum(kept.values()) == total:
                    total += 1
                if word in kept:
                    return kept[word] / total
                return (1 - sum(kept.values()) / total) * lower(word) / (1 - sum(lower(w) for w in seen))
        lost = {w: self.discount(n, c) for w, c in seen.items()}
        return (count - lost.get(word, 0)) / total + sum(lost.values()) / total * lower(word)

    def followers(self, context):
        return self.tree[len(context) + 1].get(context, {})

    @functools.cached_property
    def tree(self):
        found = [collections.defaultdict(dict) for _ in range(self.model.order + 1)]
        for n, grams in enumerate(self.grams):
            for gram, count in grams.items():
                found[n][gram[:-1]][gram[-1]] = count
        return found

    def discount(self, n, count):
        m = self.counts_of_counts[n]
        y = m[1] / (m[1] + 2 * m[2])
        if self.model.smoothing == "kneser_ney":
            return y
        found = [r - (r + 1) * y * m[r + 1] / m[r] for r in (1, 2, 3)]
        usual = all(0 < d <= r for r, d in enumerate(found, 1))
        return (found if usual else (0.5, 1, 1.5))[min(count, 3) - 1]

    def ratio(self, n, count):
        m, k = self.counts_of_counts[n], self.model.cutoff
        if count > k:
            return 1
        above = (k + 1) * m[k + 1] / m[1]
        ratio = ((count + 1) * m[count + 1] / (count * m[count]) - above) / (1 - above)
        return ratio if 0 < ratio < 1 else 1  # Of cutoff 1 there is no smaller one.

    def score(self, tokens):
        for words in self.lines(tokens):
            for i in range(1, len(words)):
                yield self.p(tuple(w for w in words[max(0, i - self.model.order + 1) : i] if w is not None), words[i])


@pytest.mark.parametrize("boundary_id", [None, BOUNDARY])
@pytest.mark.parametrize(
    "settings",
    [
        {"order": 3},
        {"order": 3, "open_vocabulary": True},
        {"order": 3, "smoothing": "kneser_ney"},
        {"order": 2, "smoothing": "katz", "cutoff": 1},
        {"order": 3, "smoothing": "add_k", "k": 0.3},
        {"order": 2, "smoothing": "add_k", "open_vocabulary": True},
        {"order": 3, "smoothing": "maximum_likelihood"},
        {"order": 1, "smoothing": "maximum_likelihood"},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_scores_are_those_of_the_equations(settings, boundary_id, tmp_path):
    # 300 types give counts of counts that all discounts can be computed from.
    model = NGram(**settings, vocab_size=300, boundary_id=boundary_id)
    rng = np.random.default_rng(3)
    train, held_out = ((rng.zipf(1.3, size) - 1) % 299 for size in (900, 100))
    tables = fitted(model, train, tmp_path / "tables")
    slow = Dictionary(model, train)
    with np.errstate(divide="ignore"):
        want = np.log(list(slow.score(held_out)))
    np.testing.assert_allclose(model.score(tables, held_out), want, rtol=1e-9)


@pytest.mark.parametrize("boundary_id", [None, BOUNDARY])
@pytest.mark.parametrize("name", SMOOTHINGS)
@pytest.mark.parametrize("size", [12, 400])
def test_every_distribution_sums_to_one_and_agrees_with_the_score(name, size, boundary_id, tmp_path):
    """Also of 12 tokens, from which no discount can be computed."""
    model = NGram(order=4, smoothing=name, vocab_size=V + 2, valid_vocab_size=V, boundary_id=boundary_id)
    tables = fitted(model, [*text(size), 1, 2, 3, 0], tmp_path / "tables")
    held_out = np.random.default_rng(1).integers(0, V, 60)
    scores = model.score(tables, held_out)
    for i in range(len(held_out)):
        log_p_V = model.next_log_probs(tables, held_out[:i])
        assert np.exp(log_p_V).sum() == pytest.approx(1, abs=1e-12) and len(log_p_V) == V
        np.testing.assert_allclose(log_p_V[held_out[i]], scores[i], rtol=1e-12)
        assert name == "maximum_likelihood" or np.isfinite(log_p_V).all()


def test_an_open_vocabulary_leaves_one_class_of_probability(tmp_path):
    model = NGram(order=2, vocab_size=V, open_vocabulary=True)
    tables = fitted(model, text(400), tmp_path / "tables")
    p_V = np.exp(model.next_log_probs(tables, [1]))
    # The last class was not seen either, and has as much as the one outside.
    assert p_V.sum() + p_V[-1] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("boundary_id", [None, BOUNDARY])
@pytest.mark.parametrize("name", SMOOTHINGS)
def test_chunks_change_nothing(name, boundary_id, tmp_path):
    model = NGram(order=4, smoothing=name, vocab_size=V, boundary_id=boundary_id)
    tables = fitted(model, text(300), tmp_path / "whole")
    chunked = dataclasses.replace(model, chunk_tokens=7)
    pieces = fitted(chunked, text(300), tmp_path / "chunks")
    for table in tables:
        np.testing.assert_array_equal(pieces[table], tables[table])
    assert not [path for path in (tmp_path / "chunks").iterdir() if path.suffix not in (".npy", ".json")]
    held_out = text(100, seed=5)
    np.testing.assert_array_equal(chunked.score(pieces, held_out), model.score(tables, held_out))


def test_keys_outgrow_32_bits(tmp_path):
    model = NGram(order=3, vocab_size=100_000)
    tokens = np.arange(50_000)[::-1]
    tables = fitted(model, tokens, tmp_path / "tables")
    assert tables["keys_3"].max() > 2**32 and model.counts(tables) == {1: 50_000, 2: 49_999, 3: 49_998}
    assert np.exp(model.next_log_probs(tables, tokens[:2])).sum() == pytest.approx(1, abs=1e-9)


def test_add_k_and_maximum_likelihood_are_nltks(tmp_path):
    nltk_lm = pytest.importorskip("nltk.lm")
    train, held_out = text(300), text(60, seed=4)
    sentences = [[str(i) for i in train]]
    vocabulary = nltk_lm.Vocabulary([str(i) for i in range(V - 1)])  # And <UNK>, the class that never occurs.
    for model, theirs in (
        (NGram(order=3, smoothing="add_k", k=0.5, vocab_size=V), nltk_lm.Lidstone(0.5, 3, vocabulary=vocabulary)),
        (NGram(order=3, smoothing="maximum_likelihood", vocab_size=V), nltk_lm.MLE(3, vocabulary=vocabulary)),
    ):
        theirs.fit([list(everygrams(sentences[0], 3))])
        tables = fitted(model, train, tmp_path / model.smoothing)
        for i in range(2, len(held_out)):
            context, word = held_out[i - 2 : i], held_out[i]
            if model.smoothing == "add_k" or theirs.context_counts(tuple(str(c) for c in context)):
                want = theirs.score(str(word), [str(c) for c in context])
                assert np.exp(model.next_log_probs(tables, context)[word]) == pytest.approx(want, rel=1e-12)


def everygrams(words, order):
    return (tuple(words[i : i + n]) for n in range(1, order + 1) for i in range(len(words) - n + 1))


def test_discounts_are_those_of_the_equations_or_lmplzs_fallback():
    first, second, third = smoothing.three_discounts(np.array([0, 100, 40, 20, 12]))
    y = 100 / 180
    assert (first, second, third) == pytest.approx((1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.6))
    assert smoothing.three_discounts(np.array([0, 100, 40, 0, 12])) == (0.5, 1.0, 1.5)
    assert smoothing.three_discounts(np.array([0, 10, 40, 500, 12])) == (0.5, 1.0, 1.5)
    assert smoothing.one_discount(np.array([0, 100, 40])) == pytest.approx((y, y, y))
    assert smoothing.one_discount(np.array([0, 0, 40])) == (0.5,) * 3


@pytest.mark.parametrize("seed", range(6))
def test_the_ngram_that_is_sorted_last_is_that_of_a_sort(seed):
    tokens = np.append(np.random.default_rng(seed).integers(0, V, 60), BOUNDARY)
    first = {BOUNDARY: -1} | {int(w): np.flatnonzero(tokens == w)[0] for w in set(tokens[tokens != BOUNDARY])}
    lines = np.split(tokens, np.flatnonzero(tokens == BOUNDARY) + 1)
    grams = [(0, 0, 0, *line)[i : i + 4] for line in lines for i in range(len(line))]
    *_, last = max(([first[w] for w in gram[::-1]], gram) for gram in grams)
    expected = []
    for n in range(1, 4):
        same = [gram for gram in grams if gram[-n:] == last[-n:]]
        if BOUNDARY not in last[-n:]:
            expected.append((len({gram[-n - 1] for gram in same}), len(same)))
    assert ngram_counts.sorted_last(Text(tokens), 4, V, BOUNDARY, chunk_tokens=7) == expected


def test_good_turing_takes_the_largest_cutoff_that_works():
    n = np.array([0, 1000, 300, 120, 70, 50, 30])
    ratios = smoothing.good_turing(n, 5)
    assert len(ratios) == 7 and ratios[-1] == 1
    # Katz's constraint: the discounted singles and others together give n1 words' counts away.
    assert sum(n[r] * (1 - ratios[r]) * r for r in range(1, 6)) == pytest.approx(n[1])
    assert len(smoothing.good_turing(np.array([0, 1000, 300, 120, 0, 50, 30]), 5)) == 4
    assert smoothing.good_turing(np.array([0, 0, 3, 2, 1, 1, 1]), 5) == (1.0, 1.0)


def test_a_cache_is_a_count_of_the_last_tokens(tmp_path):
    model = Cached(NGram(order=2, vocab_size=V, boundary_id=BOUNDARY, chunk_tokens=17), tokens=5, weight=0.3)
    tables = fitted(model, text(200), tmp_path / "tables")
    tokens = text(80, seed=2)
    plain, scores = model.base.score(tables, tokens), model.score(tables, tokens)
    assert scores[0] == pytest.approx(plain[0])
    for i in range(1, len(tokens)):
        recent = tokens[max(0, i - 5) : i]
        want = math.log(0.7 * math.exp(plain[i]) + 0.3 * np.mean(recent == tokens[i]))
        assert scores[i] == pytest.approx(want, rel=1e-12)
        log_p_V = model.next_log_probs(tables, tokens[:i])
        assert log_p_V[tokens[i]] == pytest.approx(want, rel=1e-12)
        assert np.exp(log_p_V).sum() == pytest.approx(1, abs=1e-12)
    assert model.next_log_probs(tables, []) == pytest.approx(model.base.next_log_probs(tables, []))


def test_settings_and_texts_that_cannot_be_are_refused(tmp_path):
    for settings, message in (
        ({"order": 0}, "order=0"),
        ({"smoothing": "kneser"}, "did you mean"),
        ({"k": 0.5}, "no effect"),
        ({"cutoff": 3, "smoothing": "add_k"}, "no effect"),
        ({"smoothing": "maximum_likelihood", "open_vocabulary": True}, "no effect"),
        ({"boundary_id": 9, "vocab_size": 9}, "boundary_id=9"),
    ):
        with pytest.raises(UsageError, match=message):
            NGram(**settings)
    with pytest.raises(UsageError, match="weight"):
        Cached(NGram(), weight=1)
    model = NGram(order=3, vocab_size=V, boundary_id=BOUNDARY)
    for tokens, message in (([1, 2, 9], "token 9"), ([1, 2, 3], "boundary_id=0"), ([0, 0], "order=3")):
        with pytest.raises(UsageError, match=message):
            model.fit(Text(tokens), tmp_path)
    with pytest.raises(UsageError, match="vocab_size"):
        NGram().fit(Text([1]), tmp_path)


def test_tables_of_another_model_and_damaged_ones_are_refused(tmp_path):
    model = NGram(order=2, vocab_size=V)
    tables = fitted(model, text(100), tmp_path / "tables")
    with pytest.raises(UsageError, match="not all of the 7 classes"):
        model.score(tables, [V])
    with pytest.raises(UsageError, match="order"):
        NGram(order=3, vocab_size=V).open(tmp_path / "tables")
    with pytest.raises(UsageError, match=r"no ngram\.json"):
        model.open(tmp_path)
    file = tmp_path / "tables" / "keys_2.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UsageError, match="damaged"):
        model.open(tmp_path / "tables")


def test_penn_treebank_has_the_published_perplexity(shared_data, tmp_path):
    """141.2 at order 5 (Mikolov 2012, table 4.1), and 126.6 with a cache of 200 words, 125.7 by the paper."""
    train = gzip.open(shared_data / "ptb" / "ptb.train.txt.gz", "rt").read()
    words = list(dict.fromkeys(train.split()))
    tokenizer = Word(["<eos>", *words])
    test = tokenizer.encode((shared_data / "ptb" / "ptb.test.txt").read_text())
    model = NGram(order=5, vocab_size=10_000, boundary_id=0)
    tables = fitted(model, tokenizer.encode(train), tmp_path / "tables")
    assert len(test) == 82_430
    assert np.exp(-model.score(tables, test).mean()) == pytest.approx(141.19, abs=0.01)
    assert np.exp(-Cached(model).score(tables, test).mean()) == pytest.approx(126.77, abs=0.01)
