"""Routed experts in place of the feed-forward layer: the router, its losses, and each token's own experts."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.core import params as specs
from lm.core.errors import UsageError, check_given, check_positive
from lm.layers.activations import activation
from lm.layers.grouped import grouped_matmul
from lm.layers.linear import linear, linear_spec
from lm.layers.mlp import mlp_spec
from lm.parallel import rules
from lm.parallel.rules import RULES, constrain, partition


@dataclasses.dataclass(frozen=True)
class Experts:
    """`count` feed-forward layers without biases, of which each token passes the `chosen` most probable ones.

    `mlp_width` is each one's (None: the model's). Outputs are weighted by the router's probabilities, which
    `normalize` divides by their sum over the chosen ones (Mixtral); Switch's single one keeps its own. With a
    `capacity_factor` an expert takes only that many times its even share of a row's choices, rounded up, in the order
    of the tokens; what comes later passes by on the residual.
    `balance` and `router_z` are the coefficients of each layer's two losses.
    """

    count: int
    chosen: int
    mlp_width: int | None = None
    normalize: bool = True
    capacity_factor: float | None = None
    balance: float = 0.01
    router_z: float = 0.0

    def __post_init__(self):
        check_positive(**{"experts.count": self.count, "experts.chosen": self.chosen})
        check_given(self, "mlp_width", "capacity_factor")
        if self.chosen > self.count:
            raise UsageError(f"experts.chosen={self.chosen} is more than experts.count={self.count}")
        if self.chosen == 1 and self.normalize:
            raise UsageError(
                "experts.chosen=1 with experts.normalize=True: the weight of a single choice is then always 1, and no "
                "loss of the outputs reaches the router; set normalize=False, or more than one chosen"
            )
        for name in ("balance", "router_z"):
            if getattr(self, name) < 0:
                raise UsageError(f"experts.{name}={getattr(self, name)} must not be negative; 0 switches it off")

    @property
    def coefficients(self) -> dict[str, float]:
        """{name: coefficient} of the sums that `experts` returns."""
        return {"balance": self.balance} | ({"router_z": self.router_z} if self.router_z else {})


def experts_spec(
    form: Experts, width: int, mlp_width: int, gated: bool, init: Callable, out_init: Callable
) -> dict[str, Any]:
    """{"router"} and the mlp's kernels, stacked along a leading "experts" axis."""
    # The router's outputs are named as those of any classifier: its kernel is one matrix, not a stack, and is whole
    # on every device, whose tokens may choose any expert.
    router = linear_spec({"embed": width}, {"classes": form.count}, init, bias=False)
    mlps = mlp_spec(width, mlp_width, gated, False, init, out_init)
    routed = specs.stack(mlps, form.count, "experts", passes=form.chosen / form.count)
    return {"router": specs.map_spec(lambda p: dataclasses.replace(p, role="router"), router)} | routed


