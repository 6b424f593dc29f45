"""What each device has of attention's arrays where heads and the sequence are sharded, and what it gets from others."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.parallel import rules

SEQ = "seq"  # The mesh axis over which the length is sharded.


def partitions(q_BLHC: jax.Array, k_BSKC: jax.Array) -> tuple[PartitionSpec, PartitionSpec, str | None]:
    """(those of queries, those of keys and values, the mesh axis over which queries' heads alone are sharded)."""
    sizes = rules.sizes()
    queries = rules.partition(("batch", "length", "act_heads", None), q_BLHC.shape, sizes)
    keys = rules.partition(("batch", "length", "act_kv_heads", None), k_BSKC.shape, sizes)
    return queries, keys, queries[2] if keys[2] is None else None


def own_keys(x_BSKC: jax.Array, heads: int, axis: str | None) -> jax.Array:
    """[B, S, heads, C] of the key heads that this device's `heads` queries read, of all of them, which are whole on
    each along `axis`; those that there are where that is None."""
    if axis is None:
        return x_BSKC
    group = heads * jax.lax.axis_size(axis) // x_BSKC.shape[2]
    return jnp.take(x_BSKC, (jax.lax.axis_index(axis) * heads + jnp.arange(heads)) // group, 2)


def gathered(x: jax.Array) -> jax.Array:
    """[B, S, ...] of [B, S / parts, ...]."""
    return jax.lax.all_gather(x, SEQ, axis=1, tiled=True)


def swap(x: jax.Array) -> jax.Array:
    """`x` [B, L / parts, ...] with its second half exchanged for that of the device as far from the other end.

    The later queries of a causal sequence see more keys: then all devices compute equally many scores (Llama 3,
    2407.21783, section 3.3.2, does it by the order of the tokens). Its own inverse.
    """
    parts = jax.lax.axis_size(SEQ)
    first, second = jnp.split(x, 2, axis=1)
    second = jax.lax.ppermute(second, SEQ, [(i, parts - 1 - i) for i in range(parts)])
    return jnp.concatenate([first, second], 1)
