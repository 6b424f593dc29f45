"""Random keys as pure functions of what they are for, so that a resumed run needs no saved key."""

import zlib

import jax


def named(key: jax.Array, name: str) -> jax.Array:
    """A key for one purpose: independent streams for "init", "step", "layer"."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def run_key(seed: int) -> jax.Array:
    """The key of a run, which each training step folds its own number into."""
    return named(jax.random.key(seed), "step")
