"""The kernels of platforms, run by an interpreter or refused: every mask that each takes, against blocks of queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.layers import attention_cudnn, attention_splash
from lm.layers.attention import Form, attention
from lm.parallel.mesh import Mesh

B, L, H, C = 2, 256, 4, 32
FORMS = {
    "causal": Form(),
    "window": Form(window=100),
    "soft_cap": Form(soft_cap=2.0, scale=0.7),
    "bidirectional": Form(causal=False),
    "bidirectional_window": Form(causal=False, window=70),
}


def draw(kv_heads, batch=B):
    rng = np.random.default_rng(0)
    shapes = [(batch, L, H, C), (batch, L, kv_heads, C), (batch, L, kv_heads, C), (batch, L, H, C)]
    return tuple(jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes)


def documents(batch=B):
    numbers = jnp.asarray(np.sort(np.random.default_rng(1).integers(-1, 3, (batch, L))).astype(np.int32))
    return numbers, numbers


def gradients(attend, q, k, v, g):
    return jax.value_and_grad(lambda q, k, v: jnp.sum(attend(q, k, v) * g), (0, 1, 2))(q, k, v)


QUICK = {("causal", True), ("window", False)}  # The interpreter takes its time.
CASES = [
    pytest.param(name, packed, marks=() if (name, packed) in QUICK else pytest.mark.slow)
    for name in FORMS
    for packed in (False, True)
]


@pytest.mark.parametrize("name,packed", CASES)
def test_splash_computes_what_blocks_do(name, packed):
    q, k, v, g = draw(kv_heads=2)
    form = Form(**vars(FORMS[name]) | {"scale": FORMS[name].scale or C**-0.5})
    pair = documents() if packed else None
    actual = gradients(lambda *x: attention_splash.attend(form, *x, pair, interpret=True), q, k, v, g)
    expected = gradients(lambda *x: attention(form, *x, documents=pair), q, k, v, g)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), actual, expected)


@pytest.mark.parametrize("kv_heads,tensor", [(4, 4), (2, 2), (2, 4)])
def test_splash_on_a_mesh_reads_the_right_key_heads(kv_heads, tensor):
    q, k, v, _ = draw(kv_heads)
    form, pair = Form(scale=C**-0.5), documents()
    with jax.set_mesh(Mesh(data=2, tensor=tensor).build(jax.devices()[: 2 * tensor])):
        actual = jax.jit(lambda *x: attention_splash.attend(form, *x, pair, interpret=True))(q, k, v)
    np.testing.assert_allclose(actual, attention(form, q, k, v, documents=pair), atol=1e-4)


@pytest.mark.parametrize("name,packed", CASES)
def test_splash_over_a_sharded_sequence_computes_what_one_device_does(name, packed):
    q, k, v, g = (jnp.tile(x, (1, 4, 1, 1)) for x in draw(kv_heads=2))
    q, k = q * jnp.linspace(0.5, 1.5, 4 * L)[None, :, None, None], k.at[:, L:].mul(-1)  # No two quarters are alike.
    form = Form(**vars(FORMS[name]) | {"scale": FORMS[name].scale or C**-0.5})
    numbers = tuple(jnp.concatenate([d + 4 * i for i in range(4)], 1) for d in documents())
    pair = numbers if packed else None
    expected = gradients(lambda *x: attention(form, *x, documents=pair), q, k, v, g)
    with jax.set_mesh(Mesh(seq=4, tensor=2).build(jax.devices()[:8])):
        actual = jax.jit(lambda *x: gradients(lambda *x: attention_splash.attend(form, *x, pair, interpret=True), *x))(
            q, k, v, g
        )
    # A sum of 1,024 x 4 x 32 terms, in another order.
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-3, atol=1e-2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), actual[1], expected[1])


REFUSED = {  # By kernel: what it does not take, and a word of the reason.
    "splash": [
        (attention_splash, {}, {"bias"}, (256, 256), "bias"),
        (attention_splash, {}, {"starts_B"}, (256, 256), "starts_B"),
        (attention_splash, {}, {"places"}, (256, 256), "places"),
        (attention_splash, {}, {"key"}, (256, 256), "key"),
        (attention_splash, {}, set(), (100, 256), "multiples of 128"),
    ],
    "cudnn": [
        (attention_cudnn, {}, {"documents"}, (256, 256), "documents"),
        (attention_cudnn, {"soft_cap": 2.0}, set(), (256, 256), "soft-cap"),
        (attention_cudnn, {"causal": False, "window": 3}, set(), (256, 256), "back only"),
        (attention_cudnn, {}, set(), (128, 256), "128 queries and 256 keys"),
    ],
}


@pytest.mark.parametrize("case", [case for cases in REFUSED.values() for case in cases], ids=str)
def test_a_kernel_says_why_it_refuses_a_mask(case):
    module, settings, given, (queries, keys), word = case
    q, k = jnp.zeros((1, queries, H, C), jnp.bfloat16), jnp.zeros((1, keys, H, C), jnp.bfloat16)
    assert word in module.refusal(Form(**settings), q, k, frozenset(given))
    assert module.refusal(Form(), jnp.zeros((1, 256, H, C), jnp.bfloat16), q[:, :1].repeat(256, 1), frozenset()) is None


def test_a_kernel_of_another_platform_is_refused_by_name():
    q, k, v, _ = draw(kv_heads=2)
    for kernel in ("splash", "cudnn"):
        with pytest.raises(UsageError, match=f"{kernel}.*compiled for cpu"):
            attention(Form(kernel=kernel), q, k, v)
    with pytest.raises(UsageError, match="attention_kernel"):
        Form(kernel="flash")
