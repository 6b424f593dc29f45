"""Where a token stands: sinusoids and rotary embeddings (learned positions are a table of `embed`)."""

import jax
import jax.numpy as jnp


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """[..., D] float32: sin(pos / 10000^(2i/D)) at 2i, the cosine at 2i + 1 (Vaswani et al. 2017, 1706.03762)."""
    angles = _angles(positions, width, 10000.0)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*positions.shape, width)


def rotary_table(positions: jax.Array, rotated: int, base: float) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [..., rotated / 2] float32, of pos / base^(2i / rotated)."""
    angles = _angles(positions, rotated, base)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLHC: jax.Array, table: tuple[jax.Array, jax.Array], style: str) -> jax.Array:
    """x with its first 2 * table width features of each head turned by their angle (Su et al. 2021, 2104.09864).

    The table is [B or 1, L, R/2]. Pairs are (i, i + R/2) in style "half" (Llama, NeoX) and (2i, 2i + 1) in
    style "interleaved" (the paper, PaLM, Cohere); a permutation of features turns one into the other.
    """
    cos, sin = (t[:, :, None, :] for t in table)
    rotated = 2 * cos.shape[-1]
    x = x_BLHC[..., :rotated].astype(jnp.float32)
    pairs = x.reshape(*x.shape[:-1], 2, -1) if style == "half" else x.reshape(*x.shape[:-1], -1, 2)
    axis = -2 if style == "half" else -1
    a, b = (jnp.take(pairs, i, axis) for i in (0, 1))
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis).reshape(x.shape).astype(x_BLHC.dtype)
    return jnp.concatenate([turned, x_BLHC[..., rotated:]], -1) if rotated < x_BLHC.shape[-1] else turned


def _angles(positions, width, base):
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return positions[..., None].astype(jnp.float32) * frequencies.reshape((1,) * positions.ndim + (-1,))
