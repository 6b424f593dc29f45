"""What every model promises, one row a model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lm.core import params as specs
from lm.core import tree
from lm.core.errors import UsageError
from lm.layers.block import Layer
from lm.layers.char_cnn import CharCNN
from lm.layers.favor import Favor
from lm.layers.local import Local
from lm.layers.lsh import LSH
from lm.layers.moe import Experts
from lm.layers.relative import Relative
from lm.models.convolution import Convolution
from lm.models.decoder import Decoder
from lm.models.encoder import Encoder
from lm.models.recurrent import Recurrent
from lm.models.reformer import Reformer
from lm.models.xlnet import XLNet
from lm.objectives.causal import Causal
from lm.parallel import rules

B, L, V = 8, 16, 128
TINY: dict[str, Any] = {"layers": 2, "width": 32, "heads": 4, "vocab_size": V, "valid_vocab_size": V - 3}
SMALL = {name: TINY[name] for name in ("layers", "width", "vocab_size", "valid_vocab_size")}
MODELS = {
    "gpt2": Decoder(**TINY, max_len=L),
    "gpt1": Decoder(**TINY, max_len=L, norm_place="post", activation="gelu_tanh"),
    "llama": Decoder(
        **TINY,
        kv_heads=2,
        mlp_width=48,
        positions="rotary",
        norm="rmsnorm",
        norm_bias=False,
        activation="silu",
        gated=True,
        attention_bias=False,
        mlp_bias=False,
        tied=False,
        init="normal",
    ),
    "palm": Decoder(
        **TINY,
        kv_heads=1,
        positions="rotary",
        rope_style="interleaved",
        norm_bias=False,
        block="parallel",
        activation="silu",
        gated=True,
        attention_bias=False,
        mlp_bias=False,
        logit_scale=32**-0.5,
        init="fan_in",
        init_std=1.0,
    ),
    "gemma": Decoder(
        **TINY | {"layers": 3},
        head_dim=16,
        kv_heads=2,
        pattern=(Layer(window=5), Layer(rope_base=1e6)),
        positions="rotary",
        norm="rmsnorm",
        norm_bias=False,
        norm_offset=1.0,
        norm_place="sandwich",
        qk_norm="head",
        activation="gelu_tanh",
        gated=True,
        attention_bias=False,
        mlp_bias=False,
        attention_soft_cap=20.0,
        logit_soft_cap=30.0,
        embed_scale=32**0.5,
    ),
    "dense_first": Decoder(
        **TINY | {"layers": 4}, max_len=L, prefix=(Layer(window=3),), pattern=(Layer(attention_scale=0.1), Layer())
    ),
    "moe": Decoder(
        **TINY | {"layers": 3},
        mlp_width=48,
        pattern=(Layer(experts=Experts(4, 2, router_z=0.001)), Layer()),
        positions="rotary",
        activation="silu",
        gated=True,
        mlp_bias=False,
    ),
    "performer": Decoder(
        **TINY, kv_heads=2, positions="rotary", norm="rmsnorm", norm_bias=False, favor=Favor(features=24, chunk=5)
    ),
    "performer_relu": Decoder(**TINY, max_len=L, favor=Favor(kernel="relu", orthogonal=False)),
    "alibi": Decoder(**TINY | {"heads": 6, "head_dim": 8}, kv_heads=3, positions="alibi"),
    "shaw": Decoder(**TINY, kv_heads=2, positions="none", relative=Relative(clip=3)),
    "olmo2_sinusoidal": Decoder(**TINY, positions="sinusoidal", norm_place="output", qk_norm="projection"),
    "bert": Encoder(**TINY, max_len=L),
    "albert": Encoder(**TINY | {"layers": 4}, max_len=L, embed_width=16, shared_groups=2, activation="gelu_tanh"),
    "roberta": Encoder(**TINY, max_len=L, position_offset=2, types=0, tied=False),
    "modernbert": Encoder(
        **TINY | {"layers": 4},
        prefix=(Layer(attention_norm=False),),
        pattern=(Layer(window=4, rope_base=500.0), Layer(window=4, rope_base=500.0), Layer()),
        positions="rotary",
        max_len=None,
        types=0,
        norm_bias=False,
        norm_place="pre",
        gated=True,
        attention_bias=False,
        mlp_bias=False,
        head_bias=False,
    ),
    "lstm": Recurrent(**SMALL, tied=True),
    "gru": Recurrent(**SMALL, cell="gru"),
    "elman": Recurrent(**SMALL, cell="elman", hidden=24),
    "performer_encoder": Encoder(**TINY, max_len=L, favor=Favor(features=24, chunk=5)),
    "char_lstm": Recurrent(
        **SMALL, characters=CharCNN(width=8, filters=((1, 16), (2, 8), (3, 8)), highways=1, max_characters=6)
    ),
    "gated_conv": Convolution(
        blocks=(((4, 32),), ((1, 16), (5, 16), (1, 48)), ((4, 48),)),
        width=32,
        vocab_size=V,
        valid_vocab_size=V - 3,
    ),
    "xlnet": XLNet(**TINY),
    "xlnet_causal": XLNet(**TINY, causal=True),
    # Where all is one chunk: what hashing sees is not all that may be seen.
    "reformer": Reformer(
        **TINY, max_len=L, pattern=("lsh", "local"), lsh=LSH(chunk=L), local=Local(chunk=L), mlp_chunk=6
    ),
    "reformer_both_ways": Reformer(**TINY, max_len=L, lsh=LSH(chunk=L, masking="chunks"), causal=False),
}


def is_causal(model):
    return getattr(model, "causal", isinstance(model, Decoder | Recurrent | Convolution))


def captures(model):
    """What may be captured: layers that differ in width leave no states of one shape."""
    return () if isinstance(model, Recurrent | Convolution) else ("hidden_states",)


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    return MODELS[request.param]


@pytest.fixture
def cached(model):
    """A model that continues a sequence from a cache."""
    if not hasattr(model, "cache_spec"):
        pytest.skip("it sees both ways, or keeps a memory instead")
    return model


@pytest.fixture(scope="module")
def params(model):
    return randomized(model, seed=0)


@pytest.fixture(scope="module")
def reference(model, params):
    """The loss and gradients on one device, scanned."""
    return loss_and_gradients(model, params, make_batch())


def randomized(model, seed):
    """Initial values plus noise, so that no bias is zero and no scale is one."""
    flat = tree.flatten(specs.initialize(model.spec(), jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    params = tree.unflatten({k: v + 0.1 * rng.standard_normal(v.shape, np.float32) for k, v in flat.items()})
    if not hasattr(model, "with_pieces"):
        return params
    # Each token is spelled with a character of its own, whose row of the table is the one that its id has elsewhere.
    spelled = model.with_pieces(params, [chr(i) + "~~" for i in range(V)])
    return jax.tree.map(jnp.array, jax.device_get(spelled))  # Bound to no device.


def make_batch():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V - 3, (B, L + 1), dtype=np.int32)
    weights = rng.integers(0, 2, (B, L)).astype(np.float32)
    return {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:], "weights_BL": weights}


@functools.cache
def compiled(model, objective):
    """Loss and gradients of (params, batch, key), compiled once for all tests of a model."""

    def mean_loss(params, batch, key):
        total, weight, _ = objective.loss(model, params, batch, key=key)["loss"]
        return total / weight

    return jax.jit(jax.value_and_grad(mean_loss))


def loss_and_gradients(model, params, batch, key=None):
    return compiled(model, Causal())(params, batch, key)


def assert_same(actual, expected, loss=2e-6, gradients=1e-5):
    """Losses relative, and each gradient by the norm of its difference."""
    np.testing.assert_allclose(actual[0], expected[0], rtol=loss)
    expected_gradients = tree.flatten(expected[1])
    for path, g in tree.flatten(actual[1]).items():
        difference = np.linalg.norm(g - expected_gradients[path])
        # Key biases shift every score of a row alike: their gradient is rounding noise around zero.
        assert difference <= gradients * max(np.linalg.norm(expected_gradients[path]), 1e-2), path


def test_hidden_states_and_logits_have_the_declared_shapes(model, params):
    batch, width = make_batch(), getattr(model, "hidden_width", model.width)
    capture = captures(model)
    out = jax.eval_shape(lambda p: model.apply(p, batch, capture=capture), params)
    assert out.hidden_BLD.shape == (B, L, width)
    if capture:
        assert out.captured["hidden_states"].shape == (model.layers + 1, B, L, model.width)
    logits = model.logits(model.head(params), jnp.ones((5, width)))
    assert logits.shape == (5, V) and logits.dtype == jnp.float32
    assert np.argmax(logits, -1).max() < V - 3 and logits[:, V - 3 :].max() <= -1e9


def test_future_tokens_get_no_gradient_and_all_that_may_be_seen_do(model, params):
    tokens = np.arange(L, dtype=np.int32)[None]

    def hidden(table, t):
        changed = params | {"embed": params["embed"] | {"table": table}}
        hidden_D = model.apply(changed, {"tokens_BL": tokens}).hidden_BLD[0, t]
        return jnp.sum(hidden_D * jnp.arange(hidden_D.size))

    gradient = jax.jit(jax.grad(hidden))(params["embed"]["table"], 9)
    reached = np.abs(gradient[:L]).max(-1) > 0
    # Windows compose over layers, so the reach is the layers' sum.
    assert reached[:10].all() and reached[10:].any() == reached[10:].all() == (not is_causal(model))


def test_packing_does_not_leak(model, params):
    batch, first = make_batch(), 6
    documents = np.repeat([[0] * first + [1] * (L - first)], B, 0).astype(np.int32)
    positions = np.repeat([[*range(first), *range(L - first)]], B, 0).astype(np.int32)
    packed = {"tokens_BL": batch["tokens_BL"], "documents_BL": documents, "positions_BL": positions}
    together = model.apply(params, packed).hidden_BLD
    alone = model.apply(params, {"tokens_BL": batch["tokens_BL"][:, first:]}).hidden_BLD
    np.testing.assert_allclose(together[:, first:], alone, atol=1e-5, rtol=1e-5)


def test_cached_decoding_of_ragged_rows_equals_the_full_pass(cached, params):
    model, tokens, lengths = cached, make_batch()["tokens_BL"], np.array([3, 9, 1, 6, 2, 5, 4, 8], np.int32)
    full = model.apply(params, {"tokens_BL": tokens}).hidden_BLD

    @jax.jit
    def apply(tokens, cache, documents=None):
        padding = {} if documents is None else {"documents_BL": documents}
        return model.apply(params, {"tokens_BL": tokens} | padding, cache=cache)

    cache = specs.initialize(model.cache_spec(B, L), jax.random.key(0))
    out = apply(tokens[:, :9], cache, np.where(np.arange(9) < lengths[:, None], 0, -1))
    cache = out.cache
    np.testing.assert_array_equal(cache.get("length", lengths), lengths)
    rows = np.arange(B)
    for step in range(4):
        at = lengths + step
        out = apply(tokens[rows, at][:, None], cache)
        cache = out.cache
        np.testing.assert_allclose(out.hidden_BLD[:, 0], full[rows, at], atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(cache.get("length", lengths + 4), lengths + 4)


def test_scan_equals_the_unrolled_stack(model, params, reference):
    if isinstance(model, Recurrent | Convolution):
        pytest.skip("its layers differ in width: none are scanned")
    assert_same(loss_and_gradients(dataclasses.replace(model, scan=False), params, make_batch()), reference)


@pytest.mark.slow
def test_a_mesh_gives_the_same_loss_and_gradients(model, params, reference):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    shape = tuple(sizes.get(axis, 1) for axis in rules.MESH_AXES)
    mesh = jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, rules.shardings(model.spec(), mesh))
        batch = jax.device_put(make_batch(), rules.batch_sharding(mesh))
        assert_same(loss_and_gradients(model, sharded, batch), reference)


def test_a_step_down_the_gradient_lowers_the_loss(model, params, reference):
    lower = jax.tree.map(lambda p, g: p - 0.02 * g, params, reference[1])
    assert loss_and_gradients(model, lower, make_batch())[0] < reference[0]


@pytest.mark.slow
def test_remat_changes_nothing_even_with_dropout():
    model = dataclasses.replace(MODELS["gpt2"], layers=1, residual_dropout=0.1, attention_dropout=0.1)
    params, batch, key = randomized(model, 0), make_batch(), jax.random.key(3)
    expected = loss_and_gradients(model, params, batch, key)
    for remat in ("full", "dots", "attention", "offload"):
        assert_same(loss_and_gradients(dataclasses.replace(model, remat=remat), params, batch, key), expected)


@pytest.mark.parametrize("scan", [True, False])
def test_remat_computes_again_what_its_policy_does_not_keep(scan):
    def flops(policy):
        model = Decoder(**TINY | {"width": 64}, max_len=128, remat=policy, scan=scan)
        batch = {name: jnp.zeros((2, 128), jnp.int32) for name in ("tokens_BL", "targets_BL", "weights_BL")}
        loss = jax.jit(jax.grad(lambda p: Causal().loss(model, p, batch)["loss"][0]))
        return loss.lower(specs.abstract(model.spec())).compile().cost_analysis()["flops"]

    none, dots, attention, full = (flops(policy) for policy in ("none", "dots", "attention", "full"))
    assert none < dots < full and none < attention < full


def test_bfloat16_agrees_with_float32_to_its_precision(model, params, reference):
    loss, gradients = loss_and_gradients(dataclasses.replace(model, dtype="bfloat16"), params, make_batch())
    np.testing.assert_allclose(loss, reference[0], rtol=1e-2)
    flat, expected = (np.concatenate([g.ravel() for g in jax.tree.leaves(x)]) for x in (gradients, reference[1]))
    assert flat.dtype == np.float32
    # 8 bits a product, over two layers forward and backward: a wrong scale or a float32 path cut off is far more.
    assert np.linalg.norm(flat - expected) < 5e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_heads": 0},
        {"head_dim": -8},
        {"mlp_width": -1},
        {"attention_soft_cap": 0.0},
        {"logit_soft_cap": -1.0},
        {"init_std": 0.0},
        {"rope_style": "interleaved"},
        {"pattern": (Layer(rope_base=1e6),)},
    ],
    ids=str,
)
def test_settings_without_sense_or_effect_are_refused(settings):
    with pytest.raises(UsageError, match="must be greater than 0|have no effect"):
        Decoder(**TINY | settings, positions="none")


def test_a_window_of_nothing_is_refused():
    with pytest.raises(UsageError, match="window=0 must be greater than 0"):
        Layer(window=0)


def test_a_pattern_longer_than_the_stack_is_refused():
    with pytest.raises(UsageError, match="layers=2 is fewer"):
        Decoder(**TINY, positions="none", pattern=(Layer(window=2), Layer(), Layer()))


def test_a_cache_beyond_the_positions_is_refused():
    with pytest.raises(UsageError, match="raise model.max_len"):
        MODELS["gpt2"].cache_spec(B, L + 1)
