"""Skip-gram and CBOW, against the papers' sums pair by pair."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.models.decoder import Decoder
from lm.models.word2vec import Word2Vec
from lm.objectives.causal import Causal
from lm.objectives.hierarchical import Hierarchical
from lm.objectives.skipgram import Negative, Neighbours
from lm.objectives.subwords import hashes
from lm.parallel import rules
from lm.train.run import Run, resolve

L, V, D = 40, 30, 8
PIECES = ["<eos>", "<unk>", *(f"word{i}" for i in range(V - 2))]


class Split:
    """What the objective asks of a split; hashable, as a split is."""

    eos_id, pieces = 0, PIECES
    word_counts = np.array([0, 0, *(3000 // (i + 1) for i in range(V - 2))])


SPLIT = Split()


def row(tokens=None, documents=None):
    tokens = np.random.default_rng(0).integers(0, V, L) if tokens is None else np.asarray(tokens)
    documents = np.repeat([0, 1, -1], [25, 10, 5]) if documents is None else documents
    return {"tokens": tokens.astype(np.int32), "documents": documents.astype(np.int32), "split": SPLIT}


def batch_of(objective, rows=2):
    made = [objective.corrupt(np.random.default_rng(i), row()) for i in range(rows)]
    return {name: np.stack([one[name] for one in made]) for name in made[0]}


def weights(model):
    rng = np.random.default_rng(1)
    spec = specs.initialize(model.spec(), jax.random.key(0))
    return jax.tree.map(lambda w: rng.standard_normal(w.shape).astype(np.float32), spec)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def closed_form(objective, p, batch):
    """(loss, gradient of embed, of head) by the updates of word2vec.c, pair by pair; CBOW's divided by its words."""
    embed, head = (np.asarray(p[name]["table"], np.float64) for name in ("embed", "head"))
    d_embed, d_head, loss = np.zeros_like(embed), np.zeros_like(head), 0.0
    rows = len(batch["tokens_BL"])
    for r in range(rows):
        one = {name: x[r] for name, x in batch.items()}
        for i in np.flatnonzero(one["weights_BL"]):
            near = [j for j in range(L) if 0 < abs(i - j) <= one["reach_BL"][i]]
            near = [j for j in near if one["documents_BL"][j] == one["documents_BL"][i]]
            if objective.kind == "skipgram":
                examples = [([i], j) for j in near]
            else:
                examples = [(near, i)] if near else []
            for inputs, target in examples:
                ids = one["tokens_BL"][inputs]
                h, dh = embed[ids].mean(0), np.zeros(D)
                if isinstance(objective.output, Negative):
                    noise, count = one["negatives_BK"], objective.output.count
                    outputs = [(one["tokens_BL"][target], 1, 1.0)] + [(n, 0, count / len(noise)) for n in noise]
                else:
                    path = zip(one["nodes_BLP"][target], one["signs_BLP"][target], strict=True)
                    outputs = [(n, s > 0, 1.0) for n, s in path if s]
                for n, label, share in outputs:
                    f = sigmoid(h @ head[n])
                    loss -= share * np.log(f if label else 1 - f)
                    dh += share * (f - label) * head[n]
                    d_head[n] += share * (f - label) * h
                np.add.at(d_embed, ids, dh / len(ids))
    return loss / rows, d_embed / rows, d_head / rows


def mean_loss(objective, model):
    def loss(p, batch):
        total, weight, _ = objective.loss(model, p, batch)["loss"]
        return total / weight

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("output", [Negative(count=3), Hierarchical()], ids=["negative", "hierarchical"])
@pytest.mark.parametrize("kind", ["skipgram", "cbow"])
@pytest.mark.parametrize("reach", [4, 18])
def test_loss_and_gradient_are_word2vecs_closed_form(kind, output, reach):
    objective = Neighbours(kind, reach=reach, sample=0.1, output=output)
    model = Word2Vec(width=D, vocab_size=V)
    p, batch = weights(model), batch_of(objective)
    loss, gradient = mean_loss(objective, model)(p, batch)
    expected = closed_form(objective, p, batch)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    for name, g in zip(("embed", "head"), expected[1:], strict=True):
        # Sums of some hundred pairs, in float32 here.
        np.testing.assert_allclose(gradient[name]["table"], g, rtol=1e-4, atol=1e-4)


def test_shared_samples_meet_each_pair_as_often_as_samples_of_its_own_would():
    objective = Neighbours(reach=3, sample=0, output=Negative(count=5, draws=50))
    p = weights(Word2Vec(width=D, vocab_size=V))
    batch = batch_of(objective, rows=1)
    total = float(objective.loss(Word2Vec(width=D, vocab_size=V), p, batch)["loss"][0])
    odds = SPLIT.word_counts**0.75
    x, head = p["embed"]["table"][batch["tokens_BL"][0]], p["head"]["table"]
    texts, places = batch["documents_BL"][0], np.arange(L)
    near = np.abs(places[:, None] - places) <= batch["reach_BL"][0][:, None]
    pairs = near & (texts[:, None] == texts) & (places[:, None] != places) & (batch["weights_BL"][0][:, None] > 0)
    positive = -np.log(sigmoid(x @ head[batch["tokens_BL"][0]].T))[pairs].sum()
    noise = pairs.sum(1) @ (-np.log(sigmoid(-x @ head.T)) @ (odds / odds.sum()))
    np.testing.assert_allclose(total, positive + 5 * noise, rtol=0.03)  # 2,000 samples.


