"""The E-step of expectation-maximisation: the likelihood under hidden states, whose gradient is expected counts."""

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Expectation:
    """-log p(tokens), summed over all paths of hidden states, for lm.train.optimizers.Maximization.

    Its gradient is minus the expected count of each begin, transition and emission per token (Dempster, Laird and
    Rubin 1977; Rabiner 1989, section III.C; Eisner 2016, "Inside-outside and forward-backward algorithms are just
    backprop"). Each document is a sequence of its own. By the chain rule the loss is the mean over one-step predictions
    that lm.objectives.causal.Causal has, and the first token of a sequence is predicted too.
    """

    extra_ids = ()
    needs = ("states",)  # Of a model, see lm.train.run.resolve.
    gradient = "counts"  # And of an optimizer.
    scores_text = True

    def window(self, seq_len: int) -> int:
        """The raw tokens behind a row of `seq_len`: all of them are predicted."""
        return seq_len

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """One row of a batch from row = {"tokens": [W] int, "documents": [W] int, -1 at padding}; nothing is random."""
        tokens, documents = (np.asarray(row[name], np.int32) for name in ("tokens", "documents"))
        return {"tokens_BL": tokens, "documents_BL": documents, "weights_BL": (documents >= 0).astype(np.float32)}

    def loss(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
    ) -> dict[str, tuple[jax.Array, jax.Array, float]]:
        """{"loss": (sum over tokens, their number, 1)}; each row begins a sequence."""
        return self.carried(model, params, batch, None)[0]

    def carried(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        carry: Any,
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
    ) -> tuple[dict[str, tuple[jax.Array, jax.Array, float]], Any]:
        """(`loss` of rows that continue those which left `carry`, the carry that they leave).

        The states of the rows before are taken as they were found.
        """
        weights_BL = batch["weights_BL"]
        tables = jax.tree.map(_free, params, model.log_probs(params))
        total_B, _, left = model.filter(tables, batch["tokens_BL"], weights_BL > 0, batch["documents_BL"], carry)
        return {"loss": (-total_B.sum(), weights_BL.sum(), 1.0)}, left


def _free(potential: jax.Array, log_probability: jax.Array) -> jax.Array:
    """The log-probability, whose gradient is that of a potential that nothing normalises."""
    return potential + jax.lax.stop_gradient(log_probability - potential)
