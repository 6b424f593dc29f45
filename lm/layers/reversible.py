"""Reversible residual layers: their inputs are computed again from their outputs, so that none is kept."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# half(p, x, own, shared, kept) -> (the residual of x, what it wants to see again): `kept` is None in the forward pass.
Half = Callable[[Any, jax.Array, Any, Any, Any], tuple[jax.Array, Any]]
Streams = tuple[jax.Array, jax.Array]


def plain(
    halves: tuple[Half, ...], unroll: int, params: tuple[Any, ...], own: Any, shared: Any, streams: Streams
) -> tuple[Streams, tuple[Any, jax.Array]]:
    """(both streams after all repeats, (what the halves kept, the second stream [repeats, halves / 2, ...])).

    Each half adds to one stream what it makes of the other, (a, b) -> (b, a + half(b)), and an even number of them is
    run once a repeat (Gomez et al. 2017, 1707.04585; Kitaev et al. 2020, 2001.04451, section 3). `params`, a tree for
    each half, and `own` have the repeats as their leading dimension, `shared` is the same in all.
    """

    def body(streams, scanned):
        p, own = scanned
        a, b = streams
        kept, states = [], []
        for i, half in enumerate(halves):
            y, memory = half(p[i], b, own, shared, None)
            a, b = b, a + y
            kept.append(memory)
            states.append(b)
        return (a, b), (tuple(kept), jnp.stack(states[1::2]))

    return jax.lax.scan(body, streams, (params, own), unroll=unroll)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def reversible(halves, unroll, params, own, shared, streams):
    """The streams of `plain`, whose backward pass keeps the last ones alone, and what the halves ask for.

    Streams are to be float32: a sum in fewer bits cannot be undone. `own` and `shared` get no gradient.
    """
    return plain(halves, unroll, params, own, shared, streams)[0]


def _forward(halves, unroll, params, own, shared, streams):
    streams, (kept, _) = plain(halves, unroll, params, own, shared, streams)
    return streams, (params, own, shared, streams, kept)


def _backward(halves, unroll, residuals, cotangents):
    params, own, shared, streams, kept = residuals

    def body(carry, scanned):
        (a, b), (da, db) = carry
        p, own, kept = scanned
        gradients: list[Any] = [None] * len(halves)
        for i in reversed(range(len(halves))):

            def residual(p, x, i=i):
                return halves[i](p, x, own, shared, kept[i])[0]

            y, pull = jax.vjp(residual, p[i], a)
            gradients[i], dx = pull(db)
            a, b = b - y, a
            da, db = db, da + dx
        return ((a, b), (da, db)), tuple(gradients)

    carry = (streams, cotangents)
    (_, dstreams), gradients = jax.lax.scan(body, carry, (params, own, kept), reverse=True, unroll=unroll)
    return gradients, None, None, dstreams


reversible.defvjp(_forward, _backward)
