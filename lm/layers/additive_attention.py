"""Additive attention over a source, inside a recurrent layer that attends before each of its steps."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm.core.params import Param
from lm.layers.linear import project
from lm.layers.recurrent import State, advance, input_gates, state_gates

_MASKED = -1e30


Source = dict[str, jax.Array]  # "memory" [B, S, D], its "keys" [B, S, R], and "real" [B, S], 0 at padding.


def additive_spec(query: int, memory: int, width: int, init: Callable) -> dict[str, Param]:
    """{"query" [H, R], "key" [D, R], "score" [R]}."""
    return {
        "query": Param((query, width), ("embed", "mlp"), init, inputs=("embed",)),
        "key": Param((memory, width), ("embed", "mlp"), init, inputs=("embed",)),
        "score": Param((width,), ("mlp",), init, role="vector"),
    }


def as_source(p: dict[str, jax.Array], memory_BSD: jax.Array, real_BS: jax.Array) -> Source:
    """The memory with its keys, the same for all queries; `real_BS` is float32."""
    return {"memory": memory_BSD, "keys": project(memory_BSD, p["key"]).astype(memory_BSD.dtype), "real": real_BS}


def attentive(
    cell: str,
    p: dict[str, jax.Array],
    attention: dict[str, jax.Array],
    x_LBD: jax.Array,
    state: State,
    source: Source,
) -> tuple[State, jax.Array, jax.Array]:
    """(the states after each token [L, B, H], the contexts they were made from [L, B, D] and the attention's weights
    [L, B, S]), in float32, of rows that continue `state`.

    A score is v' tanh(W s + U h) of the state s before the token and a place h of the memory (Bahdanau et al. 2014,
    1409.0473, appendix A.1.2); the cell, whose spec counts the memory's width among its inputs, takes the token and
    the memory's mean by the scores' softmax. Rows without a real place have a context of zeros.
    """
    width = x_LBD.shape[-1]
    gates_LBG = input_gates(cell, p["input"][:width], x_LBD) + p["bias"].reshape(1, 1, -1)
    queries_LBR = jnp.zeros((*x_LBD.shape[:2], attention["query"].shape[-1]))
    kernels = {"context": p["input"][width:], "state": p["state"], "query": attention["query"]}
    return _run(cell, x_LBD.dtype, kernels, (gates_LBG, queries_LBR), attention["score"], state, source)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(cell, dtype, kernels, sums, score_R, state, source):
    return _loop(cell, dtype, kernels, sums, score_R, state, source)


def _loop(cell, dtype, kernels, sums, score_R, state, source):
    kernels = jax.tree.map(lambda kernel: kernel.astype(dtype), kernels)

    # What is B x S x R would be kept for each token.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, sums):
        gates_BG, query_BR = sums
        h_BH = state["h"].astype(dtype)
        weights_BS = _weights(score_R, query_BR + project(h_BH, kernels["query"]), source)
        context_BD = jnp.einsum("bs,bsd->bd", weights_BS, source["memory"].astype(jnp.float32))
        gates_BG = gates_BG + input_gates(cell, kernels["context"], context_BD.astype(dtype))
        state = advance(cell, gates_BG + state_gates(cell, kernels["state"], h_BH), state)
        return state, (state, context_BD, weights_BS)

    return jax.lax.scan(step, state, sums)[1]


def _forward(cell, dtype, kernels, sums, score_R, state, source):
    found, pull = jax.vjp(functools.partial(_loop, cell, dtype, kernels), sums, score_R, state, source)
    return found, (kernels, state, found, pull)


def _backward(cell, dtype, residuals, cotangents):
    # Differentiated by itself, the loop would add to the kernels' gradients at every token: here they are one product.
    kernels, first, (states, contexts_LBD, _), pull = residuals
    dsums, *others = pull(cotangents)
    h_LBH = jnp.concatenate([first["h"][None], states["h"][:-1]]).astype(dtype)

    def added(kernels):
        gates_LBG = input_gates(cell, kernels["context"], contexts_LBD.astype(dtype))
        return gates_LBG + state_gates(cell, kernels["state"], h_LBH), project(h_LBH, kernels["query"])

    return *jax.vjp(added, kernels)[1](dsums), dsums, *others


_run.defvjp(_forward, _backward)


def _weights(score_R: jax.Array, query_BR: jax.Array, source: Source) -> jax.Array:
    """[B, S] in float32."""
    scores_BS = jnp.einsum("bsr,r->bs", jnp.tanh(query_BR[:, None] + source["keys"].astype(jnp.float32)), score_R)
    return jax.nn.softmax(jnp.where(source["real"] > 0, scores_BS, _MASKED)) * source["real"]
