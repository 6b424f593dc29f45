"""Recurrent layers: Elman's, gated recurrent units and long short-term memory, each with its own backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.params import Constant, Param
from lm.layers.linear import project
from lm.parallel.mesh import platform

State = dict[str, jax.Array]


# Two functions a cell. The first makes the new state of the gates [B, gates x H] and the state, and what the second
# needs, which takes the new state's cotangents to those of gates and state.


def _elman(gates: jax.Array, state: State) -> tuple[State, Any]:
    h = jnp.tanh(gates)
    return {"h": h}, 1 - h**2


def _elman_pull(kept: Any, cotangents: State) -> tuple[jax.Array, State]:
    return cotangents["h"] * kept, {"h": jnp.zeros_like(cotangents["h"])}


def _lstm(gates: jax.Array, state: State) -> tuple[State, Any]:
    # All four by one tanh, as sigmoid(x) is 1/2 + tanh(x / 2) / 2.
    half = jnp.repeat(jnp.array([[0.5, 0.5, 1.0, 0.5]], gates.dtype), gates.shape[-1] // 4, axis=1)
    gates = jnp.tanh(gates * half) * half + (1 - half)
    if platform() == "cpu":  # Which would take them anew for each of what they are part of.
        gates = jax.lax.optimization_barrier(gates)
    i, f, g, o = jnp.split(gates, 4, -1)
    c = f * state["c"] + i * g
    squashed = jnp.tanh(c)
    slopes = jnp.concatenate([g, state["c"], i, squashed], -1) * (half**2 - (gates - 1 + half) ** 2)
    return {"h": o * squashed, "c": c}, (slopes, o * (1 - squashed**2), f)


def _lstm_pull(kept: Any, cotangents: State) -> tuple[jax.Array, State]:
    slopes, slope_of_c, f = kept
    dh = cotangents["h"]
    dc = cotangents["c"] + dh * slope_of_c
    return jnp.concatenate([dc, dc, dc, dh], -1) * slopes, {"h": jnp.zeros_like(dh), "c": dc * f}


def _gru(gates: jax.Array, state: State) -> tuple[State, Any]:
    r, z, n_x, n_h = jnp.split(gates, 4, -1)
    r, z, h = jax.nn.sigmoid(r), jax.nn.sigmoid(z), state["h"]
    n = jnp.tanh(n_x + r * n_h)
    slope_of_n = (1 - z) * (1 - n**2)
    slopes = jnp.concatenate([slope_of_n * n_h * r * (1 - r), (h - n) * z * (1 - z), slope_of_n, slope_of_n * r], -1)
    return {"h": (1 - z) * n + z * h}, (slopes, z)


def _gru_pull(kept: Any, cotangents: State) -> tuple[jax.Array, State]:
    slopes, z = kept
    dh = cotangents["h"]
    return jnp.concatenate([dh] * 4, -1) * slopes, {"h": dh * z}


# Both functions of a cell; which of the gates its input and its state are summed into; and what it keeps. Elman 1990;
# Hochreiter and Schmidhuber 1997 with forget gates (Gers et al. 2000); Cho et al. 2014 (1406.1078), whose reset comes
# after the product, as cuDNN and torch have it.
_CELLS: dict[str, tuple[Callable, Callable, tuple[int, ...], tuple[int, ...], tuple[str, ...]]] = {
    "elman": (_elman, _elman_pull, (0,), (0,), ("h",)),
    "lstm": (_lstm, _lstm_pull, (0, 1, 2, 3), (0, 1, 2, 3), ("h", "c")),
    "gru": (_gru, _gru_pull, (0, 1, 2), (0, 1, 3), ("h",)),
}
CELLS = tuple(_CELLS)


def recurrent_spec(cell: str, inputs: int, width: int, init: Callable) -> dict[str, Param]:
    """{"input" [D, gates of the input, H], "state" [H, gates of the state, H], "bias" [gates, H], which is zero}."""
    _, _, of_input, of_state, _ = _CELLS[cell]
    count = max(of_input + of_state) + 1
    return {
        "input": Param((inputs, len(of_input), width), ("embed", "gates", "mlp"), init, inputs=("embed",)),
        "state": Param((width, len(of_state), width), ("embed_out", "gates", "mlp"), init, inputs=("embed_out",)),
        "bias": Param((count, width), ("gates", "mlp"), Constant(), role="vector"),
    }


def state_spec(cell: str, batch_size: int, width: int) -> dict[str, Param]:
    """What continues a sequence, zero at its begin: {"h" [B, H]} and for an LSTM "c", in float32."""
    return {
        name: Param((batch_size, width), ("batch", "act_mlp"), Constant(), role="vector", trainable=False)
        for name in _CELLS[cell][4]
    }


def recurrent(
    cell: str, p: dict[str, jax.Array], x_LBD: jax.Array, state: State, keep_LB: jax.Array | None = None
) -> State:
    """The states after each token, [L, B, H] in float32, of rows that continue `state`; "h" is the output.

    Time is the first dimension. Where `keep_LB`, of zeros and ones, is 0 a token starts from zeros instead; it has no
    gradient. Products are of x's dtype, and summed in float32 like all else.
    """
    gates = input_gates(cell, p["input"], x_LBD) + p["bias"].reshape(1, 1, -1)
    return _run(cell, x_LBD.dtype, gates, p["state"].reshape(p["state"].shape[0], -1), state, keep_LB)


def input_gates(cell: str, kernel: jax.Array, x: jax.Array) -> jax.Array:
    """[..., gates x H] in float32: what inputs [..., D] add to a cell's gates through their kernel [D, gates, H]."""
    _, _, of_input, of_state, _ = _CELLS[cell]
    return _place(project(x, kernel.reshape(x.shape[-1], -1)), of_input, max(of_input + of_state) + 1)