def experts(
    form: Experts, p: dict[str, Any], x_BLD: jax.Array, name: str, real_BL: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """([B, L, D] in x's dtype, {"balance", "router_z" where it counts}: sums over the tokens).

    `name` is the activation; tokens where `real_BL` is false are padding, and count nowhere. Without a capacity factor
    every token reaches all its experts. Shazeer et al. 2017 (1701.06538); Fedus et al. 2021 (2101.03961, Switch), from
    whom two things differ: groups are rows, so that no figure depends on how a batch is divided, and with several
    choices a token's second comes before the next token's first, so that what is dropped depends on the past alone.
    """
    real_BL = jnp.ones(x_BLD.shape[:2], bool) if real_BL is None else real_BL
    # float32, Switch's selective precision: rounded logits choose other experts.
    logits_BLE = linear(p["router"], x_BLD.astype(jnp.float32))
    logits_BLE = constrain(logits_BLE, "batch", "length", None)
    probabilities_BLE = jax.nn.softmax(logits_BLE, -1)
    weights_BLJ, chosen_BLJ = jax.lax.top_k(probabilities_BLE, form.chosen)
    if form.normalize:
        weights_BLJ = weights_BLJ / jnp.sum(weights_BLJ, -1, keepdims=True)
    sums = {"balance": jnp.sum(_balance(probabilities_BLE, chosen_BLJ, real_BL))}
    if form.router_z:
        z_BL = jnp.square(jax.nn.logsumexp(logits_BLE, -1))  # ST-MoE, Zoph et al. 2022 (2202.08906), eq. 5.
        sums["router_z"] = jnp.sum(z_BL * real_BL)
    if form.capacity_factor is not None:
        # No expert has the number `count`: what is sent there is dropped.
        chosen_BLJ = jnp.where(_within_capacity(form, chosen_BLJ, real_BL), chosen_BLJ, form.count)
    return _exchange(form.count, p, x_BLD, chosen_BLJ, weights_BLJ, name), sums


def _balance(probabilities_BLE, chosen_BLJ, real_BL):
    """[B]: Switch's eq. 4 to 6 without the coefficient, each row a group that weighs as many as its real tokens.

    1 a token where choices spread evenly, `count` / `chosen` where all tokens choose the same.
    """
    count = probabilities_BLE.shape[-1]
    tokens_B = jnp.maximum(real_BL.sum(-1), 1)
    choices_BE = (jax.nn.one_hot(chosen_BLJ, count) * real_BL[..., None, None]).mean(2).sum(1)
    mass_BE = (probabilities_BLE * real_BL[..., None]).sum(1)
    return count * (choices_BE * mass_BE).sum(-1) / tokens_B


def _within_capacity(form, chosen_BLJ, real_BL):
    """[B, L, J] bool: whether the expert still has room when the choice arrives."""
    B, L, J = chosen_BLJ.shape
    taken_BLJE = jax.nn.one_hot(chosen_BLJ, form.count, dtype=jnp.int32) * real_BL[..., None, None]
    place_BLJE = jnp.cumsum(taken_BLJE.reshape(B, L * J, -1), 1).reshape(taken_BLJE.shape)
    place_BLJ = jnp.take_along_axis(place_BLJE, chosen_BLJ[..., None], -1)[..., 0]
    # Of the real tokens, so that a longer row of padding has no more room.
    room_B = jnp.ceil(form.capacity_factor * J / form.count * real_BL.sum(-1))
    return (place_BLJ <= room_B[:, None, None]) & real_BL[..., None]


def _exchange(count, p, x_BLD, chosen_BLJ, weights_BLJ, name):
    """[B, L, D]: each token's chosen experts, weighted, whichever device holds them.

    The devices that share out the experts gather one another's tokens, run their own experts on those that chose them,
    and scatter the sums back: exact whatever the choices, where an exchange of fixed size would have to drop some.
    """
    kernels = {k: v["kernel"] for k, v in p.items() if k != "router"}
    sizes = rules.sizes()
    if math.prod(sizes.values()) == 1:
        return _mix(kernels, x_BLD, chosen_BLJ, weights_BLJ, name, 0).astype(x_BLD.dtype)
    over_experts, over_features = (tuple(a for a in RULES[axis] if sizes.get(a, 1) > 1) for axis in ("experts", "mlp"))

    def local(kernels, *tokens):
        first = 0
        if over_experts:
            first = jax.lax.axis_index(over_experts) * kernels["up"].shape[0]
            tokens = jax.lax.all_gather(tokens, over_experts, tiled=True)
        y_BLD = _mix(kernels, tokens[0], tokens[1], tokens[2], name, first)
        if over_experts:
            y_BLD = jax.lax.psum_scatter(y_BLD, over_experts, tiled=True)
        y_BLD = jax.lax.psum(y_BLD, over_features) if over_features else y_BLD
        return y_BLD.astype(x_BLD.dtype)

    axes = {k: ("experts", "mlp", None) if k == "down" else ("experts", None, "mlp") for k in kernels}
    rows = partition(("batch", "length", None), x_BLD.shape, sizes)
    each = jax.shard_map(
        local,
        in_specs=({k: partition(axes[k], v.shape, sizes) for k, v in kernels.items()}, rows, rows, rows),
        out_specs=rows,
        check_vma=False,
    )
    return each(kernels, x_BLD, chosen_BLJ, weights_BLJ)


def _mix(kernels, x_BLD, chosen_BLJ, weights_BLJ, name, first):
    """[B, L, D] in float32: the weighted sum of the experts from number `first` on, whose kernels these are."""
    count, choices = kernels["up"].shape[0], chosen_BLJ.shape[-1]
    expert_R = chosen_BLJ.reshape(-1) - first
    expert_R = jnp.where((expert_R >= 0) & (expert_R < count), expert_R, count)  # Those of others sort last.
    order_R = jnp.argsort(expert_R)
    back_R = jnp.argsort(order_R)
    sizes_E = jnp.sum(expert_R[:, None] == jnp.arange(count)[None, :], 0, dtype=jnp.int32)
    x_RD = _permuted(jnp.repeat(x_BLD.reshape(-1, x_BLD.shape[-1]), choices, 0), order_R, back_R)
    hidden_RF = grouped_matmul(x_RD, kernels["up"], sizes_E).astype(x_RD.dtype)
    if "gate" in kernels:
        gate_RF = grouped_matmul(x_RD, kernels["gate"], sizes_E).astype(x_RD.dtype)
        hidden_RF = activation(name, gate_RF) * hidden_RF
    else:
        hidden_RF = activation(name, hidden_RF)
    y_RD = _permuted(grouped_matmul(hidden_RF, kernels["down"], sizes_E), back_R, order_R)
    y_BLJD = y_RD.reshape(*chosen_BLJ.shape, -1)
    return jnp.sum(y_BLJD * weights_BLJ[..., None], 2)


@jax.custom_vjp
def _permuted(x, order, back):
    """x[order], whose gradient is g[back]: autodiff would scatter, which XLA:CPU does a row at a time."""
    return x[order]


_permuted.defvjp(lambda x, order, back: (x[order], back), lambda back, g: (g[back], None, None))
