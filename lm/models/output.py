"""What every model's `apply` returns."""

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class Output:
    """Hidden states before the head, and whatever came along with them.

    `cache` continues the sequence (None unless one was given), `aux` holds further loss terms as
    {name: (sum, weight, coefficient)}, `captured` what `capture` asked for.
    """

    hidden_BLD: jax.Array
    cache: Any = None
    aux: dict[str, Any] = flax.struct.field(default_factory=dict)
    captured: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