def test_samples_follow_the_counts_to_the_three_quarters():
    drawn = Negative(draws=5000).arrays(np.random.default_rng(0), SPLIT, np.zeros(L, np.int32))["negatives_BK"]
    odds = SPLIT.word_counts**0.75
    expected = odds / odds.sum() * len(drawn)
    seen = np.bincount(drawn, minlength=V)
    assert seen[:2].sum() == 0
    assert (np.abs(seen - expected)[2:] < 5 * np.sqrt(expected[2:])).all()


def test_a_word_stays_as_often_as_word2vec_has_it():
    sample, word = 0.01, 3
    frequency = SPLIT.word_counts[word] / SPLIT.word_counts.sum()
    objective, rng = Neighbours(sample=sample), np.random.default_rng(0)
    text = row(np.full(L, word), np.zeros(L))
    stays = np.mean([objective.corrupt(rng, text)["weights_BL"].sum() / L for _ in range(1000)])
    chance = np.sqrt(sample / frequency) + sample / frequency
    assert chance < 1 and abs(stays - chance) < 5 * np.sqrt(chance * (1 - chance) / (1000 * L))


def test_reach_is_uniform_and_words_left_out_make_room():
    objective = Neighbours(reach=4, sample=0)
    batch = objective.corrupt(np.random.default_rng(0), row([2, 1, 3, 0, 4] + [2] * 35, np.zeros(L)))
    assert batch["tokens_BL"][:3].tolist() == [2, 3, 4] and batch["weights_BL"].sum() == L - 2
    drawn = np.concatenate([batch_of(objective, 100)["reach_BL"].ravel()])
    counts = np.bincount(drawn, minlength=5)[1:]
    assert (np.abs(counts - counts.mean()) < 5 * np.sqrt(counts.mean())).all()


def test_lines_are_texts_of_their_own_where_windows_stay_within_them():
    tokens = np.array([2, 3, 0, 4, 5, 0] + [2] * 34)
    for within, texts in (("document", [0, 0, 0, 0]), ("line", [0, 0, 1, 1])):
        objective = Neighbours(sample=0, within=within)
        batch = objective.corrupt(np.random.default_rng(0), row(tokens, np.zeros(L)))
        assert batch["documents_BL"][:4].tolist() == texts


def test_a_words_vector_is_the_mean_of_its_own_and_its_ngrams():
    objective = Neighbours(sample=0, ngrams=(3, 6))
    model = Word2Vec(width=D, vocab_size=V, buckets=64)
    p, batch = weights(model), batch_of(objective)
    got = model.apply(p, batch).hidden_BLD
    for place in (0, 7):
        word = batch["tokens_BL"][1, place]
        rows = hashes(PIECES[word], 3, 6) % 64
        parts = np.concatenate([p["embed"]["table"][[word]], p["ngrams"]["table"][rows]])
        np.testing.assert_allclose(got[1, place], parts.mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_mesh_gives_the_same_loss_and_gradient():
    shape = tuple({"data": 2, "fsdp": 2, "tensor": 2}.get(axis, 1) for axis in rules.MESH_AXES)
    mesh = jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    for objective in (
        Neighbours(ngrams=(3, 6)),
        Neighbours("cbow", output=Hierarchical()),
    ):
        model = Word2Vec(width=D, vocab_size=V, buckets=64 if objective.ngrams else None)
        p, batch = weights(model), batch_of(objective, rows=4)
        value, gradient = mean_loss(objective, model)(p, batch)
        with jax.set_mesh(mesh):
            sharded = jax.device_put(p, rules.shardings(model.spec(), mesh))
            spread = jax.device_put(batch, rules.batch_sharding(mesh))
            got, got_gradient = mean_loss(objective, model)(sharded, spread)
        np.testing.assert_allclose(got, value, rtol=2e-6)
        for g, expected in zip(jax.tree.leaves(got_gradient), jax.tree.leaves(gradient), strict=True):
            assert np.linalg.norm(g - expected) <= 1e-5 * np.linalg.norm(expected)


def test_what_does_not_fit_is_refused_with_the_way_out():
    tokenizer = types.SimpleNamespace(vocab_size=V, special=lambda name: None)
    vectors, deep = Word2Vec(), Word2Vec(buckets=64)
    causal = Decoder(layers=1, heads=1, width=8, max_len=256)
    for model, objective, words in (
        (vectors, Causal(), "predicts each token"),
        (causal, Neighbours(), "use lm.models.word2vec.Word2Vec"),
        (vectors, Neighbours(ngrams=(3, 6)), "set model.buckets"),
        (deep, Neighbours(), "leave out model.buckets"),
    ):
        with pytest.raises(UsageError, match=words):
            resolve(Run(model, objective), tokenizer)
    assert resolve(Run(vectors, Neighbours()), tokenizer).model.vocab_size == 128


@pytest.mark.parametrize("settings", [{"kind": "glove"}, {"reach": 0}, {"sample": 1.0}, {"ngrams": (6, 3)}], ids=str)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(UsageError, match=next(iter(settings))):
        dataclasses.replace(Neighbours(), **settings)