def state_gates(cell: str, kernel: jax.Array, h: jax.Array) -> jax.Array:
    """The same of states [..., H] through theirs, [H, gates, H]."""
    _, _, of_input, of_state, _ = _CELLS[cell]
    return _place(project(h, kernel.reshape(h.shape[-1], -1)), of_state, max(of_input + of_state) + 1)


def advance(cell: str, gates: jax.Array, state: State) -> State:
    """The state after a token, from all that was added to its gates [B, gates x H]."""
    return _CELLS[cell][0](gates, state)[0]


def continuing(documents_BL: jax.Array) -> jax.Array:
    """The float32 `keep_LB` of rows of documents: 0 where one begins inside the row."""
    same = documents_BL[:, 1:] == documents_BL[:, :-1]
    return jnp.pad(same, ((0, 0), (1, 0)), constant_values=True).astype(jnp.float32).T


def last(before: State, states: State, lengths_B: jax.Array | None) -> State:
    """The states [B, H] after each row's last token, of those after each, [L, B, H]; `before` of rows without one."""
    if lengths_B is None:
        return {name: s[-1] for name, s in states.items()}
    at = jnp.maximum(lengths_B - 1, 0), jnp.arange(len(lengths_B))
    return {name: jnp.where(lengths_B[:, None] > 0, s[at], before[name]) for name, s in states.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(cell, dtype, gates_LBG, kernel_HG, state, keep_LB):
    return _forward(cell, dtype, gates_LBG, kernel_HG, state, keep_LB)[0]


def _forward(cell, dtype, gates_LBG, kernel_HG, state, keep_LB):
    update, _, _, of_state, _ = _CELLS[cell]
    factor_HG, count = kernel_HG.astype(dtype), gates_LBG.shape[-1] // kernel_HG.shape[0]

    def step(state, now):
        gates, keep = now
        state = _kept(state, keep)
        gates = gates + _place(_dot(state["h"].astype(dtype), factor_HG), of_state, count)
        state, kept = update(gates, state)
        return state, (kept, state)

    # XLA:CPU runs what is independent in a loop's body side by side only where there is enough of it; in bfloat16 that
    # gains nothing.
    unroll = 8 if platform() == "cpu" and dtype == jnp.float32 else 1
    _, (kept, states) = jax.lax.scan(step, state, (gates_LBG, keep_LB), unroll=unroll)
    return states, (kept, kernel_HG, state, states, keep_LB)


def _backward(cell, dtype, residuals, cotangents):
    # Differentiated by itself, the loop would add to the kernel's gradient at every token: here it is one product.
    _, pull, _, of_state, _ = _CELLS[cell]
    kept, kernel_HG, first, states, keep_LB = residuals
    kernel_GH = jax.lax.optimization_barrier(kernel_HG.T.astype(dtype))  # Transposed once, not at every token.

    def step(after, now):
        kept, own, keep = now
        dgates, dstate = pull(kept, jax.tree.map(jnp.add, after, own))
        from_state = _taken(dgates, of_state, kernel_HG).astype(dtype)
        dstate["h"] = dstate["h"] + _dot(from_state, kernel_GH)
        return _kept(dstate, keep), dgates

    zeros = jax.tree.map(jnp.zeros_like, first)
    dfirst, dgates_LBG = jax.lax.scan(step, zeros, (kept, cotangents, keep_LB), reverse=True)
    entered = _kept({"h": jnp.concatenate([first["h"][None], states["h"][:-1]])}, keep_LB)
    h_TH = entered["h"].reshape(-1, kernel_HG.shape[0]).astype(dtype)
    dgates_TG = _taken(dgates_LBG, of_state, kernel_HG).reshape(h_TH.shape[0], -1).astype(dtype)
    dkernel_HG = _dot(h_TH.T, dgates_TG).astype(kernel_HG.dtype)
    return dgates_LBG, dkernel_HG, dfirst, None if keep_LB is None else jnp.zeros_like(keep_LB)


_run.defvjp(_forward, _backward)


def _kept(state, keep):
    return state if keep is None else jax.tree.map(lambda s: s * keep[..., None], state)


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _place(sums, blocks, count):
    """[..., count x H]: the blocks of `sums` where they belong among `count`, zeros elsewhere."""
    if len(blocks) == count:
        return sums
    parts = dict(zip(blocks, jnp.split(sums, len(blocks), -1), strict=True))
    zeros = jnp.zeros_like(parts[blocks[0]])
    return jnp.concatenate([parts.get(i, zeros) for i in range(count)], -1)


def _taken(gates, blocks, kernel_HG):
    """The transpose of `_place`."""
    count = gates.shape[-1] // kernel_HG.shape[0]
    if len(blocks) == count:
        return gates
    parts = jnp.split(gates, count, -1)
    return jnp.concatenate([parts[i] for i in blocks], -1)
