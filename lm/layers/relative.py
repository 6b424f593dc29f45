"""Relative positions as vectors added to keys and values, one a distance up to where it is clipped (Shaw)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.errors import check_positive
from lm.core.params import Param
from lm.layers.attention_blocks import HIDDEN, MAX_QUERIES, MIN_QUERIES, dot, drop
from lm.layers.masks import visible
from lm.layers.transformer_xl import by_key


@dataclasses.dataclass(frozen=True)
class Relative:
    """A table for the keys of a layer and, with `values`, one for its values (Shaw et al. 2018, 1803.02155).

    Distances beyond `clip` share a vector; all heads share the tables.
    """

    clip: int = 16
    values: bool = True

    def __post_init__(self):
        check_positive(clip=self.clip)

    def spec(self, head_dim: int, causal: bool, init: Callable) -> dict[str, Param]:
        """{"keys", "values"}: [distances, C], from `clip` ahead, or from 0 where that is hidden, to `clip` behind."""
        shape = (self.clip + 1 if causal else 2 * self.clip + 1, head_dim)
        table = Param(shape, ("positions", "head_dim"), init, inputs=("positions",), role="embedding")
        return {"keys": table, "values": table} if self.values else {"keys": table}


def attend(
    form: Any,
    p: dict[str, jax.Array],
    q_BLHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    starts_B: jax.Array | None = None,
    documents: tuple[jax.Array, jax.Array] | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """o_BLHC: weights of q (k + a) times v + a', a and a' by the distance of the pair (equations 3 and 4).

    The arguments are those of lm.layers.attention.attention; `p` has the tables. Distances are those of the indices
    in the sequence. Scores are made a block of queries at a time, and again for the gradient. The terms with the tables
    are products by distance, shifted to the keys, so that no vector a pair is made; they cost as much as those by key.
    """
    B, L = q_BLHC.shape[:2]
    first_B = jnp.zeros(B, jnp.int32) if starts_B is None else starts_B
    size, blocks = max(MIN_QUERIES, min(L // 2, MAX_QUERIES)), []
    for i, first in enumerate(range(0, L, size)):
        rows = slice(first, min(first + size, L))
        columns = slice(0, rows.stop if form.causal and starts_B is None else k_BSKC.shape[1])
        pair = None if documents is None else (documents[0][:, rows], documents[1][:, columns])
        block_key = None if key is None or form.dropout == 0.0 else jax.random.fold_in(key, i)
        arrays = q_BLHC[:, rows], k_BSKC[:, columns], v_BSKC[:, columns]
        blocks.append(_block(form, p, *arrays, first_B + first, pair, block_key))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, 1)


@functools.partial(jax.checkpoint, static_argnums=0)
def _block(form, p, q_BLHC, k_BSKC, v_BSKC, first_B, documents, key):
    (B, L, H, C), (S, K) = q_BLHC.shape, k_BSKC.shape[1:3]
    q_BKGLC = q_BLHC.reshape(B, L, K, H // K, C).transpose(0, 2, 3, 1, 4)
    # Row i of the queries meets key j at L - i + j of these, as `by_key` has it.
    behind_BR = first_B[:, None] + L - jnp.arange(S + L)[None, :]
    last = p["keys"].shape[0] - 1
    rows_BR = jnp.clip(behind_BR if form.causal else behind_BR + last // 2, 0, last)

    def shifted(scores_BKGLR):
        return by_key(scores_BKGLR.reshape(B, H, L, S + L), S).reshape(B, K, H // K, L, S)

    by_distance = dot("bkglc,brc->bkglr", q_BKGLC, p["keys"].astype(q_BLHC.dtype)[rows_BR])
    scale = form.scale or C**-0.5
    scores = scale * (dot("bkglc,bskc->bkgls", q_BKGLC, k_BSKC) + shifted(by_distance))
    query_BL, key_BS = first_B[:, None] + jnp.arange(L)[None, :], jnp.arange(S)[None, :]
    seen_BLS = visible(query_BL, key_BS, *(documents or ()), causal=form.causal)
    weights = drop(form, jax.nn.softmax(jnp.where(seen_BLS[:, None, None], scores, HIDDEN), -1), key)
    o_BKGLC = dot("bkgls,bskc->bkglc", weights.astype(v_BSKC.dtype), v_BSKC)
    if "values" in p:
        (by_distance,) = jax.linear_transpose(shifted, by_distance)(weights)
        values_BRC = p["values"].astype(v_BSKC.dtype)[rows_BR]
        o_BKGLC += dot("bkglr,brc->bkglc", by_distance.astype(v_BSKC.dtype), values_BRC)
    return o_BKGLC.transpose(0, 3, 1, 2, 4).reshape(B, L, H, C).astype(q_BLHC.dtype)
