"""A batch is a pure function of (data seed, example index), whoever asks and in which order."""

import dataclasses
import pickle
import time

import numpy as np
import pytest
from absl import flags

from lm.core import config
from lm.core.errors import UsageError
from lm.data import corpus, mix, order, stream
from lm.data.stream import Data, Stream
from lm.objectives import causal


@dataclasses.dataclass(frozen=True)
class Causal:
    """Stands in for the objective, with one random number a row to see the generator."""

    context: int = 1
    extra: int = 0

    def window(self, seq_len):
        return seq_len + self.context + self.extra

    def corrupt(self, rng, row):
        tokens, documents = row["tokens"], row["documents"]
        after = self.context
        end = len(tokens) - after
        return {
            "tokens_BL": tokens[:end],
            "targets_BL": tokens[after:],
            "weights_BL": (documents[after:] >= 0).astype(np.float32),
            "documents_BL": documents[:end],
            "noise_B": rng.random(),
            "index_B": np.int64(row["index"]),
            "start_B": np.int64(row["start"]),
            "epoch_B": np.int64(row["epoch"]),
        }


def build(folder, words, name="corpus"):
    """A corpus whose i-th token is i, in documents of `words` tokens."""
    start, lines = 0, []
    for count in words:
        lines.append(" ".join(f"w{i:06d}" for i in range(start, start + count)))
        start += count
    (folder / f"{name}.txt").write_text("\n".join(lines))
    return corpus.build(f"text:{folder}/{name}.txt", "word", folder / name, shard_tokens=97)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    build(folder, [30] * 40)
    build(folder, [300] * 8, "other")
    return folder


@pytest.fixture(scope="module")
def split(folder):
    return corpus.Corpus(folder / "corpus").split("train")


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def concatenate(parts):
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 997, 4096])
def test_the_order_of_an_epoch_is_a_permutation(size):
    for key in range(5):
        images = order.permute(np.arange(size), size, np.uint64(key))
        assert np.array_equal(np.sort(images), np.arange(size))


def test_a_permutation_is_the_same_by_parts_and_differs_by_key():
    whole = order.permute(np.arange(1000), 1000, np.uint64(7))
    parts = [order.permute(np.array([i]), 1000, np.uint64(7))[0] for i in range(0, 1000, 50)]
    assert np.array_equal(whole[::50], parts)
    assert np.mean(whole == order.permute(np.arange(1000), 1000, np.uint64(8))) < 0.01


def test_permutations_scatter_evenly():
    counts = np.zeros((8, 8))
    for key in range(1000):
        np.add.at(counts, (np.arange(8), order.permute(np.arange(8), 8, order.mix(np.array([key], np.uint64)))), 1)
    # 49 degrees of freedom: chi-squared lies below 95 in all but 1 of 10,000 fair cases.
    assert ((counts - 125) ** 2 / 125).sum() < 95


def test_a_row_is_a_window_and_its_targets_the_tokens_after(split):
    whole = split.window(0, split.tokens)
    rows = Stream(split, Causal(), 32, seed=3).rows(5, 20)
    assert rows["tokens_BL"].shape == (20, 32) and rows["tokens_BL"].dtype == np.int32
    where = {tuple(whole[i : i + 33]): i for i in range(len(whole) - 32)}
    for tokens, targets in zip(rows["tokens_BL"], rows["targets_BL"], strict=True):
        assert (*tokens, targets[-1]) in where and np.array_equal(tokens[1:], targets[:-1])


def test_an_epoch_takes_each_stride_once_and_the_next_in_another_order(split):
    rows = Stream(split, Causal(), 16)
    firsts = [np.sort(rows.rows(e * rows.examples, rows.examples)["tokens_BL"], axis=0) for e in range(3)]
    assert not np.array_equal(firsts[0], firsts[1])
    for epoch in range(3):
        found = order.shuffled(np.arange(rows.examples) + epoch * rows.examples, split.tokens, 16, 17, 0)
        assert np.array_equal(np.diff(np.sort(found)), np.full(rows.examples - 1, 16))
        assert found.min() < 16 and found.max() + 17 <= split.tokens


