"""A softmax that spends on a word what its frequency is worth: rare ones in clusters, with shorter vectors."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.errors import UsageError
from lm.core.params import Param
from lm.layers.embed import MASKED_LOGIT, mask_padding, unembed
from lm.layers.linear import project


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """The sizes, and the functions over the parameters (Grave et al. 2016, 1609.04309, section 4).

    Ids below the first of the `cutoffs` are scored by the head, beside a score for each cluster; cluster i has those
    from its cutoff up to the next, or to the last, and scores them after a projection to width / `factor`^(i + 1). Ids
    must be sorted by frequency, as those of tokenizers of kind word are.
    """

    cutoffs: tuple[int, ...]
    factor: float = 4.0

    def __post_init__(self):
        if not self.cutoffs or any(b <= a for a, b in zip((0, *self.cutoffs), self.cutoffs, strict=False)):
            raise UsageError(f"cutoffs={self.cutoffs} needs ids above 0 that rise")
        if self.factor < 1:
            raise UsageError(f"factor={self.factor} must be at least 1")

    def spec(self, rows: int, width: int, init: Callable) -> dict[str, Any]:
        """{"table" [first cutoff + clusters, D], "tail_0": {"down" [D, d], "table" [its ids, d]}, ...}."""
        if self.cutoffs[-1] >= rows:
            raise UsageError(f"cutoffs={self.cutoffs} leave none of {rows} ids to the last cluster: lower them")
        count = self.cutoffs[0] + len(self.cutoffs)
        table = Param((count, width), ("classes", "embed"), init, inputs=("embed",), role="head")
        spec: dict[str, Any] = {"table": table}
        for i, (start, stop) in enumerate(zip(self.cutoffs, (*self.cutoffs[1:], rows), strict=True)):
            inner = max(1, int(width / self.factor ** (i + 1)))
            # The share of tokens that are in the cluster, where the frequency of id r falls as 1 / (r + 1).
            passes = math.log((stop + 1) / (start + 1)) / math.log(rows + 1)
            spec[f"tail_{i}"] = {
                "down": Param((width, inner), ("embed", "rank"), init, inputs=("embed",), passes=passes),
                "table": Param((stop - start, inner), ("classes", "rank"), init, inputs=("rank",), passes=passes),
            }
        return spec

    def log_probs(self, p: dict[str, Any], x: jax.Array, valid: int | None = None) -> jax.Array:
        """log p [..., V] in float32 of every id, from hidden states [..., D]; ids from `valid` on are masked."""
        head = jax.nn.log_softmax(self.head_scores(p, x))
        parts = [head[..., : self.cutoffs[0]]]
        for i in range(len(self.cutoffs)):
            inside = jax.nn.log_softmax(self.tail_scores(p, i, x, valid))
            parts.append(jnp.maximum(head[..., self.cutoffs[0] + i, None] + inside, MASKED_LOGIT))
        return jnp.concatenate(parts, -1)

    def head_scores(self, p: dict[str, Any], x: jax.Array) -> jax.Array:
        """[..., first cutoff + clusters] in float32."""
        return unembed(p, x)

    def tail_scores(self, p: dict[str, Any], i: int, x: jax.Array, valid: int | None = None) -> jax.Array:
        """[..., ids of cluster i] in float32; those from `valid` on are masked."""
        if valid is not None and valid <= self.cutoffs[-1]:
            raise UsageError(f"cutoffs={self.cutoffs} leave none of {valid} ids to the last cluster: lower them")
        tail = p[f"tail_{i}"]
        scores = unembed(tail, project(x, tail["down"]).astype(x.dtype))
        return mask_padding(scores, None if valid is None else min(valid - self.cutoffs[i], scores.shape[-1]))

    def head_targets(self, targets: jax.Array) -> jax.Array:
        """What the head has to choose: the id itself, or its cluster's score."""
        return jnp.where(targets < self.cutoffs[0], targets, self.cutoffs[0] + self.cluster(targets))

    def cluster(self, targets: jax.Array) -> jax.Array:
        """The index of each id's cluster; -1 in the head."""
        return jnp.searchsorted(jnp.asarray(self.cutoffs), targets, side="right").astype(jnp.int32) - 1
