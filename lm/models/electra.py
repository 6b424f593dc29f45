"""ELECTRA: a discriminator and the generator that makes its inputs, as one model with shared embeddings."""

import dataclasses
import functools
from typing import Any

import jax

from lm.core.errors import UsageError
from lm.layers.stack import Stack
from lm.models.encoder import Encoder
from lm.models.flops import body_flops
from lm.models.output import Output

PARTS = ("discriminator", "generator")
# What both parts have in common: the embeddings and, as in the authors' code, their norm.
SHARED = ("embed", "positions", "types", "embed_norm")


@dataclasses.dataclass(frozen=True)
class Electra:
    """The config of both parts, and the pure functions over their parameters (Clark et al. 2020, 2003.10555).

    `apply`, `head` and `logits` are the generator's, a masked language model like any other; `detect_logits` is the
    discriminator's. Parameters are {"embed", "positions", "types", "embed_norm"}, which belong to both, and
    {"discriminator", "generator"}; `part` and `part_params` give either as a model of its own. The vocabulary is set
    here, and what lies before the embeddings' map has one size: the generator's `embed_width` is the discriminator's,
    or its width.
    """

    discriminator: Encoder = Encoder(outputs=("detect",))
    generator: Encoder = Encoder(width=256, heads=4, mlp_width=1024, embed_width=768, outputs=("tokens",))
    vocab_size: int | None = None
    valid_vocab_size: int | None = None

    def __post_init__(self):
        for name, output in zip(PARTS, ("detect", "tokens"), strict=True):
            if output not in getattr(self, name).outputs:
                raise UsageError(f"{name}.outputs={getattr(self, name).outputs} lacks {output!r}")
        for name in (
            *("max_len", "positions", "position_offset", "types", "norm_bias", "norm_eps"),
            *("init_std", "dtype", "embed_dropout", "vocab_size"),
        ):
            ours, theirs = getattr(self.discriminator, name), getattr(self.generator, name)
            if ours != theirs:
                raise UsageError(f"discriminator.{name}={ours} and generator.{name}={theirs} differ: they are shared")
        widths = [getattr(self, name).embed_width or getattr(self, name).width for name in PARTS]
        if widths[0] != widths[1]:
            raise UsageError(
                f"the parts' embeddings are {widths[0]} and {widths[1]} wide, and shared: "
                f"set generator.embed_width={widths[0]}"
            )

    offers = ("detect",)  # What an objective may need of it.

    @property
    def context_limit(self) -> int | None:
        """The longest sequence that has positions; None where any length has."""
        return self.discriminator.max_len

    @functools.cached_property
    def parts(self) -> dict[str, Encoder]:
        """Both encoders, with the vocabulary."""
        sizes = {"vocab_size": self.vocab_size, "valid_vocab_size": self.valid_vocab_size}
        return {name: dataclasses.replace(getattr(self, name), **sizes) for name in PARTS}

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return tuple(part.stack for part in self.parts.values())

    def spec(self) -> dict[str, Any]:
        """A tree of Param."""
        specs = {name: part.spec() for name, part in self.parts.items()}
        shared = {name: specs["discriminator"][name] for name in SHARED if name in specs["discriminator"]}
        own = {part: {name: p for name, p in spec.items() if name not in SHARED} for part, spec in specs.items()}
        return shared | own

    def part_params(self, params: dict[str, Any], part: str) -> dict[str, Any]:
        """The parameters, or the spec, of one part as those of an Encoder."""
        return {name: p for name, p in params.items() if name in SHARED} | dict(params[part])

    def apply(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """The generator's hidden states [B, L, D]; see lm.models.encoder.Encoder.apply."""
        return self.parts["generator"].apply(self.part_params(params, "generator"), batch, key=key, capture=capture)

    def forward_flops(self, spec: dict[str, Any], lengths: dict[str, int]) -> float:
        """Floating-point operations of a row in both parts."""
        part, own, length = self.parts["discriminator"], self.part_params(spec, "discriminator"), lengths["tokens_BL"]
        detection = body_flops(own, length) + length * part.attention_flops(length)
        return detection + self.parts["generator"].forward_flops(self.part_params(spec, "generator"), lengths)

    def head(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters with which the generator scores the vocabulary."""
        return self.parts["generator"].head(self.part_params(params, "generator"))

    def logits(self, head: dict[str, Any], x: jax.Array) -> jax.Array:
        """The generator's [..., V] in float32 for any of its hidden states [..., D]."""
        return self.parts["generator"].logits(head, x)

    def detect_logits(
        self, params: dict[str, Any], batch: dict[str, jax.Array], *, key: jax.Array | None = None
    ) -> jax.Array:
        """The discriminator's [B, L] in float32: above zero where the token seems replaced."""
        part, own = self.parts["discriminator"], self.part_params(params, "discriminator")
        return part.detect_logits(own, part.apply(own, batch, key=key).hidden_BLD)
