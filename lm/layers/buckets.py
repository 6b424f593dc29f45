"""Biases of attention by distance, of which far ones share a bucket (T5)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UsageError
from lm.core.params import Normal, Param


@dataclasses.dataclass(frozen=True)
class Buckets:
    """`count` buckets a head (Raffel et al. 2020, 1910.10683, section 2.1), in one table for all layers or one in each.

    Half of them hold one distance each, the other half grow geometrically up to `longest`, and the last takes all
    that is farther. In both directions, keys ahead of the query have the second half of the buckets.
    """

    count: int = 32
    longest: int = 128
    each_layer: bool = False  # UMT5 (2304.09151).

    def __post_init__(self):
        if self.count < 4 or self.longest <= self.count // 2:
            raise UsageError(
                f"buckets of count={self.count} and longest={self.longest}: count must be at least 4, "
                "and longest more than half of it"
            )

    def spec(self, heads: int, width: float) -> dict[str, Param]:
        """{"table": [buckets, H]}, drawn from N(0, 1 / width)."""
        shape, axes = (self.count, heads), ("positions", "heads")
        return {"table": Param(shape, axes, Normal(width**-0.5), inputs=("positions",), role="embedding")}

    def rows(self, query_BL: jax.Array, key_BS: jax.Array, causal: bool) -> jax.Array:
        """int32 [B, L, S]: the bucket of each key for each query, from their indices in the sequence.

        Causal attention has all buckets for the keys behind; those ahead, which it hides, get bucket 0.
        """
        ahead = key_BS[:, None, :] - query_BL[:, :, None]
        count = self.count if causal else self.count // 2
        by_distance = jnp.asarray(_by_distance(count, self.longest))
        if causal:
            return by_distance[jnp.clip(-ahead, 0, self.longest)]
        return by_distance[jnp.minimum(jnp.abs(ahead), self.longest)] + jnp.where(ahead > 0, count, 0)


def bucket_bias(p: dict[str, jax.Array], rows_BLS: jax.Array) -> jax.Array:
    """[B, H, L, S] in float32: the entries of the table at `rows`, for the scores of attention."""
    return p["table"].T[:, rows_BLS].swapaxes(0, 1)


def _by_distance(count: int, longest: int) -> np.ndarray:
    """int32 [longest + 1]: the bucket of each distance.

    Made on the host, in float32 as the original does: borders fall on whole distances (16, 32 and 64 of 128), where
    an accelerator's approximate logarithm would take the wrong side.
    """
    exact, distance = count // 2, np.arange(longest + 1)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(math.log(longest / exact)) * np.float32(count - exact)
    far = np.minimum(exact + steps.astype(np.int32), count - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)
