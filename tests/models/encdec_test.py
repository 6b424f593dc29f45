"""What an encoder-decoder promises, one row a kind."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import lm
from lm.core import params as specs
from lm.core import tree
from lm.core.errors import UsageError
from lm.layers.buckets import Buckets
from lm.models.encdec import EncDec
from lm.objectives.causal import Causal
from lm.parallel import rules
from tests.models.contract_test import assert_same, compiled, loss_and_gradients, randomized

B, S, L, V = 8, 12, 16, 128
TINY: dict[str, Any] = {"layers": 2, "width": 32, "heads": 4, "vocab_size": V, "valid_vocab_size": V - 3}
T5: dict[str, Any] = {
    "positions": "none",
    "norm": "rmsnorm",
    "norm_bias": False,
    "norm_place": "pre",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_scale": 1.0,
    "init": "t5",
    "init_std": 1.0,
}
MODELS = {
    "original": EncDec(**TINY, embed_scale=32**0.5, init="fan_in"),
    "marian_split": EncDec(
        **TINY, sinusoid_layout="halves", source_vocab_size=64, head_bias=True, activation="silu", decoder_layers=1
    ),
    "fsmt": EncDec(**TINY, sinusoid_layout="tensor2tensor", position_offset=2, source_vocab_size=64, tied=False),
    "t5": EncDec(**TINY | T5, buckets=Buckets(8, 6), head_dim=12, logit_scale=32**-0.5),
    "t5_1_1": EncDec(**TINY | T5, buckets=Buckets(8, 6), activation="gelu_tanh", gated=True, mlp_width=48, tied=False),
    "umt5": EncDec(**TINY | T5, buckets=Buckets(8, 6, each_layer=True), decoder_layers=3, decoder_heads=2, tied=False),
    "bart": EncDec(
        **TINY,
        positions="learned",
        max_len=L,
        position_offset=2,
        embed_norm=True,
        activation="gelu",
        head_bias=True,
        decoder_mlp_width=48,
        start_id=2,
    ),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def params(model):
    return randomized(model, seed=0)


@pytest.fixture(scope="module")
def reference(model, params):
    """The loss and gradients on one device, scanned."""
    return loss_and_gradients(model, params, make_batch())


def make_batch():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V - 3, (B, L + 1), dtype=np.int32)
    source, documents = rng.integers(0, 63, (B, S), dtype=np.int32), np.zeros((B, S), np.int32)
    documents[1, 7:] = documents[3, :5] = -1
    weights = rng.integers(0, 2, (B, L)).astype(np.float32)
    batch = {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:], "weights_BL": weights}
    return batch | {"source_tokens_BS": source, "source_documents_BS": documents}


def test_hidden_states_and_logits_have_the_declared_shapes(model, params):
    out = jax.eval_shape(lambda p: model.apply(p, make_batch(), capture=("hidden_states",)), params)
    assert out.hidden_BLD.shape == (B, L, 32) and out.captured["memory"].shape == (B, S, 32)
    assert out.captured["hidden_states"].shape == (model.decoder_stack.block.layers + 1, B, L, 32)
    assert out.captured["encoder_states"].shape == (model.layers + 1, B, S, 32)
    logits = model.logits(model.head(params), jnp.ones((5, 32)))
    assert logits.shape == (5, V) and logits.dtype == jnp.float32 and logits[:, V - 3 :].max() <= -1e9


def test_a_token_sees_those_before_it_and_the_whole_source_which_sees_both_ways(model, params):
    batch = {k: v[:1] for k, v in make_batch().items() if k in ("tokens_BL", "source_tokens_BS")}

    def reach(output, name, at):
        """Which of the batch's tokens of `name` change row `at` of the output, by a change of each in turn."""
        changed = np.repeat(batch[name], batch[name].shape[1] + 1, 0)
        changed[np.arange(batch[name].shape[1]), np.arange(batch[name].shape[1])] += 1
        rows = {k: np.repeat(v, len(changed), 0) for k, v in batch.items()} | {name: changed}
        x = np.asarray(output(rows))[:, at]
        return np.abs(x[:-1] - x[-1]).max(-1) > 0

    def decoded(rows):
        return model.apply(params, rows).hidden_BLD

    assert reach(lambda rows: model.encode(params, rows).hidden_BLD, "source_tokens_BS", 5).all()
    assert reach(decoded, "source_tokens_BS", 9).all()
    assert reach(decoded, "tokens_BL", 9).tolist() == [True] * 10 + [False] * (L - 10)