@pytest.mark.parametrize("how", stream.ORDERS)
def test_rows_depend_on_their_index_alone(split, how):
    rows = Stream(split, Causal(), 8, seed=1, order=how, batch_size=4)
    whole = rows.rows(0, 48)
    assert equal(whole, concatenate([rows.rows(i, 1) for i in range(48)]))
    assert equal(whole, concatenate([rows.rows(0, 20), rows.rows(20, 28)]))
    assert equal(whole, pickle.loads(pickle.dumps(rows)).rows(0, 48))
    assert np.array_equal(whole["index_B"], np.arange(48)) and len(set(whole["noise_B"])) == 48


@pytest.mark.parametrize("how", stream.ORDERS)
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_see_the_same_global_batches_row_by_row(split, how, hosts):
    rows = Stream(split, Causal(), 8, seed=1, order=how, batch_size=8)
    count = 8 // hosts
    for start in (0, 8, 8 * 1000):
        parts = [rows.rows(start + host * count, count) for host in range(hosts)]
        assert equal(rows.rows(start, 8), concatenate(parts))


def test_another_seed_gives_other_rows_and_noise(split):
    a, b = (Stream(split, Causal(), 8, seed=seed).rows(0, 16) for seed in (0, 1))
    assert not np.array_equal(a["tokens_BL"], b["tokens_BL"]) and not np.array_equal(a["noise_B"], b["noise_B"])


def test_a_row_s_generator_is_philox_keyed_by_seed_and_index():
    for key, rng in zip((0, 5, 2**40), stream.generators(3, (0, 5, 2**40)), strict=True):
        fresh = np.random.Generator(np.random.Philox(key=np.array([3, key], np.uint64)))
        assert np.array_equal(rng.random(5), fresh.random(5))
        assert np.array_equal(rng.integers(0, 9, 3, np.int32), fresh.integers(0, 9, 3, np.int32))


@pytest.mark.parametrize("how", stream.ORDERS)
def test_the_billionth_example_is_milliseconds_away(split, how):
    rows = Stream(split, Causal(), 8, order=how, batch_size=4)
    rows.rows(0, 4)
    times = []
    for start in (10**9, 10**9 + 4, 10**12):
        began = time.perf_counter()
        rows.rows(start, 4)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.005


@pytest.mark.parametrize("context", [0, 1, 5])
@pytest.mark.parametrize("seq_len", [1, 7, 64, 1237, 5000])
def test_sequential_predicts_every_token_once(split, seq_len, context):
    rows = Stream(split, Causal(context), seq_len, order="sequential")
    whole = split.window(0, split.tokens)
    found = rows.rows(0, rows.examples + 3)
    kept = found["weights_BL"] > 0
    assert np.array_equal(found["targets_BL"][kept], whole[context:])
    assert not kept[rows.examples :].any() and kept[rows.examples - 1].any()
    assert (found["documents_BL"][rows.examples :] == stream.PADDING).all()


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_lanes_continue_from_step_to_step(split, lanes):
    rows = Stream(split, Causal(), 8, order="lanes", batch_size=lanes)
    steps = rows.examples // lanes
    batches = [rows.rows(s * lanes, lanes) for s in range(2 * steps)]
    for s, (before, after) in enumerate(zip(batches, batches[1:], strict=False), 1):
        if s % steps:
            assert np.array_equal(before["targets_BL"][:, -1], after["tokens_BL"][:, 0])
        assert (after["resets_B"] == (s % steps == 0)).all()
    assert batches[0]["resets_B"].all() and batches[0]["resets_B"].dtype == bool
    # As in the usual batches of Penn Treebank: the text folded into `lanes` rows.
    whole = split.window(0, split.tokens)[: lanes * steps * 8].reshape(lanes, -1)
    assert np.array_equal(np.concatenate([b["tokens_BL"] for b in batches[:steps]], axis=1), whole)


