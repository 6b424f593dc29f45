"""A linear-chain conditional random field: the tags of a row are scored together, by each and by each pair in turn."""

from typing import Any

import jax
import jax.numpy as jnp

from lm.core.params import Param, Uniform

FORBIDDEN = -1e30


def crf_spec(tags: int) -> dict[str, Param]:
    """{"transitions": [T, T] from row to column, "start", "end": [T]} for T tags (Lafferty et al. 2001).

    The form is that of Lample et al. 2016 (1603.01360, section 2.2), whose start and end are tags of their own.
    """
    init = Uniform(0.1)
    ends = {name: Param((tags,), ("classes",), init, role="vector") for name in ("start", "end")}
    return {"transitions": Param((tags, tags), ("rank", "classes"), init, role="vector")} | ends


def restricted(p: dict[str, jax.Array], allowed: dict[str, Any]) -> dict[str, jax.Array]:
    """`p` where `allowed`, bool arrays under some of its names, is true; elsewhere what no row of tags gets past."""
    return p | {name: jnp.where(jnp.asarray(may), p[name], FORBIDDEN) for name, may in allowed.items()}


def log_likelihood(
    p: dict[str, jax.Array], emissions_BLT: jax.Array, tags_BL: jax.Array, real_BL: jax.Array
) -> jax.Array:
    """[B] in float32: the logarithm of the probability of a row's tags; 0 for a row without tokens.

    `real_BL` is true for tokens, behind which all is padding.
    """
    return tag_score(p, emissions_BLT, tags_BL, real_BL) - log_partition(p, emissions_BLT, real_BL)


def tag_score(p: dict[str, jax.Array], emissions_BLT: jax.Array, tags_BL: jax.Array, real_BL: jax.Array) -> jax.Array:
    """[B] in float32: the sum of what the tags, their transitions and the two ends score."""
    emitted_BL = jnp.take_along_axis(emissions_BLT.astype(jnp.float32), tags_BL[..., None], -1)[..., 0]
    passed_BL = p["transitions"][tags_BL[:, :-1], tags_BL[:, 1:]]
    last_B = jnp.take_along_axis(tags_BL, jnp.maximum(jnp.sum(real_BL, 1, keepdims=True) - 1, 0), 1)[:, 0]
    ends_B = jnp.where(real_BL[:, 0], p["start"][tags_BL[:, 0]] + p["end"][last_B], 0.0)
    pairs_B = jnp.sum(jnp.where(real_BL[:, 1:], passed_BL, 0.0), 1)
    return jnp.sum(jnp.where(real_BL, emitted_BL, 0.0), 1) + pairs_B + ends_B


def log_partition(p: dict[str, jax.Array], emissions_BLT: jax.Array, real_BL: jax.Array) -> jax.Array:
    """[B] in float32: the logarithm of the sum of exp(score) over all rows of tags, by the forward algorithm."""

    # Made again for the gradient: of the T x T sums of each token none is kept.
    @jax.checkpoint
    def step(forward_BT, now):
        emissions_BT, real_B = now
        reached_BT = jax.nn.logsumexp(forward_BT[:, :, None] + p["transitions"][None], 1) + emissions_BT
        return jnp.where(real_B[:, None], reached_BT, forward_BT), None

    first_BT, rest = _steps(p, emissions_BLT, real_BL)
    forward_BT, _ = jax.lax.scan(step, first_BT, rest)
    return jnp.where(real_BL[:, 0], jax.nn.logsumexp(forward_BT + p["end"][None], 1), 0.0)


def marginals(p: dict[str, jax.Array], emissions_BLT: jax.Array, real_BL: jax.Array) -> jax.Array:
    """[B, L, T]: the probability of each tag of each token, 0 for padding: the gradient of the log partition."""
    return jax.grad(lambda e: jnp.sum(log_partition(p, e, real_BL)))(emissions_BLT.astype(jnp.float32))


def viterbi(p: dict[str, jax.Array], emissions_BLT: jax.Array, real_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tags int32 [B, L], 0 for padding; their score [B]): the best row of tags; of equals, the lower tag."""

    def step(best_BT, now):
        emissions_BT, real_B = now
        reached_BTT = best_BT[:, :, None] + p["transitions"][None]
        from_BT = jnp.where(real_B[:, None], jnp.argmax(reached_BTT, 1), jnp.arange(best_BT.shape[1])[None])
        return jnp.where(real_B[:, None], jnp.max(reached_BTT, 1) + emissions_BT, best_BT), from_BT

    def back(tag_B, from_BT):
        before_B = jnp.take_along_axis(from_BT, tag_B[:, None], 1)[:, 0]
        return before_B, tag_B

    first_BT, rest = _steps(p, emissions_BLT, real_BL)
    best_BT, from_LBT = jax.lax.scan(step, first_BT, rest)
    best_BT = best_BT + p["end"][None]
    first_B, tags_LB = jax.lax.scan(back, jnp.argmax(best_BT, 1), from_LBT, reverse=True)
    tags_BL = jnp.concatenate([first_B[None], tags_LB]).T.astype(jnp.int32)
    return jnp.where(real_BL, tags_BL, 0), jnp.where(real_BL[:, 0], jnp.max(best_BT, 1), 0.0)


def _steps(p, emissions_BLT, real_BL):
    """(scores [B, T] of the first token's tags, (emissions [L - 1, B, T], real [L - 1, B]) of the others)."""
    emissions_LBT = emissions_BLT.astype(jnp.float32).swapaxes(0, 1)
    return p["start"][None] + emissions_LBT[0], (emissions_LBT[1:], real_BL.T[1:])
