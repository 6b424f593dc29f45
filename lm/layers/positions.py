"""Where a token stands: sinusoids and rotary embeddings (learned positions are a table of `embed`)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lm.core.errors import check_positive

SINUSOIDS = ("interleaved", "halves", "tensor2tensor")


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023, 2306.15595)."""

    factor: float

    def __post_init__(self):
        check_positive(factor=self.factor)

    def apply(self, frequencies: jax.Array, base: float) -> tuple[jax.Array, float]:
        """(frequencies [R / 2] in radians a token, factor of cosine and sine)."""
        return frequencies / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Wavelengths beyond original_len / low are stretched by `factor`, those below original_len / high not (Llama 3.1).

    Between the two the frequencies are mixed in proportion to original_len / wavelength.
    """

    factor: float
    low: float
    high: float
    original_len: int

    def __post_init__(self):
        check_positive(factor=self.factor, low=self.low, high=self.high, original_len=self.original_len)

    def apply(self, frequencies: jax.Array, base: float) -> tuple[jax.Array, float]:
        """(frequencies [R / 2] in radians a token, factor of cosine and sine)."""
        turns = self.original_len * frequencies / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor), 1.0


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Frequencies of under `slow` turns in the original length are stretched, those over `fast` kept (2309.00071).

    The ramp between lies over the index of the feature, its ends rounded outwards where `truncate`; scores grow by
    the square of `attention_factor`, 0.1 ln(factor) + 1 unless given (Peng et al. 2023, section 3.4).
    """

    factor: float
    original_len: int
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        check_positive(factor=self.factor, original_len=self.original_len, fast=self.fast, slow=self.slow)

    def apply(self, frequencies: jax.Array, base: float) -> tuple[jax.Array, float]:
        """(frequencies [R / 2] in radians a token, factor of cosine and sine)."""
        count = len(frequencies)

        def index_of(turns: float) -> float:
            return count * math.log(self.original_len / (turns * 2 * math.pi)) / math.log(base)

        low, high = index_of(self.fast), index_of(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * count - 1)
        stretched = jnp.clip((jnp.arange(count, dtype=jnp.float32) - low) / max(high - low, 0.001), 0, 1)
        attention_factor = self.attention_factor
        if attention_factor is None:
            attention_factor = 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0
        return frequencies * (1 - stretched + stretched / self.factor), attention_factor


Scaling = LinearScaling | Llama3Scaling | YarnScaling


def sinusoids(positions: jax.Array, width: int, layout: str = "interleaved") -> jax.Array:
    """[..., D] float32: sin(pos / 10000^(2i/D)) at 2i, the cosine at 2i + 1 (Vaswani et al. 2017, 1706.03762).

    In "halves" all sines come before all cosines (Marian, Transformer-XL); so they do in "tensor2tensor", whose
    frequencies are 10000^(-i / (D/2 - 1)) and so reach 1 / 10000 (the paper's own code, fairseq, FSMT).
    """
    if layout == "tensor2tensor":
        step = math.log(10000.0) / (width // 2 - 1)
        frequencies = jnp.exp(-step * jnp.arange(width // 2, dtype=jnp.float32))
    else:
        frequencies = _frequencies(width, 10000.0)
    angles = _angles(positions, frequencies)
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1 if layout == "interleaved" else -2)
    return pairs.reshape(*positions.shape, width)


def rotary_table(
    positions: jax.Array, rotated: int, base: float, scaling: Scaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [..., rotated / 2] float32, of pos / base^(2i / rotated), or of what `scaling` makes of it."""
    frequencies, factor = _frequencies(rotated, base), 1.0
    if scaling is not None:
        frequencies, factor = scaling.apply(frequencies, base)
    angles = _angles(positions, frequencies)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x_BLHC: jax.Array, table: tuple[jax.Array, jax.Array], style: str) -> jax.Array:
    """x with its first 2 * table width features of each head turned by their angle (Su et al. 2021, 2104.09864).

    The table is [B or 1, L, R/2]. Pairs are (i, i + R/2) in style "half" (Llama, NeoX) and (2i, 2i + 1) in
    style "interleaved" (the paper, PaLM, Cohere); a permutation of features turns one into the other.
    """
    cos, sin = (t[:, :, None, :] for t in table)
    rotated = 2 * cos.shape[-1]
    x = x_BLHC[..., :rotated].astype(jnp.float32)
    pairs = x.reshape(*x.shape[:-1], 2, -1) if style == "half" else x.reshape(*x.shape[:-1], -1, 2)
    axis = -2 if style == "half" else -1
    a, b = (jnp.take(pairs, i, axis) for i in (0, 1))
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis).reshape(x.shape).astype(x_BLHC.dtype)
    return jnp.concatenate([turned, x_BLHC[..., rotated:]], -1) if rotated < x_BLHC.shape[-1] else turned


def _frequencies(width, base):
    return base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def _angles(positions, frequencies):
    return positions[..., None].astype(jnp.float32) * frequencies.reshape((1,) * positions.ndim + (-1,))