def test_documents_count_up_in_a_row(split):
    rows = Stream(split, Causal(), 100, order="sequential").rows(0, 12)
    starts = split.starts(0, split.tokens)
    for i, documents in enumerate(rows["documents_BL"]):
        inside = np.arange(i * 100, i * 100 + 100)
        kept = inside < split.tokens
        expected = np.searchsorted(starts, inside, side="right")
        assert np.array_equal(documents[kept], (expected - expected[0])[kept])
        assert (documents[~kept] == stream.PADDING).all()


def test_documents_of_lines_are_told_apart(tmp_path):
    (tmp_path / "x.txt").write_text("ab\ncde\nf\ngh\n")
    split = corpus.build(f"lines:{tmp_path}/x.txt", "char", tmp_path / "c", shard_tokens=3).split("train")
    (row,) = Stream(split, Causal(0), 8, order="sequential").rows(0, 1)["documents_BL"]
    assert row.tolist() == [0, 0, 1, 1, 1, 2, 3, 3]


@pytest.mark.parametrize("tokens", [17, 18, 33, 40, 100])
def test_windows_of_a_short_split_stay_inside(tokens):
    for epoch in range(50):
        count = order.shuffled_examples(tokens, 16, 17)
        starts = order.shuffled(np.arange(count) + epoch * count, tokens, 16, 17, 0)
        assert starts.min() >= 0 and starts.max() + 17 <= tokens


@pytest.mark.parametrize("weights", [(1,), (3, 1), (2, 2), (7, 2, 1), (50, 30, 15, 5), (1, 999)])
def test_a_mixture_has_exact_shares_evenly_spread(weights):
    schedule = mix.Schedule(weights)
    period, total = schedule.period, sum(weights)
    source, index = schedule.locate(np.arange(3 * period))
    for k, weight in enumerate(weights):
        taken = np.cumsum(source == k)
        assert taken[period - 1] * total == weight * period
        ideal = np.arange(1, 3 * period + 1) * weight / total
        assert np.abs(taken - ideal).max() < len(weights)
        assert np.array_equal(index[source == k], np.arange(taken[-1]))


def test_a_mixture_seeks_in_closed_form():
    schedule = mix.Schedule((5, 3, 2))
    began = time.perf_counter()
    source, index = schedule.locate(np.arange(10**12, 10**12 + 10))
    assert time.perf_counter() - began < 0.005
    assert np.bincount(source).tolist() == [5, 3, 2] and index[source == 0][0] == 5 * 10**11


def test_a_mixture_reads_each_source_in_its_own_order(folder):
    names = [str(folder / "corpus"), str(folder / "other")]
    with pytest.raises(UsageError, match="different tokenizers"):
        stream.open_stream(Data(mixture=tuple((n, 1) for n in names)), Causal(), 16, 4)
    one = corpus.Corpus(names[0])
    tokenizer = one.tokenizer()
    text = folder / "two.txt"
    text.write_text("w000003 w000007 " * 300)
    corpus.build(f"text:{text}", tokenizer, folder / "two")
    mixture = stream.open_stream(Data(mixture=((names[0], 3), (str(folder / "two"), 1))), Causal(), 16, 4)
    rows = mixture.rows(0, 400)
    second = np.isin(rows["tokens_BL"], tokenizer.encode("w000003 w000007")).all(1)
    assert second.sum() == 100
    for k, mine in enumerate((~second, second)):
        alone = mixture.streams[k].rows(0, int(mine.sum()))
        assert np.array_equal(rows["tokens_BL"][mine], alone["tokens_BL"])
    assert len(set(rows["noise_B"])) == 400
    assert equal(rows, concatenate([mixture.rows(i, 25) for i in range(0, 400, 25)]))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_prefetched_batches_come_in_order_for_each_host(split, workers):
    flags.FLAGS.mark_as_parsed()  # Grain's workers ask for a flag of theirs.
    rows = Stream(split, causal.Causal(), 8)  # Of the library, because worker processes cannot import tests.
    for hosts in (1, 2) if not workers else (2,):
        parts = [
            list(stream.prefetch(rows, 40, 8, steps=30, host=h, hosts=hosts, workers=workers)) for h in range(hosts)
        ]
        assert all(len(part) == 30 for part in parts)
        for step in range(30):
            assert equal(rows.rows(40 + 8 * step, 8), concatenate([part[step] for part in parts]))


