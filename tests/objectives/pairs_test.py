import jax
import numpy as np
import pytest

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.data import corpus
from lm.data.stream import Stream
from lm.models.encoder import Encoder
from lm.objectives.mlm import MaskedLM
from lm.objectives.pairs import Pairs

LENGTHS = [40, 25, 70, 3, 55, 100, 1, 33] * 6
ROW = 48


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Documents of distinct words w000000, w000001, ... in order, so that an id tells its place."""
    folder, start, lines = tmp_path_factory.mktemp("pairs"), 0, []
    for count in LENGTHS:
        lines.append(" ".join(f"w{i:06d}" for i in range(start, start + count)))
        start += count
    (folder / "text.txt").write_text("\n".join(lines))
    return corpus.build(f"lines:{folder}/text.txt", "word", folder / "corpus", shard_tokens=97)


def special(opened):
    """The ids of [MASK], [CLS], [SEP], after the tokenizer's."""
    return tuple(opened.vocab_size + i for i in range(3))


def examples(opened, count, **settings):
    """[(batch row, A's ids, B's ids)] of a stream of pairs."""
    objective = Pairs(**{"mlm": None} | settings, ids=special(opened), vocab_size=opened.vocab_size)
    rows = Stream(opened.split("train"), objective, ROW, seed=1)
    sep, found = special(opened)[2], []
    for row in rows.examples_at(np.arange(count), np.arange(count)):
        a, b = np.flatnonzero(row["tokens_BL"] == sep)
        found.append((row, row["tokens_BL"][1:a], row["tokens_BL"][a + 1 : b]))
    return found


def document_of(opened, token):
    """The number of the document that holds a word; ids go by the alphabet after <eos>."""
    return int(np.searchsorted(np.cumsum(LENGTHS), token - 1, "right"))


