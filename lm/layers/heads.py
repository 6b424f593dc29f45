"""Heads for tasks: a class for the row or for each token, an answer's two ends, or one of several choices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.errors import UsageError, check_choice, check_given
from lm.layers.activations import ACTIVATIONS, activation
from lm.layers.dropout import dropout, fold
from lm.layers.linear import linear, linear_spec
from lm.layers.norm import norm, norm_spec

_OUTPUTS = {"sequence": None, "tokens": None, "span": 2, "choice": 1}  # None: one a label.
POOLS = ("first", "last", "first_real", "last_real", "mean")


@dataclasses.dataclass(frozen=True)
class TaskHead:
    """What is scored, and the layers that score it.

    `kind`: "sequence" gives a row one score a label, "tokens" each token, "span" each token two (start and end of an
    answer), "choice" each of several rows one (BERT, 1810.04805, section 4). Rows are pooled: the first or last place;
    the first or last token that is no padding; or the mean of those. Padding is `pad_id` where given, else what belongs
    to document -1. `dense` names the activation of a layer before the scores, which has a layer norm of `norm_eps`
    after it where that is given; `dense_dropout` comes before that layer, `dropout` before the scores.
    """

    kind: str = "sequence"
    labels: tuple[str, ...] = ()
    pool: str = "first"
    pad_id: int | None = None
    dense: str | None = None
    dense_bias: bool = True
    norm_eps: float | None = None
    norm_bias: bool = True
    bias: bool = True
    dense_dropout: float = 0.0
    dropout: float = 0.0

    def __post_init__(self):
        check_choice("kind", self.kind, _OUTPUTS)
        check_choice("pool", self.pool, POOLS)
        check_given(self, "norm_eps")
        if self.dense is not None:
            check_choice("dense", self.dense, ACTIVATIONS)
        if bool(self.labels) != (_OUTPUTS[self.kind] is None):
            raise UsageError(f"labels={self.labels} with kind={self.kind!r}: 'sequence' and 'tokens' alone need them")
        if not self.pools and (self.pool != "first" or self.pad_id is not None):
            raise UsageError(f"pool={self.pool!r} and pad_id={self.pad_id} have no effect with kind={self.kind!r}")
        if self.dense is None and (self.norm_eps is not None or self.dense_dropout):
            raise UsageError("norm_eps and dense_dropout have no effect with dense=None: name its activation")
        for name in ("dense_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 0 and below 1")

    @property
    def pools(self) -> bool:
        """Whether a row is scored, not each of its tokens."""
        return self.kind in ("sequence", "choice")

    def spec(self, width: int, init: Callable) -> dict[str, Any]:
        """{"out"} and, with `dense`, {"dense", "norm"}."""
        spec: dict[str, Any] = {}
        if self.dense is not None:
            spec["dense"] = linear_spec({"embed": width}, {"embed_out": width}, init, self.dense_bias)
        if self.norm_eps is not None:
            spec["norm"] = norm_spec({"norm": width}, self.norm_bias)
        outputs = _OUTPUTS[self.kind] or len(self.labels)
        return spec | {"out": linear_spec({"embed": width}, {"classes": outputs}, init, self.bias)}

    def pooled(self, x_BLD: jax.Array, real_BL: jax.Array) -> jax.Array:
        """[B, D], by `pool`; `real_BL` is true where a token is no padding."""
        if self.pool == "mean":
            weights = real_BL[..., None].astype(jnp.float32)
            return (jnp.sum(x_BLD * weights, 1) / jnp.maximum(jnp.sum(weights, 1), 1)).astype(x_BLD.dtype)
        B, L = real_BL.shape
        index = jnp.where(real_BL, jnp.arange(L)[None, :], 0)
        place = {"first": 0, "last": L - 1, "first_real": jnp.argmax(real_BL, 1), "last_real": jnp.max(index, 1)}
        return x_BLD[jnp.arange(B), place[self.pool]]

    def apply(self, p: dict[str, Any], x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[..., outputs] in float32 for any hidden states [..., D]; `key` turns dropout on."""
        if self.dense is not None:
            x = activation(self.dense, linear(p["dense"], dropout(x, self.dense_dropout, fold(key, 0))))
        if self.norm_eps is not None:
            x = norm(p["norm"], x, "layernorm", self.norm_eps)
        return linear(p["out"], dropout(x, self.dropout, fold(key, 1))).astype(jnp.float32)
