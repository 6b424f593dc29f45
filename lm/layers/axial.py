"""Axial position embeddings: a place's vector is that of its row beside that of its column."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lm.core.errors import UsageError, check_positive
from lm.core.params import Normal, Param
from lm.layers.embed import embed, embed_spec


@dataclasses.dataclass(frozen=True)
class Axial:
    """Places 0, 1, ... fill a rectangle of `shape` row by row; `widths` are those of a row's and a column's vector.

    Reformer's (Kitaev et al. 2020, 2001.04451; its authors' trax): two tables of n + m rows for n x m places.
    """

    shape: tuple[int, int] = (64, 64)
    widths: tuple[int, int] = (64, 192)
    init_std: float = 1.0

    def __post_init__(self):
        check_positive(init_std=self.init_std)
        if len(self.shape) != 2 or len(self.widths) != 2 or min(*self.shape, *self.widths) < 1:
            raise UsageError(f"axial.shape={self.shape} and axial.widths={self.widths} must be two positive sizes each")

    @property
    def places(self) -> int:
        return math.prod(self.shape)


def axial_spec(form: Axial) -> dict[str, dict[str, Param]]:
    """{"rows": {"table"}, "columns": {"table"}}."""
    init = Normal(form.init_std)
    pairs = zip(("rows", "columns"), form.shape, form.widths, strict=True)
    return {name: embed_spec(places, width, init, axis="positions") for name, places, width in pairs}


def axial_embed(form: Axial, p: dict[str, dict[str, jax.Array]], positions: jax.Array, dtype: str) -> jax.Array:
    """[..., D] in `dtype`, D the sum of the widths."""
    row, column = positions // form.shape[1], positions % form.shape[1]
    return jnp.concatenate([embed(p["rows"], row, dtype), embed(p["columns"], column, dtype)], -1)