def test_future_tokens_get_no_gradient(model, params):
    batch = {"tokens_BL": np.arange(64, 64 + L, dtype=np.int32)[None], "source_tokens_BS": np.arange(S)[None]}

    def hidden(table, t):
        out = model.apply(params | {"embed": {"table": table}}, batch)
        return jnp.sum(out.hidden_BLD[0, t] * jnp.arange(32))

    reached = np.abs(jax.jit(jax.grad(hidden))(params["embed"]["table"], 9)).max(-1) > 0
    assert reached[64:74].all() and not reached[74:].any()
    assert reached[:S].all() == (model.source_vocab_size is None)


def test_padding_of_the_source_changes_nothing(model, params):
    batch = make_batch()
    out = model.apply(params, batch, capture=("hidden_states",))
    other = batch | {"source_tokens_BS": np.where(batch["source_documents_BS"] < 0, 9, batch["source_tokens_BS"])}
    np.testing.assert_array_equal(model.apply(params, other).hidden_BLD, out.hidden_BLD)
    short = model.apply(
        params, {"tokens_BL": batch["tokens_BL"][1:2], "source_tokens_BS": batch["source_tokens_BS"][1:2, :7]}
    )
    np.testing.assert_allclose(out.hidden_BLD[1:2], short.hidden_BLD, atol=1e-5, rtol=1e-5)


def test_packing_does_not_leak(model, params):
    batch, first, source_first = make_batch(), 6, 5
    packed = {"tokens_BL": batch["tokens_BL"], "source_tokens_BS": batch["source_tokens_BS"]}
    for names, length, cut in (
        (("documents_BL", "positions_BL"), L, first),
        (("source_documents_BS", "source_positions_BS"), S, source_first),
    ):
        rows = [0] * cut + [1] * (length - cut), [*range(cut), *range(length - cut)]
        packed |= {name: np.repeat([row], B, 0).astype(np.int32) for name, row in zip(names, rows, strict=True)}
    together = model.apply(params, packed).hidden_BLD
    for tokens, source in ((slice(None, first), slice(None, source_first)), (slice(first, L), slice(source_first, S))):
        apart = {"tokens_BL": batch["tokens_BL"][:, tokens], "source_tokens_BS": batch["source_tokens_BS"][:, source]}
        np.testing.assert_allclose(together[:, tokens], model.apply(params, apart).hidden_BLD, atol=1e-5, rtol=1e-5)


def test_cached_decoding_of_ragged_rows_equals_the_full_pass(model, params):
    batch, lengths = make_batch(), np.array([3, 9, 1, 6, 2, 5, 4, 8], np.int32)
    tokens, source = batch["tokens_BL"], {k: v for k, v in batch.items() if k.startswith("source")}
    full = model.apply(params, batch).hidden_BLD
    apply = jax.jit(lambda batch, cache: model.apply(params, batch, cache=cache))
    cache = specs.initialize(model.cache_spec(B, L, S), jax.random.key(0))
    out = apply({"tokens_BL": tokens[:, :9]} | source, cache)
    assert jax.tree.map(jnp.shape, out.cache) == jax.tree.map(jnp.shape, cache)
    np.testing.assert_allclose(out.hidden_BLD, full[:, :9], atol=1e-5, rtol=1e-5)
    cache = out.cache | {"length": jnp.asarray(lengths)}
    rows = np.arange(B)
    for step in range(4):
        at = lengths + step
        out = apply({"tokens_BL": tokens[rows, at][:, None]}, cache)
        cache = out.cache
        np.testing.assert_allclose(out.hidden_BLD[:, 0], full[rows, at], atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(cache["length"], lengths + 4)


def test_scan_equals_the_unrolled_stacks(model, params, reference):
    assert_same(loss_and_gradients(dataclasses.replace(model, scan=False), params, make_batch()), reference)


def test_a_loss_in_chunks_is_the_same(model, params, reference):
    assert_same(compiled(model, Causal(chunk_tokens=8))(params, make_batch(), None), reference)


@pytest.mark.slow
def test_a_mesh_gives_the_same_loss_and_gradients(model, params, reference):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    shape = tuple(sizes.get(axis, 1) for axis in rules.MESH_AXES)
    mesh = jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, rules.shardings(model.spec(), mesh))
        batch = jax.device_put(make_batch(), rules.batch_sharding(mesh))
        assert_same(loss_and_gradients(model, sharded, batch), reference)