def test_a_text_shorter_than_a_window_is_refused_with_both_lengths(split):
    with pytest.raises(UsageError, match=f"{split.tokens} tokens, fewer than a window of 5001"):
        Stream(split, Causal(), 5000)
    with pytest.raises(UsageError, match="too few for 200 lanes of 8"):
        Stream(split, Causal(), 8, order="lanes", batch_size=200)


def test_impossible_settings_are_refused(split, folder):
    for settings in ({"order": "shufled"}, {"seed": -1}, {"corpus": "a", "mixture": (("b", 1),)}):
        with pytest.raises(UsageError):
            Data(**settings)
    with pytest.raises(UsageError, match="--corpus"):
        stream.open_stream(Data(), Causal(), 8, 4)
    with pytest.raises(UsageError, match="batch size"):
        Stream(split, Causal(), 8, order="lanes")
    with pytest.raises(UsageError, match="does not divide over 3 hosts"):
        stream.prefetch(Stream(split, Causal(), 8), 0, 8, steps=1, hosts=3)
    mixture = tuple((str(folder / "corpus"), w) for w in (1, 2))
    with pytest.raises(UsageError, match="lanes"):
        stream.open_stream(Data(mixture=mixture, order="lanes"), Causal(), 8, 4)
    for weights in ((), (0, 1), (1.5,), (1, 2**21)):
        with pytest.raises(UsageError, match="weights"):
            mix.Schedule(weights)


def test_data_goes_through_json_and_overrides():
    data = config.override_all(Data(), ["mixture=(('a', 3), ('b', 1))", "seed=4", "order=lanes"])
    assert data == Data(mixture=(("a", 3), ("b", 1)), seed=4, order="lanes")
    assert config.from_json(config.to_json(data)) == data


@pytest.mark.parametrize("how", stream.ORDERS)
@pytest.mark.parametrize("tokens", [126, 127, 128, 129, 500])
@pytest.mark.parametrize("extra", [-2, 3])
def test_windows_of_another_length_than_a_row_take_each_token_once(folder, how, tokens, extra):
    """An objective adds tokens of its own to a row, or has a row stand for more of the text than it is long."""
    split = build(folder, [tokens - 1], f"other{tokens}").split("train")
    assert split.tokens == tokens  # With the document's end.
    window = 16 + extra
    rows = Stream(split, Causal(0, extra), 16, order=how, batch_size=2)
    examples = rows.examples_at(np.arange(rows.examples), np.arange(rows.examples))
    assert all(len(example["tokens_BL"]) == window for example in examples)
    starts = [e["start_B"] for e in examples]
    assert sorted(set(np.diff(sorted(starts)))) in ([window], [])
    if how == "sequential":
        assert starts[0] == 0 and starts[-1] < split.tokens <= starts[-1] + window


def test_a_row_knows_its_place_and_epoch(split):
    rows = Stream(split, Causal(), 16)
    for example in rows.examples_at(np.array([3, rows.examples + 3]), np.array([70, 71])):
        epoch = example["epoch_B"]
        start = order.shuffled(np.array([3 + epoch * rows.examples]), split.tokens, 16, 17, 0)[0]
        assert example["start_B"] == start and np.array_equal(split.window(start, 16), example["tokens_BL"])
    assert [e["epoch_B"] for e in rows.examples_at(np.array([3, rows.examples + 3]), np.array([0, 1]))] == [0, 1]
