"""Biases of attention that grow with the distance, each head at its own rate (ALiBi)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

# Further features of a head: two are used, and kernels take widths that are multiples of eight.
WIDTH = 8
BASE = 256  # Up to here bfloat16 counts exactly: a position is two digits of this base, exact up to 65,536.


def slopes(heads: int) -> np.ndarray:
    """float32 [H]: 2^(-8 i / H), i from 1 (Press et al. 2021, 2108.12409, section 3).

    Where H is no power of two, those of the next lower one, then every other one of twice that: the authors' code.
    """
    power = 2 ** int(math.log2(heads))
    first, rest = 2.0 ** (-8 / power), 2.0 ** (-4 / power)
    each = [first**i for i in range(1, power + 1)] + [rest**i for i in range(1, 2 * (heads - power), 2)]
    return np.array(each, np.float32)


def widened(
    q_BLHC: jax.Array, k_BLKC: jax.Array, v_BLKC: jax.Array, positions_BL: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(q, k, v) with WIDTH more features a head, so that scale * q k' has slope x the key's position added.

    Over the keys that a causal query sees, that differs from -slope x distance by a constant, which softmax ignores.
    Thus no biases are made, any kernel serves and a cache has all that it needs. Values get zeros.
    """
    rates_HW = np.zeros((q_BLHC.shape[2], WIDTH), np.float32)
    rates_HW[:, :2] = slopes(len(rates_HW))[:, None] / scale * np.array([BASE, 1])
    digits_BLW = jnp.stack(jnp.divmod(positions_BL, BASE) + (jnp.zeros_like(positions_BL),) * (WIDTH - 2), -1)

    def joined(x, features):
        return jnp.concatenate([x, jnp.broadcast_to(features, (*x.shape[:3], WIDTH)).astype(x.dtype)], -1)

    zeros = jnp.zeros((1, 1, 1, WIDTH))
    return joined(q_BLHC, rates_HW[None, None]), joined(k_BLKC, digits_BLW[:, :, None]), joined(v_BLKC, zeros)
