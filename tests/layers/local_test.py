"""Chunked attention against full attention under the mask that chunks amount to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.local import Local, local_attention

B, L, H, C = 2, 24, 3, 6


@pytest.mark.parametrize("form", [Local(4, 1, 0), Local(4, 2, 0), Local(8, 0, 0), Local(4, 1, 1), Local(32)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_full_attention_to_the_chunks_of_a_window(form, causal):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, L, H, C)).astype(np.float32) for _ in range(3))
    documents = np.array([[0] * 9 + [1] * 15, [0] * 24])
    chunk, chunks = np.arange(L) // form.chunk, max(1, L // form.chunk)
    steps = {(step % chunks) for step in range(-form.before, form.after + 1)}
    seen = np.isin((chunk[None, :] - chunk[:, None]) % chunks, list(steps))
    seen = seen & (np.tril(np.ones((L, L), bool)) | (not causal))
    seen = (seen & (documents[:, :, None] == documents[:, None, :]))[:, None]

    def full(q, k, v):
        scores = jnp.where(seen, jnp.einsum("blhc,bshc->bhls", q, k) * C**-0.5, -jnp.inf)
        return jnp.einsum("bhls,bshc->blhc", jax.nn.softmax(scores), v)

    def ours(q, k, v):
        return local_attention(form, q, k, v, causal=causal, documents=(documents, documents))

    np.testing.assert_allclose(ours(q, k, v), full(q, k, v), atol=1e-5, rtol=1e-5)
    found, expected = (jax.grad(lambda *x, f=f: jnp.sum(f(*x) ** 2), (0, 1, 2))(q, k, v) for f in (ours, full))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_a_length_that_chunks_do_not_divide_is_refused():
    x = np.ones((1, 9, 1, 2), np.float32)
    with pytest.raises(ValueError, match="9 is no multiple of chunk=4"):
        local_attention(Local(4), x, x, x, causal=True)