def test_a_row_is_two_marked_segments_and_padding(opened):
    _, cls, sep = special(opened)
    for row, a, b in examples(opened, 50):
        real = len(a) + len(b) + 3
        expected = [cls, *a, sep, *b, sep] + [0] * (ROW - real)
        np.testing.assert_array_equal(row["tokens_BL"], expected)
        np.testing.assert_array_equal(row["types_BL"], [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * (ROW - real))
        np.testing.assert_array_equal(row["documents_BL"], [0] * real + [-1] * (ROW - real))
        assert len(a) and len(b) and row["weights_B"] == 1


@pytest.mark.parametrize("kind", ["nsp", "sop"])
def test_half_of_the_pairs_are_changed(opened, kind):
    changed = sum(int(row["pairs_B"]) for row, _, _ in examples(opened, 2000, kind=kind))
    assert abs(changed - 1000) < 4 * np.sqrt(2000 / 4)  # The normal bound of a fair coin: 1 in 16,000.


def test_b_goes_on_in_class_0_and_is_from_another_document_in_class_1(opened):
    for row, a, b in examples(opened, 400):
        assert (np.diff(a) == 1).all() and (np.diff(b) == 1).all()
        documents = [document_of(opened, t) for t in (a[0], a[-1], b[0], b[-1])]
        assert documents[0] == documents[1] and documents[2] == documents[3]
        if row["pairs_B"]:
            assert documents[0] != documents[2]
        else:
            assert b[0] == a[-1] + 1 and documents[0] == documents[2]


def test_segments_change_places_in_class_1_of_sentence_order(opened):
    for row, a, b in examples(opened, 200, kind="sop"):
        first, second = (b, a) if row["pairs_B"] else (a, b)
        assert second[0] == first[-1] + 1 and document_of(opened, first[0]) == document_of(opened, second[-1])


def test_neither_the_end_of_documents_nor_length_tells_the_class(opened):
    found, eos = examples(opened, 2000), opened.split("train").eos_id
    assert not any((eos in a) or (eos in b) for _, a, b in found)
    ends = np.cumsum(LENGTHS)
    for measure in (lambda a, b: len(a) + len(b), lambda a, b: b[-1] in ends):
        means = [np.mean([measure(a, b) for row, a, b in found if row["pairs_B"] == c]) for c in (0, 1)]
        spread = np.std([measure(a, b) for _, a, b in found])
        # A third of these documents are shorter than a segment: a few replacements have to be shorter too.
        assert abs(means[0] - means[1]) < 0.2 * spread


def test_examples_depend_on_their_index_alone(opened):
    once, again = examples(opened, 20, mlm=MaskedLM()), examples(opened, 20, mlm=MaskedLM())
    for (row, _, _), (same, _, _) in zip(once, again, strict=True):
        assert all(np.array_equal(row[k], same[k]) for k in row)


def test_hidden_tokens_are_of_the_two_segments_alone(opened):
    objective = Pairs(mlm=MaskedLM(unit="word", max_ngram=3), ids=special(opened), vocab_size=opened.vocab_size)
    plain = Pairs(mlm=None, ids=special(opened), vocab_size=opened.vocab_size)
    for i in range(100):
        row = Stream(opened.split("train"), objective, ROW).rows(i, 1)
        picks = row["picks_BP"][row["weights_BP"] > 0]
        real = int((row["documents_BL"] == 0).sum())
        assert len(picks) == max(1, round(0.15 * (real - 3))) and row["picks_BP"].shape == (1, round(0.15 * 45))
        assert (row["targets_BP"][0, : len(picks)] < opened.vocab_size).all() and picks.max() < real
        # The draws of segments come before those of masks: the pair is the same without masks.
        whole = Stream(opened.split("train"), plain, ROW).rows(i, 1)["tokens_BL"][0]
        np.testing.assert_array_equal(whole[picks], row["targets_BP"][0, : len(picks)])


def test_static_masks_hide_the_same_words_however_segments_meet(opened):
    mlm = MaskedLM(copies=1, rate=0.3)
    objective = Pairs("sop", mlm, ids=special(opened), vocab_size=opened.vocab_size)
    rows = Stream(opened.split("train"), objective, ROW)
    place = {"split": rows.split, "start": 150, "epoch": 0, "seed": 0, "index": 0}
    window = rows._row(150, rows.window)
    hidden = [
        frozenset(row["targets_BP"].tolist())
        for seed in range(10)
        for row in [objective.corrupt(np.random.default_rng(seed), window | place)]
    ]
    assert len(set(hidden)) == 1


def test_static_masks_differ_with_the_seed_of_the_data(opened):
    objective = MaskedLM(copies=1, ids=special(opened), vocab_size=opened.vocab_size)
    first, other, again = (
        Stream(opened.split("train"), objective, ROW, seed, "sequential").rows(0, 8)["picks_BP"] for seed in (0, 1, 0)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(1).all()


def test_short_rows_come_in_their_share(opened):
    lengths = [[len(a) + len(b) for _, a, b in examples(opened, 600, short=short)] for short in (0.0, 0.5)]
    assert np.mean(np.array(lengths[0]) > np.array(lengths[1])) == pytest.approx(0.5, abs=0.1)


def test_a_window_without_two_tokens_weighs_nothing(opened):
    objective = Pairs(ids=special(opened), vocab_size=opened.vocab_size)
    row = {
        "tokens": np.zeros(45, np.int32),
        "documents": np.full(45, -1, np.int32),
        "split": opened.split("train"),
        "start": 10**6,
        "epoch": 0,
        "seed": 0,
        "index": 0,
    }
    batch = objective.corrupt(np.random.default_rng(0), row)
    assert batch["weights_B"] == 0 and batch["weights_BP"].sum() == 0
    np.testing.assert_array_equal(batch["documents_BL"], [0] + [-1] * 47)


def test_one_document_is_refused_for_next_sentences_and_taken_for_their_order(tmp_path):
    (tmp_path / "text.txt").write_text("a b c d e f g h i j " * 20)
    split = corpus.build(f"text:{tmp_path}/text.txt", "char", tmp_path / "corpus").split("train")
    with pytest.raises(UsageError, match="1 document, fewer than the 2"):
        Stream(split, Pairs("nsp"), 16)
    assert Stream(split, Pairs("sop", ids=(20, 21, 22), vocab_size=20), 16).rows(0, 4)["weights_B"].all()


def make_model(opened):
    V = opened.vocab_size + 3
    return Encoder(layers=1, width=16, heads=2, vocab_size=V, max_len=ROW, outputs=("tokens", "pair"))


@pytest.mark.slow
def test_the_loss_is_the_sum_of_two_means_and_each_that_of_a_guess_without_training(opened):
    objective = Pairs(ids=special(opened), vocab_size=opened.vocab_size)
    batch = Stream(opened.split("train"), objective, ROW).rows(0, 16)
    batch["weights_B"][12:] = 0
    model = make_model(opened)
    terms = objective.loss(model, specs.initialize(model.spec(), jax.random.key(0)), batch)
    assert {name for name, (_, _, coefficient) in terms.items() if coefficient == 1} == {"loss", "pair_loss"}
    assert terms["pair_loss"][1] == 12 and terms["loss"][1] == batch["weights_BP"].sum()
    means = {name: float(total / weight) for name, (total, weight, _) in terms.items()}
    assert means["pair_loss"] == pytest.approx(np.log(2), abs=0.02)
    assert means["loss"] == means["nll"] == pytest.approx(np.log(opened.vocab_size + 3), abs=0.1)


def test_pairs_alone_are_scored_right(opened):
    objective = Pairs("sop", None, ids=special(opened), vocab_size=opened.vocab_size)
    batch, model = Stream(opened.split("train"), objective, ROW).rows(0, 16), make_model(opened)
    params = specs.initialize(model.spec(), jax.random.key(0))
    params["pair"]["bias"] = np.array([0.0, np.log(3)], np.float32)
    params["pair"]["kernel"] *= 0
    terms = objective.loss(model, params, batch)
    changed = batch["pairs_B"].sum()
    assert terms["pair_accuracy"][0] == changed and set(terms) == {"loss", "pair_accuracy"}
    expected = -(changed * np.log(3 / 4) + (16 - changed) * np.log(1 / 4))
    np.testing.assert_allclose(terms["loss"][0], expected, rtol=1e-5)


def test_settings_without_sense_are_refused():
    with pytest.raises(UsageError, match="nsp"):
        Pairs("nps")
    with pytest.raises(UsageError, match=r"short=1\.5"):
        Pairs(short=1.5)
    with pytest.raises(UsageError, match="seq_len=4"):
        Pairs().window(4)
