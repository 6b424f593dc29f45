"""The causal objective with its softmax over a sample of the vocabulary while training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core import params as specs
from lm.core.errors import UsageError, check_positive
from lm.objectives.causal import Causal

Terms = dict[str, tuple[jax.Array, jax.Array, float]]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """`causal` with the normaliser estimated from the target and `samples` other tokens, the same for a whole batch
    (Bengio and Senecal 2003, importance sampling; Jean et al. 2015, 1412.2007, section 3).

    Tokens are drawn without repetition with probabilities that fall as log((id + 2) / (id + 1)), which is about their
    frequency where ids are sorted by it, as those of tokenizers of kind word are; each counts 1 / (the probability that
    it is drawn), so that the estimate has the normaliser as its mean, and is exact with all tokens drawn. Without a key
    the loss is the causal one, over all of them.
    """

    samples: int = 1024
    causal: Causal = Causal()

    extra_ids = ()
    needs = ("causal",)  # Of a model, see lm.train.run.resolve.
    context = 1  # See lm.data.stream.Objective.
    scores_text = True

    def __post_init__(self):
        check_positive(samples=self.samples)
        for name in ("label_smoothing", "z_loss"):
            if getattr(self.causal, name):
                raise UsageError(f"causal.{name}={getattr(self.causal, name)} needs the whole softmax: leave it out")

    def window(self, seq_len: int) -> int:
        """The raw tokens behind a row of `seq_len`: each target is the token after."""
        return self.causal.window(seq_len)

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """One row of a batch, as lm.objectives.causal.Causal makes it."""
        return self.causal.corrupt(rng, row)

    def loss(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
        subset: tuple[str, jax.Array] | None = None,
    ) -> Terms:
        """{"loss": (sum over tokens, sum of weights, 1.0)} and the model's terms; without a `key` all of `causal`'s,
        which alone report a `subset`."""
        if key is None:
            return self.causal.loss(model, params, batch, subset=subset)
        return self._terms(model, params, batch, model.apply(params, batch, key=key), key)

    def carried(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        carry: Any,
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
    ) -> tuple[Terms, Any]:
        """(`loss` of rows that continue those which left `carry`, the carry that they leave)."""
        if key is None:
            return self.causal.carried(model, params, batch, carry)
        out = model.apply(params, batch, key=key, cache=carry)
        return self._terms(model, params, batch, out, key), out.cache

    def _terms(self, model, params, batch, out, key):
        if getattr(model, "adaptive", None):
            raise UsageError("objective Sampled has no effect on model.adaptive, whose softmax is cheap: use Causal")
        classes = model.valid_vocab_size or model.vocab_size
        if self.samples > classes:
            raise UsageError(
                f"objective.samples={self.samples} exceeds the {classes} tokens: set it to fewer, or {classes}"
            )
        targets_BL, x_BLD = batch["targets_BL"], out.hidden_BLD
        ids_S, log_drawn_S = draw(jax.random.fold_in(key, _STREAM), classes, self.samples)
        head = model.head(params)
        spec = model.head(model.spec())
        others_BLS = model.logits(_rows(spec, head, ids_S), x_BLD) - log_drawn_S.reshape(1, 1, -1)
        others_BLS = jnp.where(ids_S.reshape(1, 1, -1) == targets_BL[..., None], -jnp.inf, others_BLS)
        own = jax.vmap(lambda target, x: model.logits(_rows(spec, head, target[None]), x[None])[0, 0])
        target_BL = jax.vmap(own)(targets_BL, x_BLD)
        normaliser_BL = jnp.logaddexp(target_BL, jax.nn.logsumexp(others_BLS, -1))
        weights_BL = batch["weights_BL"]
        loss = jnp.sum((normaliser_BL - target_BL) * weights_BL)
        return {"loss": (loss, weights_BL.sum(), 1.0)} | out.aux


_STREAM = 0x5A4D  # Folded into a batch's key: above the numbers of layers, for which models fold it.


def draw(key: jax.Array, classes: int, samples: int) -> tuple[jax.Array, jax.Array]:
    """(distinct ids [S], the log of the probability that each is among them), log-uniformly.

    Every id arrives after an exponential time of its own rate, and the first S are taken. Given when the next one
    arrives, whether an id has come before that is independent of the others: weights of 1 / probability then have sums
    without bias (Cohen and Kaplan 2007, rank conditioning).
    """
    rates = jnp.log1p(1 / (1 + jnp.arange(classes))) / np.log(classes + 1)
    arrivals = jax.random.exponential(key, (classes,)) / rates
    times, ids = jax.lax.top_k(-arrivals, min(samples + 1, classes))
    after = -times[samples] if samples < classes else jnp.inf
    ids = ids[:samples]
    return ids, jnp.log(-jnp.expm1(-rates[ids] * after))


def _rows(spec, head, ids):
    """The head of the tokens `ids` alone."""
    return specs.map_spec(lambda p, w: jnp.take(w, ids, p.axes.index("vocab")) if "vocab" in p.axes else w, spec, head)
