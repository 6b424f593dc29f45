"""Predict each token from those before it."""

import dataclasses
from typing import Any

import jax
import numpy as np

from lm.core.errors import UsageError, check_positive
from lm.objectives.adaptive import adaptive_cross_entropy
from lm.objectives.cross_entropy import TokenLoss, cross_entropy


@dataclasses.dataclass(frozen=True)
class Causal:
    """The autoregressive objective: -log p(token | tokens before it in the window).

    Documents follow one another in a window as they lie in the corpus, and tokens see across the border.
    With `isolate_documents` attention and positions restart at each, and a document's first token, which
    then has nothing before it, is not predicted.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_tokens: int | None = None
    isolate_documents: bool = False

    extra_ids = ()
    needs = ("causal",)  # Of a model, see lm.train.run.resolve.
    context = 1  # See lm.data.stream.Objective.
    scores_text = True

    def __post_init__(self):
        TokenLoss(1, self.label_smoothing, self.z_loss)
        if self.chunk_tokens is not None:
            check_positive(chunk_tokens=self.chunk_tokens)

    def window(self, seq_len: int) -> int:
        """The raw tokens behind a row of `seq_len`: each target is the token after."""
        return seq_len + 1

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """One row of a batch from row = {"tokens": [W] int, "documents": [W] int, -1 at padding}.

        Weights are 1 where the target is no padding. Nothing is random here.
        """
        tokens, documents = (np.asarray(row[name], np.int32) for name in ("tokens", "documents"))
        index = np.arange(len(tokens) - 1, dtype=np.int32)
        predicted = documents[1:] >= 0
        batch = {"tokens_BL": tokens[:-1], "targets_BL": tokens[1:]}
        if self.isolate_documents:
            predicted &= documents[1:] == documents[:-1]
            batch |= {"positions_BL": _restarting(index, documents[:-1]), "documents_BL": documents[:-1]}
        return batch | {"weights_BL": predicted.astype(np.float32)}

    def loss(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
        subset: tuple[str, jax.Array] | None = None,
    ) -> dict[str, tuple[jax.Array, jax.Array, float]]:
        """{name: (sum over tokens, sum of weights, coefficient)}; terms with coefficient 0 are only reported.

        `subset`, a name and a share of each target's weight [B, L], reports the mean over those under that name. With
        a `key`, in training, there is no accuracy, and a model with an adaptive softmax has the loss alone.
        """
        return self._terms(model, params, batch, model.apply(params, batch, key=key), key, subset)

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

        No gradient goes back into the rows before: truncated backpropagation through time.
        """
        out = model.apply(params, batch, key=key, cache=carry)
        return self._terms(model, params, batch, out, key), out.cache

    def _terms(self, model, params, batch, out, key, subset=None):
        adaptive = getattr(model, "adaptive", None)
        if adaptive and (self.label_smoothing or self.z_loss):
            name = "label_smoothing" if self.label_smoothing else "z_loss"
            raise UsageError(
                f"objective.{name}={getattr(self, name)} needs the whole softmax: leave out model.adaptive"
            )
        if adaptive and key is not None:
            tokens = out.hidden_BLD, batch["targets_BL"], batch["weights_BL"]
            loss = adaptive_cross_entropy(adaptive, model.valid_vocab_size, model.head(params), *tokens)
            return {"loss": (loss, batch["weights_BL"].sum(), 1.0)} | out.aux
        form = TokenLoss(model.valid_vocab_size or model.vocab_size, self.label_smoothing, self.z_loss)
        loss, sums = cross_entropy(
            form,
            model.logits,
            model.head(params),
            out.hidden_BLD,
            batch["targets_BL"],
            batch["weights_BL"],
            self.chunk_tokens,
            None if subset is None else subset[1],
        )
        weight = batch["weights_BL"].sum()
        # In training the accuracy would be one more pass over all logits.
        reported = ["nll"] + ["accuracy"] * (key is None) + ["z_loss"] * bool(self.z_loss)
        terms = {"loss": (loss, weight, 1.0)} | {name: (sums[name], weight, 0.0) for name in reported} | out.aux
        if subset is not None:
            terms[subset[0]] = (sums["subset_nll"], (batch["weights_BL"] * subset[1]).sum(), 0.0)
        return terms


def _restarting(index: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Each token's distance from the first of its document in the window."""
    starts = np.concatenate([[True], documents[1:] != documents[:-1]])
    return index - np.maximum.accumulate(np.where(starts, index, 0))
