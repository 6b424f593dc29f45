"""Hashed attention against enumeration: who meets whom in which round, and one softmax over all of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.layers.lsh import LSH, draw_rotations, hash_buckets, lsh_attention

B, L, H, C = 2, 24, 3, 6
FORM = LSH(rounds=3, chunk=4, before=1, buckets=(8,))
FORMS = {
    "one round": (dataclasses.replace(FORM, rounds=1), True),
    "causal": (FORM, True),
    "few chunks": (dataclasses.replace(FORM, chunk=12, before=2), True),
    "both sides": (dataclasses.replace(FORM, after=1), False),
    "own chunk": (dataclasses.replace(FORM, before=0, rounds=4), False),
    "one chunk": (dataclasses.replace(FORM, chunk=24), True),
}


def make(form):
    """(qk, v, buckets, documents), two of which are packed in a row, with padding at its end."""
    rng = np.random.default_rng(0)
    qk, v = (rng.standard_normal((B, L, H, C)).astype(np.float32) for _ in range(2))
    documents = np.array([[0] * 9 + [1] * 15, [0] * 19 + [-1] * 5])
    rotations = draw_rotations(form, form.factors(L, L), H, C, jax.random.key(1))
    return qk, v, hash_buckets(form.factors(L, L), qk, rotations, documents < 0), documents


def met(form, buckets_RL, causal, documents):
    """[L, L] bool: whether key j is in the bucket and the window of query i in any round; none but itself: itself."""
    found = np.zeros((L, L), bool)
    for buckets in np.asarray(buckets_RL):
        chunk = np.empty(L, int)
        chunk[sorted(range(L), key=lambda i: (buckets[i], i))] = np.arange(L) // min(form.chunk, L)
        for i in range(L):
            for j in range(L):
                near = -form.before <= chunk[j] - chunk[i] <= form.after
                together = buckets[i] == buckets[j] and documents[j] == max(documents[i], 0)
                found[i, j] |= near and together and i != j and (j <= i or not causal)
    alone = ~found.any(1)
    found[alone, alone] = True
    return found


def union_softmax(qk, v, seen_BHLL):
    k = qk / jnp.sqrt(jnp.mean(qk**2, -1, keepdims=True) + 1e-6)
    scores = jnp.einsum("blhc,bshc->bhls", qk, k) * C**-0.5
    return jnp.einsum("bhls,bshc->blhc", jax.nn.softmax(jnp.where(seen_BHLL, scores, -jnp.inf)), v)


@pytest.mark.parametrize("name", FORMS)
def test_all_rounds_together_are_one_softmax_over_whom_a_token_meets(name):
    form, causal = FORMS[name]
    qk, v, buckets, documents = make(form)
    seen = np.stack([[met(form, buckets[b, h], causal, documents[b]) for h in range(H)] for b in range(B)])
    pair = (np.maximum(documents, 0), documents)
    weights = np.random.default_rng(1).standard_normal(v.shape) * (documents >= 0)[..., None, None]

    def ours(qk, v):
        o = lsh_attention(form, qk, v, buckets, causal=causal, documents=pair)
        return jnp.sum(o * weights), o

    def theirs(qk, v):
        o = union_softmax(qk, v, seen)
        return jnp.sum(o * weights), o

    gradients, o = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(qk, v)
    expected_gradients, expected = jax.grad(theirs, (0, 1), has_aux=True)(qk, v)
    real = documents >= 0
    np.testing.assert_allclose(o[real], expected[real], atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_a_bucket_is_the_nearest_of_the_rotated_directions_and_their_opposites():
    x = np.random.default_rng(0).standard_normal((B, L, H, C)).astype(np.float32)
    form = dataclasses.replace(FORM, buckets=(4, 6))
    rotations = np.asarray(draw_rotations(form, form.buckets, H, C, jax.random.key(0)))
    found = hash_buckets(form.buckets, x, rotations, np.arange(L)[None, :] >= np.array([[L], [20]]))
    for b, h, r, i in np.ndindex(*found.shape):
        projected = x[b, i, h] @ rotations[h, :, r]
        first, second = np.concatenate([projected[:2], -projected[:2]]), projected[2:]
        expected = first.argmax() + 4 * np.concatenate([second, -second]).argmax()
        assert found[b, h, r, i] == (24 if (b, i >= 20) == (1, True) else expected)


@pytest.mark.parametrize("length, chunk, max_len, factors", [
    (48, 4, 64, (4, 4)),
    (16384, 64, 65536, (16, 32)),
    (4096, 64, 4096, (128,)),
])  # fmt: skip
def test_buckets_that_are_not_set_are_two_a_chunk(length, chunk, max_len, factors):
    assert LSH(chunk=chunk).factors(length, max_len) == factors


def test_alike_tokens_hash_alike_more_often():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 2000, 1, 16)).astype(np.float32)
    rotations = draw_rotations(LSH(rounds=8, buckets=(16,)), (16,), 1, 16, jax.random.key(0))

    def agreement(noise):
        y = x + noise * rng.standard_normal(x.shape).astype(np.float32)
        return float(np.mean(hash_buckets((16,), x, rotations) == hash_buckets((16,), y, rotations)))

    assert agreement(0.1) > 0.8 > agreement(0.5) > agreement(2.0) > 1 / 16


def test_work_and_memory_are_linear_in_the_length():
    def measured(length):
        def loss(qk, v):
            buckets = hash_buckets((64,), qk, rotations)
            return jnp.sum(lsh_attention(form, qk, v, buckets, causal=True))

        form = LSH(rounds=2, chunk=32, buckets=(64,))
        rotations = draw_rotations(form, (64,), 2, 16, jax.random.key(0))
        x = jax.ShapeDtypeStruct((1, length, 2, 16), np.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, x).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    short, long = measured(1024), measured(4096)
    assert long[0] <= 4.1 * short[0] and long[1] <= 4.1 * short[1]


def test_dropout_needs_a_key_and_keeps_the_mean():
    form = dataclasses.replace(FORM, dropout=0.2)
    qk, _, buckets, _ = make(form)
    ones = np.ones((B, L, H, C), np.float32)
    apply = jax.jit(lambda key: lsh_attention(form, qk, ones, buckets, causal=True, key=key))
    np.testing.assert_allclose(lsh_attention(form, qk, ones, buckets, causal=True), 1, atol=1e-5)
    o = np.mean([apply(jax.random.key(i)) for i in range(50)])
    assert abs(o - 1) < 0.01  # Of 21,600 weights kept by 0.8.


@pytest.mark.parametrize("settings, words", [
    ({"rounds": 0}, "rounds=0 must be greater"),
    ({"chunk": 0}, "chunk=0 must be greater"),
    ({"before": -1}, "before=-1"),
    ({"buckets": (7,)}, "must hold even numbers"),
    ({"buckets": ()}, "must hold even numbers"),
    ({"masking": "bucket"}, "did you mean buckets"),
    ({"dropout": 1.0}, "dropout=1.0"),
])  # fmt: skip
def test_settings_without_sense_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        LSH(**settings)
