"""Predict what follows a prefix whose tokens all see one another."""

import dataclasses
from typing import Any

import jax
import numpy as np

from lm.objectives.causal import Causal


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The prefix language model (Raffel et al. 2019, 1910.10683, section 3.2; Dong et al. 2019, 1905.03197).

    The prefix's length is uniform from 1 to the last token, drawn for each row; only what follows it is predicted.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_tokens: int | None = None

    extra_ids = ()
    needs = ("prefix",)  # Of a model, see lm.train.run.resolve.
    context = 1  # See lm.data.stream.Objective.
    scores_text = False

    def __post_init__(self):
        self._causal()

    def window(self, seq_len: int) -> int:
        """The raw tokens behind a row of `seq_len`: each target is the token after."""
        return seq_len + 1

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """The causal row, and "prefix_B", the length of its prefix; targets inside the prefix weigh nothing."""
        batch = self._causal().corrupt(rng, row)
        length = len(batch["tokens_BL"])
        prefix = np.int32(rng.integers(1, length + 1))
        after = np.arange(1, length + 1) >= prefix
        return batch | {"weights_BL": batch["weights_BL"] * after.astype(np.float32), "prefix_B": prefix}

    def loss(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
    ) -> dict[str, tuple[jax.Array, jax.Array, float]]:
        """{name: (sum over the tokens after the prefixes, their number, coefficient)}."""
        return self._causal().loss(model, params, batch, key=key, frozen=frozen)

    def _causal(self):
        return Causal(self.label_smoothing, self.z_loss, self.chunk_tokens)
