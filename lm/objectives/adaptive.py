"""The cross-entropy of an adaptive softmax, in which each word pays for its own cluster alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.layers.adaptive import Adaptive
from lm.objectives.cross_entropy import chunk_count, chunked

TAIL_TOKENS = 256  # Of one cluster at a time: large products, of which the last is half empty on average.


def adaptive_cross_entropy(
    form: Adaptive,
    valid: int | None,
    head: Any,
    x_BLD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
) -> jax.Array:
    """The sum of weights times -log p(target), in float32, where p is that of `form.log_probs`.

    Tokens are sorted by cluster, and each cluster scores as many blocks of TAIL_TOKENS as it has tokens. Gradients are
    taken with the loss, as in lm.objectives.cross_entropy.
    """
    return _nll(form, valid, head, x_BLD, targets_BL, weights_BL.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nll(form, valid, head, x, targets, weights):
    return _forward(form, valid, head, x, targets, weights)[0]


def _forward(form, valid, head, x, targets, weights):
    def chunk(head, part):
        x, targets, weights = part
        flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1), weights.reshape(-1)
        loss, dhead, dx = _loss_and_gradients(form, valid, head, *flat)
        return ({"loss": loss}, dhead), dx.reshape(x.shape)

    B, L = targets.shape
    chunks = chunk_count(B, L, head["table"].shape[0])
    (sums, dhead), dx = chunked(chunk, chunks, head, head, x, targets, weights)
    return sums["loss"], (jax.tree.map(lambda g, p: g.astype(p.dtype), dhead, head), dx)


def _backward(form, valid, gradients, g):
    dhead, dx = jax.tree.map(lambda a: (a.astype(jnp.float32) * g).astype(a.dtype), gradients)
    return dhead, dx, None, None


_nll.defvjp(_forward, _backward)


def _loss_and_gradients(form, valid, head, x_TD, targets_T, weights_T):
    """(the sum, its gradients by the head in float32 and by x)."""

    def of_head(head, x):
        return _summed(form.head_scores(head, x), form.head_targets(targets_T), weights_T)

    loss, (dhead, dx_TD) = jax.value_and_grad(of_head, (0, 1))(head, x_TD)
    dhead, dx_TD = jax.tree.map(lambda g: g.astype(jnp.float32), (dhead, dx_TD))
    T, clusters_T = len(targets_T), form.cluster(targets_T)
    size = min(TAIL_TOKENS, T)
    for i, start in enumerate(form.cutoffs):
        inside_T = (clusters_T == i) & (weights_T != 0)
        # Padded, because a slice that reaches beyond the end would be moved back.
        order_T = jnp.pad(jnp.argsort(~inside_T, stable=True), (0, -T % size))

        def block(carry, i=i, start=start, inside_T=inside_T, order_T=order_T):
            j, loss, dtail, dx_TD = carry
            rows_S = jax.lax.dynamic_slice(order_T, (j * size,), (size,))
            first = j * size + jnp.arange(size) < inside_T.sum()
            weights_S = jnp.where(first, weights_T[rows_S], 0)
            own_S = jnp.where(first, targets_T[rows_S] - start, 0)

            def of_tail(tail, x):
                return _summed(form.tail_scores({f"tail_{i}": tail}, i, x, valid), own_S, weights_S)

            more, (by_tail, by_x) = jax.value_and_grad(of_tail, (0, 1))(head[f"tail_{i}"], x_TD[rows_S])
            dtail = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), dtail, by_tail)
            return j + 1, loss + more, dtail, dx_TD.at[rows_S].add(by_x.astype(jnp.float32))

        def more(carry, inside_T=inside_T):
            return carry[0] * size < inside_T.sum()

        began = jnp.zeros((), jnp.int32), loss, dhead[f"tail_{i}"], dx_TD
        _, loss, dhead[f"tail_{i}"], dx_TD = jax.lax.while_loop(more, block, began)
    return loss, dhead, dx_TD.astype(x_TD.dtype)


def _summed(scores_TC, targets_T, weights_T):
    own_T = jnp.take_along_axis(scores_TC, targets_T[:, None], -1)[:, 0]
    return jnp.sum((jax.nn.logsumexp(scores_TC, -1) - own_T) * weights_T)
