"""Any model with a head for a task in place of its scores of tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.errors import UsageError
from lm.core.parametrization import Ratios
from lm.core.params import Normal
from lm.layers.dropout import fold
from lm.layers.heads import TaskHead
from lm.layers.stack import Stack
from lm.models.output import Output

ROWS = ("tokens_BL", "positions_BL", "documents_BL", "types_BL")


@dataclasses.dataclass(frozen=True)
class Headed:
    """`base`, whose hidden states `task` scores.

    The base's parameters keep their names, without those of its own head, so that a pretrained model's fit. With
    kind="choice" the arrays of `ROWS` have the choices as a dimension after the rows: tokens_BL is [B, choices, L].
    """

    base: Any
    task: TaskHead

    def __post_init__(self):
        if getattr(self.base, "outputs", ()):
            raise UsageError(f"base.outputs={self.base.outputs} have no effect below a head for a task: set outputs=()")

    offers = ()  # What an objective of pretraining may need of it.

    @property
    def vocab_size(self) -> int | None:
        return self.base.vocab_size

    @property
    def valid_vocab_size(self) -> int | None:
        return self.base.valid_vocab_size

    @property
    def context_limit(self) -> int | None:
        """The longest sequence that has positions; None where any length has."""
        return self.base.context_limit

    @property
    def width(self) -> int:
        return self.base.width

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return getattr(self.base, "stacks", ())

    @property
    def ratios(self) -> Ratios:
        """Its sizes over those of the base that it was tuned at, where it has one."""
        return getattr(self.base, "ratios", Ratios())

    def spec(self) -> dict[str, Any]:
        """The base's tree without "head", and "task"."""
        base = {name: part for name, part in self.base.spec().items() if name != "head"}
        return base | self.ratios.apply({"task": self.task.spec(self.base.width, Normal(self.base.init_std))})

    def apply(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: Any = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """The base's own Output; hidden states of choices are [B * choices, L, D]."""
        return self.base.apply(params, self._flat(batch), key=fold(key, 0), cache=cache, capture=capture)

    def scores(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: Any = None,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Output]:
        """(float32 scores, what `apply` returns), by kind: [B, labels], [B, L, labels], [B, L, 2], [B, choices]."""
        out = self.apply(params, batch, key=key, cache=cache, capture=capture)
        x = out.hidden_BLD
        if self.task.pools:
            x = self.task.pooled(x, self._real(self._flat(batch)))
        scores = self.task.apply(params["task"], x, fold(key, 1))
        return (scores.reshape(batch["tokens_BL"].shape[:2]) if self.task.kind == "choice" else scores), out

    def forward_flops(self, spec: dict[str, Any], lengths: dict[str, int]) -> float:
        """Floating-point operations of a row of the base; the head's few are left out."""
        return self.base.forward_flops({name: part for name, part in spec.items() if name != "task"}, lengths)

    def head(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters that make scores."""
        return params["task"]

    def logits(self, head: dict[str, Any], x: jax.Array) -> jax.Array:
        """[..., outputs] in float32 for any hidden states [..., D], pooled or not."""
        return self.task.apply(head, x)

    def _flat(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if self.task.kind != "choice":
            return batch
        return {name: x.reshape(-1, x.shape[-1]) if name in ROWS else x for name, x in batch.items()}

    def _real(self, batch: dict[str, jax.Array]) -> jax.Array:
        tokens_BL = batch["tokens_BL"]
        if self.task.pad_id is not None:
            return tokens_BL != self.task.pad_id
        return batch["documents_BL"] >= 0 if "documents_BL" in batch else jnp.full(tokens_BL.shape, True)


def with_vocabulary(model: Any, rows: int | None, valid: int | None) -> Any:
    """The model, or what it is built on, with that vocab_size and valid_vocab_size."""
    if hasattr(model, "base"):
        return dataclasses.replace(model, base=with_vocabulary(model.base, rows, valid))
    return dataclasses.replace(model, vocab_size=rows, valid_vocab_size=valid)
