"""Which key a query may look at, formed on the device from indices and document numbers."""

import jax
import jax.numpy as jnp


def visible(
    query_BL: jax.Array,
    key_BS: jax.Array,
    query_documents_BL: jax.Array | None = None,
    key_documents_BS: jax.Array | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
) -> jax.Array:
    """[B, L, S] bool; a leading 1 of the indices (the same in all rows) stays 1 where no document differs.

    `query_BL` and `key_BS` are indices in the sequence or other places in an order, not positions. A causal window
    of W sees the token itself and the W - 1 before it; a bidirectional one sees W - 1 to each side.
    """
    distance = query_BL[:, :, None] - key_BS[:, None, :]
    seen = distance >= 0 if causal else jnp.full(distance.shape, True)
    if window is not None:
        seen &= jnp.abs(distance) < window
    if query_documents_BL is not None and key_documents_BS is not None:
        seen = seen & (query_documents_BL[:, :, None] == key_documents_BS[:, None, :])
    return seen
