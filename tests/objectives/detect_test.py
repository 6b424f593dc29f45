import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lm.core import params as specs
from lm.core import tree
from lm.core.errors import UsageError
from lm.models.electra import PARTS, Electra
from lm.models.encoder import Encoder
from lm.objectives.detect import Detect, _replace
from lm.objectives.mlm import MaskedLM
from lm.parallel import rules

V, W = 61, 30
IDS = (V, V + 1, V + 2)
SMALL = {"layers": 1, "heads": 2, "max_len": 32}
MODEL = Electra(
    Encoder(**SMALL, width=16, outputs=("detect",)),
    Encoder(**SMALL, width=8, embed_width=16, outputs=("tokens",)),
    vocab_size=64,
    valid_vocab_size=64,
)
OBJECTIVE = Detect(MaskedLM(rate=0.3, mask_share=1.0, random_share=0.0), ids=IDS, vocab_size=V)


def make_batch(real=(30, 30, 12, 1)):
    rows = []
    for seed, length in enumerate(real):
        rng = np.random.default_rng(seed)
        documents = np.where(np.arange(W) < length, 0, -1).astype(np.int32)
        row = {"tokens": rng.integers(0, V, W).astype(np.int32), "documents": documents}
        rows.append(OBJECTIVE.corrupt(rng, row))
    return {k: jnp.stack([row[k] for row in rows]) for k in rows[0]}


@pytest.fixture(scope="module")
def params():
    return specs.initialize(MODEL.spec(), jax.random.key(0))


def means_of(terms):
    return {name: total / weight for name, (total, weight, _) in terms.items()}


def means(terms):
    return {name: float(mean) for name, mean in means_of(terms).items()}


def original(batch):
    tokens = np.array(batch["tokens_BL"])
    for b, p in zip(*np.nonzero(batch["weights_BP"]), strict=True):
        tokens[b, batch["picks_BP"][b, p]] = batch["targets_BP"][b, p]
    return tokens


def test_every_hidden_token_becomes_a_mask_for_the_generator():
    batch = make_batch()
    hidden = batch["tokens_BL"] == IDS[0]
    assert hidden.sum() == batch["weights_BP"].sum() == 9 + 9 + 4 + 1
    np.testing.assert_array_equal(batch["weights_BL"].sum(1), [32, 32, 14, 3])


def test_samples_take_the_hidden_places_alone_and_one_that_hits_counts_as_original():
    batch = make_batch()
    word = int(batch["targets_BP"][0, 0])
    model = types.SimpleNamespace(head=lambda params: None, logits=lambda head, x: 1e3 * jax.nn.one_hot(x, 64))
    says_word = jnp.full(batch["picks_BP"].shape, word)
    tokens, replaced = _replace(model, None, says_word, batch, jax.random.key(0))
    before, hidden = original(batch), batch["tokens_BL"] == IDS[0]
    np.testing.assert_array_equal(tokens, np.where(hidden, word, before))
    np.testing.assert_array_equal(replaced, hidden & (before != word))
    assert (hidden & (before == word)).any()


def test_samples_follow_the_generators_distribution(params):
    batch = make_batch((30,) * 4)
    model = types.SimpleNamespace(head=lambda params: None, logits=lambda head, x: jnp.log(x))
    odds = jnp.broadcast_to(jnp.array([0.5, 0.25, 0.25]), (*batch["picks_BP"].shape, 3))
    draw = jax.jit(lambda key: _replace(model, None, odds, batch, key)[0])
    hidden = np.asarray(batch["tokens_BL"] == IDS[0])
    drawn = np.concatenate([np.asarray(draw(jax.random.key(i)))[hidden] for i in range(50)])
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=5 * np.sqrt(0.25 / len(drawn)))


@pytest.mark.slow
def test_the_detection_loss_reaches_the_discriminator_and_the_embeddings_but_not_the_generator(params):
    def loss(params, name):
        total, weight, _ = OBJECTIVE.loss(MODEL, params, make_batch(), key=jax.random.key(1))[name]
        return total / weight

    for name, own, other in (("detect_loss", *PARTS), ("loss", *PARTS[::-1])):
        reached = {path for path, g in tree.flatten(jax.grad(loss)(params, name)).items() if np.abs(g).max() > 0}
        assert not [path for path in reached if path.startswith(other)]
        assert [path for path in reached if path.startswith(own)] and "embed/table" in reached


def test_the_loss_is_the_generators_plus_50_times_the_detectors(params):
    terms = OBJECTIVE.loss(MODEL, params, make_batch())
    assert {name: c for name, (_, _, c) in terms.items() if c} == {"loss": 1.0, "detect_loss": 50.0}
    assert "masked_nll" not in terms  # All that is hidden is masked: it would be "nll".
    assert terms["loss"][1] == 23 and terms["detect_loss"][1] == 32 + 32 + 14 + 3


def test_an_untrained_model_guesses(params):
    found = means(OBJECTIVE.loss(MODEL, params, make_batch()))
    assert found["nll"] == pytest.approx(np.log(64), abs=0.1)
    assert found["detect_loss"] == pytest.approx(np.log(2), abs=0.05)
    # 23 of 81 tokens are hidden, and one in 64 samples is the original.
    assert 58 / 81 - 1e-6 <= found["detect_majority"] < 63 / 81


def test_a_detector_that_always_says_original_is_right_in_the_majority_share(params):
    constant = tree.unflatten(tree.flatten(params) | {"discriminator/detect/out/bias": jnp.full((1,), -1e3)})
    found = means(OBJECTIVE.loss(MODEL, constant, make_batch()))
    assert found["detect_accuracy"] == found["detect_majority"]


def test_samples_are_the_same_without_a_key_and_differ_with_it(params):
    batch = make_batch()
    once, again = (means(OBJECTIVE.loss(MODEL, params, batch)) for _ in range(2))
    other = means(OBJECTIVE.loss(MODEL, params, batch, key=jax.random.key(5)))
    assert once == again and once["nll"] == other["nll"] and once["detect_loss"] != other["detect_loss"]


def test_a_mesh_draws_the_same_samples_and_gives_the_same_figures(params):
    batch = make_batch((30, 30, 12, 1, 30, 7, 30, 30))
    loss = jax.jit(lambda params, batch: means_of(OBJECTIVE.loss(MODEL, params, batch, key=jax.random.key(2))))
    expected = loss(params, batch)
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    shape = tuple(sizes.get(axis, 1) for axis in rules.MESH_AXES)
    mesh = jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, rules.shardings(MODEL.spec(), mesh))
        found = loss(sharded, jax.device_put(batch, rules.batch_sharding(mesh)))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, err_msg=name)


def test_rows_without_weight_change_nothing(params):
    batch = make_batch()
    terms = OBJECTIVE.loss(MODEL, params, batch)
    empty = {k: v * 0 if k.startswith("weights") else v for k, v in batch.items()}
    twice = OBJECTIVE.loss(MODEL, params, {k: jnp.concatenate([v, empty[k]]) for k, v in batch.items()})
    for name in ("loss", "nll", "accuracy"):
        np.testing.assert_allclose(twice[name][0], terms[name][0], rtol=1e-5)
    assert twice["detect_loss"][1] == terms["detect_loss"][1]


def test_a_negative_weight_is_refused():
    with pytest.raises(UsageError, match=r"weight=-1"):
        Detect(weight=-1)
