"""A softmax over a binary tree of words, in which frequent ones are few steps from the root."""

import dataclasses
import functools
import heapq
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.layers.embed import embed


@dataclasses.dataclass(frozen=True)
class Hierarchical:
    """Hierarchical softmax (Mikolov et al. 2013, 1310.4546, section 2.1): -log p(target | h), normalised exactly.

    p is the product of sigmoid(+-h . v_n) over the inner nodes n above the target, with minus where the path takes the
    branch of code 1. The tree is Huffman's for the words' counts.
    """

    def arrays(self, rng: np.random.Generator, split: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """nodes_BLP and signs_BLP (1 or -1, 0 past the path's end) above each word; P is the longest path."""
        nodes, signs = _paths(split)
        return {"nodes_BLP": nodes[tokens], "signs_BLP": signs[tokens]}

    def loss(
        self,
        head: dict[str, Any],
        h_BNQD: jax.Array,
        pairs_BNQS: jax.Array,
        targets: Callable[[jax.Array], jax.Array],
        batch: dict[str, jax.Array],
    ) -> jax.Array:
        """The sum over pairs of vector and target; `targets` turns what words have, [B, L, ...], to [B, N, S, ...]."""
        v_BNSPD = targets(embed(head, batch["nodes_BLP"], h_BNQD.dtype.name))
        scores = jnp.einsum("bnqd,bnspd->bnqsp", h_BNQD, v_BNSPD, preferred_element_type=jnp.float32)
        signs = targets(batch["signs_BLP"])[:, :, None]
        nll = jnp.where(signs == 0, 0.0, -jax.nn.log_sigmoid(signs * scores))
        return jnp.sum(nll * pairs_BNQS[..., None])


def huffman(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(nodes int32 [V, P], signs float32 [V, P]): from the root down the inner nodes above each word with a count.

    Inner nodes are numbered from 0 in the order in which they join two parts, and the rarer part has code 1. Rows end
    with sign 0.
    """
    words = np.flatnonzero(counts)
    parts = [(int(counts[w]), i) for i, w in enumerate(words)]
    heapq.heapify(parts)
    above = np.full((2 * len(words) - 1, 2), -1)  # Of words, then of inner nodes: the node above, and the sign there.
    for node in range(len(words) - 1):
        (rarer, i), (other, j) = heapq.heappop(parts), heapq.heappop(parts)
        above[i], above[j] = (node, -1), (node, 1)
        heapq.heappush(parts, (rarer + other, len(words) + node))
    paths: dict[int, list[tuple[int, int]]] = {2 * len(words) - 2: []}
    for i in range(2 * len(words) - 3, -1, -1):
        node, sign = above[i].tolist()
        paths[i] = [*paths[len(words) + node], (node, sign)]
    longest = max(map(len, (paths[i] for i in range(len(words)))))
    nodes, signs = np.zeros((len(counts), longest), np.int32), np.zeros((len(counts), longest), np.float32)
    for i, w in enumerate(words):
        if paths[i]:
            nodes[w, : len(paths[i])], signs[w, : len(paths[i])] = np.transpose(paths[i])
    return nodes, signs


@functools.lru_cache(maxsize=2)
def _paths(split):
    return huffman(split.word_counts)
