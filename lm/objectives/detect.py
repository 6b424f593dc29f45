"""Tell which tokens a small masked language model has replaced."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.core.errors import UsageError
from lm.objectives.mlm import MaskedLM, pick


@dataclasses.dataclass(frozen=True)
class Detect:
    """Replaced-token detection (ELECTRA; Clark et al. 2020, 2003.10555, section 2) beside its generator's training.

    The generator learns the masked language model `mlm`; its samples, drawn on the device, take the hidden places, and
    the discriminator says of every token, [CLS] and [SEP] too, whether it is another than the original: a sample that
    hits it counts as original. The loss is the generator's mean over hidden tokens plus `weight` times the mean binary
    cross-entropy over all; no gradient passes through the samples. The model is a lm.models.electra.Electra.
    """

    mlm: MaskedLM = MaskedLM(mask_share=1.0, random_share=0.0)
    weight: float = 50.0
    ids: tuple[int, ...] | None = None  # Of extra_ids; with vocab_size, the tokenizer's, filled in by resolve.
    vocab_size: int | None = None

    extra_ids = MaskedLM.extra_ids
    needs = ("detect",)  # Of a model, see lm.train.run.resolve.
    scores_text = False

    def __post_init__(self):
        if self.weight < 0:
            raise UsageError(f"weight={self.weight} must not be negative")

    def window(self, seq_len: int) -> int:
        """The raw tokens behind a row of `seq_len`."""
        return self.mlm.window(seq_len)

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """The row of `mlm`, and weights [L], 1 at what is no padding."""
        batch = self._mlm().corrupt(rng, row)
        return batch | {"weights_BL": (batch["documents_BL"] >= 0).astype(np.float32)}

    def loss(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
    ) -> dict[str, tuple[jax.Array, jax.Array, float]]:
        """{name: (sum over hidden tokens or over all, their number, coefficient)}.

        "detect_majority" is the share of tokens that are original: what always saying so would get right. Without a
        key, samples are drawn with a fixed one.
        """
        draw, *keys = jax.random.split(jax.random.key(0) if key is None else key, 3)
        keys = [None, None] if key is None else keys
        out = model.apply(params, batch, key=keys[0])
        x_BPD = pick(out.hidden_BLD, batch)
        tokens_BL, replaced_BL = _replace(model, params, x_BPD, batch, draw)
        logits_BL = model.detect_logits(params, batch | {"tokens_BL": tokens_BL}, key=keys[1])
        nll_BL = optax.sigmoid_binary_cross_entropy(logits_BL, replaced_BL)
        weights_BL = batch["weights_BL"]
        figures = {
            "detect_loss": (nll_BL, self.weight),
            "detect_accuracy": ((logits_BL > 0) == replaced_BL, 0.0),
            "detect_majority": (~replaced_BL, 0.0),
        }
        weight = weights_BL.sum()
        found = {name: (jnp.sum(x_BL * weights_BL), weight, c) for name, (x_BL, c) in figures.items()}
        return self._mlm().terms(model, params, x_BPD, batch) | found | out.aux

    def _mlm(self):
        return dataclasses.replace(self.mlm, ids=self.ids, vocab_size=self.vocab_size)


def _replace(model, params, x_BPD, batch, key):
    """(tokens [B, L] with the generator's samples at the hidden places, whether each is another than the original)."""
    logits_BPV = jax.lax.stop_gradient(model.logits(model.head(params), x_BPD))
    samples_BP = jax.random.categorical(key, logits_BPV).astype(jnp.int32)
    rows_B1, length = jnp.arange(samples_BP.shape[0])[:, None], batch["tokens_BL"].shape[1]
    # Picks without weight fill up the row: they go past its end, where nothing is written.
    places_BP = jnp.where(batch["weights_BP"] > 0, batch["picks_BP"], length)
    tokens_BL = batch["tokens_BL"].at[rows_B1, places_BP].set(samples_BP, mode="drop")
    replaced_BL = (
        jnp.zeros(tokens_BL.shape, bool).at[rows_B1, places_BP].set(samples_BP != batch["targets_BP"], mode="drop")
    )
    return tokens_BL, replaced_BL