def test_a_step_down_the_gradient_lowers_the_loss_and_leaves_buffers_alone(model, params, reference):
    lower = jax.tree.map(lambda p, g: p - 0.02 * g, params, reference[1])
    assert loss_and_gradients(model, lower, make_batch())[0] < reference[0]
    spec, gradients = tree.flatten(model.spec()), tree.flatten(reference[1])
    assert {path for path, p in spec.items() if not p.trainable} == {p for p, g in gradients.items() if not np.any(g)}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bart", "umt5"], indirect=True, scope="module")
def test_dropout_is_turned_on_by_a_key_and_remat_changes_nothing(model, params, reference):
    rates = {f"{name}_dropout": 0.1 for name in ("embed", "residual", "attention", "mlp")}
    model, batch = dataclasses.replace(model, **rates), make_batch()
    dropped = loss_and_gradients(model, params, batch, jax.random.key(3))
    assert abs(reference[0] - dropped[0]) > 1e-3
    full = dataclasses.replace(model, remat="full")
    assert_same(loss_and_gradients(full, params, batch, jax.random.key(3)), dropped)


@pytest.mark.slow
def test_bfloat16_agrees_with_float32_to_its_precision(model, params, reference):
    loss, gradients = loss_and_gradients(dataclasses.replace(model, dtype="bfloat16"), params, make_batch())
    np.testing.assert_allclose(loss, reference[0], rtol=1e-2)
    flat, expected = (np.concatenate([g.ravel() for g in jax.tree.leaves(x)]) for x in (gradients, reference[1]))
    # 8 bits a product, over four layers forward and backward: a wrong scale or a float32 path cut off is far more.
    assert flat.dtype == np.float32 and np.linalg.norm(flat - expected) < 1e-1 * np.linalg.norm(expected)


def test_a_linen_module_computes_what_the_model_does(model, params):
    module, batch = lm.interop.linen(model), make_batch()
    out = module.apply({"params": params}, batch)
    jax.tree.map(np.testing.assert_array_equal, out, model.apply(params, batch))
    found = jax.eval_shape(lambda: module.init(jax.random.key(0), batch))["params"]
    assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(params))


def test_initial_scores_of_t5_have_the_variance_of_scaled_ones():
    block = dataclasses.replace(MODELS["t5"], width=256, head_dim=64, heads=4).encoder_stack.block
    spec = block.spec(MODELS["t5"].encoder_stack.layers[0])["attention"]
    assert spec["q"]["kernel"].init.std == (256 * 64) ** -0.5 and spec["k"]["kernel"].init.std == 256**-0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"positions": "learned"},
        {"max_len": 8},
        {"positions": "none", "sinusoid_layout": "halves"},
        {"positions": "none", "position_offset": 2},
        {"decoder_heads": 5},
        {"decoder_layers": 0},
        {"start_id": -1},
    ],
    ids=str,
)
def test_settings_without_sense_or_effect_are_refused(settings):
    with pytest.raises(UsageError):
        EncDec(**TINY | settings)


def test_a_batch_without_a_source_needs_a_cache():
    with pytest.raises(ValueError, match="source_tokens_BS"):
        MODELS["t5"].apply({}, {"tokens_BL": np.zeros((1, 2), np.int32)})
