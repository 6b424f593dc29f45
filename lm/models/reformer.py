"""Reformer: attention by hashing or within chunks, and reversible layers, for long sequences in little memory."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lm.core import params as specs
from lm.core.errors import UsageError, check_choice, check_given, check_positive, unknown
from lm.core.params import Constant, Normal, Param
from lm.layers.activations import ACTIVATIONS
from lm.layers.attention import attention_spec
from lm.layers.axial import Axial, axial_embed, axial_spec
from lm.layers.dropout import dropout, fold
from lm.layers.embed import biased_logits, embed, embed_spec, embed_tokens
from lm.layers.linear import linear, linear_spec
from lm.layers.local import Local, local_attention
from lm.layers.lsh import LSH, draw_rotations, hash_buckets, lsh_attention
from lm.layers.mlp import mlp, mlp_spec
from lm.layers.norm import norm, norm_spec
from lm.layers.reversible import plain, reversible
from lm.models.flops import forward_flops
from lm.models.output import Output
from lm.parallel.rules import constrain

KINDS = ("lsh", "local")
CAPTURES = ("hidden_states",)
_HALVES = ("attention", "mlp")


@dataclasses.dataclass(frozen=True)
class Reformer:
    """The config, hashable, and the pure functions over its parameters (Kitaev et al. 2020, 2001.04451).

    The layers repeat `pattern`. Two streams of `width` run through them, both float32, and a head sees them side by
    side. Positions are a table of `max_len` rows, or `axial`. `mlp_chunk` is how many places the feed-forward layers
    work through at a time. Rotations are drawn anew from the step's key, a layer its own; without a key, from
    `hash_seed` (None: as 0). `remat`: "reversible" keeps no activations for the backward pass, "none" all of them.
    Sequences are padded to a multiple of the chunks.
    """

    layers: int = 6
    width: int = 256
    heads: int = 4
    head_dim: int | None = None
    mlp_width: int | None = None
    pattern: tuple[str, ...] = ("lsh",)
    lsh: LSH = LSH()
    local: Local = Local()
    mlp_chunk: int | None = None
    vocab_size: int | None = None
    valid_vocab_size: int | None = None
    max_len: int = 4096
    axial: Axial | None = None
    causal: bool = True
    hash_seed: int | None = None
    activation: str = "relu"
    norm_eps: float = 1e-12
    dropout: float = 0.0
    init_std: float = 0.02
    dtype: str = "float32"
    remat: str = "reversible"
    scan: bool = True

    def __post_init__(self):
        check_positive(layers=self.layers, width=self.width, heads=self.heads, max_len=self.max_len)
        check_positive(norm_eps=self.norm_eps, init_std=self.init_std)
        check_given(self, "head_dim", "mlp_width", "mlp_chunk")
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("remat", self.remat, ("none", "reversible"))
        for kind in self.pattern:
            check_choice("pattern", kind, KINDS)
        if not self.pattern or self.layers % len(self.pattern):
            raise UsageError(
                f"layers={self.layers} is no multiple of the {len(self.pattern)} of pattern={self.pattern}"
            )
        for kind, form, default in (("lsh", self.lsh, LSH()), ("local", self.local, Local())):
            if kind not in self.pattern and form != default:
                raise UsageError(f"{kind}={form} has no effect with pattern={self.pattern}: leave it out")
            if self.causal and form.after:
                raise UsageError(f"{kind}.after={form.after} looks ahead, which causal=True forbids: set it to 0")
        if self.head_dim is None and self.width % self.heads:
            raise UsageError(f"width={self.width} is no multiple of heads={self.heads}: set head_dim")
        if self.axial is not None and (sum(self.axial.widths) != self.width or self.axial.places < self.max_len):
            raise UsageError(
                f"axial={self.axial} needs widths that add up to width={self.width} "
                f"and at least max_len={self.max_len} places"
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.valid_vocab_size is not None and not 0 < self.valid_vocab_size <= (self.vocab_size or 0):
            raise UsageError(f"valid_vocab_size={self.valid_vocab_size} is not within vocab_size={self.vocab_size}")

    @property
    def offers(self) -> tuple[str, ...]:
        """What an objective may need of it."""
        return ("causal",) if self.causal else ("masked",)

    @property
    def context_limit(self) -> int:
        """The longest sequence that has positions."""
        return self.max_len

    @property
    def hidden_width(self) -> int:
        """Of the hidden states that a head sees: both streams."""
        return 2 * self.width

    @property
    def head_size(self) -> int:
        """The width of one head of attention."""
        return self.head_dim or self.width // self.heads

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every layer's attention, in the order in which they run."""
        return self.pattern * (self.layers // len(self.pattern))

    def spec(self) -> dict[str, Any]:
        """{"embed", "positions", "layers": {"layer0" of the pattern: stacked}, "final_norm", "head"}."""
        if self.vocab_size is None:
            raise UsageError("vocab_size=None is not resolved: take it from the tokenizer or set it")
        init = Normal(self.init_std)
        table = embed_spec(self.vocab_size, self.hidden_width, init)["table"]
        layers = {f"layer{j}": self._layer_spec(kind) for j, kind in enumerate(self.pattern)}
        plain_positions = embed_spec(self.max_len, self.width, init, axis="positions")
        return {
            "embed": embed_spec(self.vocab_size, self.width, init),
            "positions": plain_positions if self.axial is None else axial_spec(self.axial),
            "layers": specs.stack(layers, self.layers // len(self.pattern)),
            "final_norm": norm_spec({"norm": self.hidden_width}, True),
            "head": {
                "table": dataclasses.replace(table, inputs=("embed",), role="head"),
                "bias": Param((self.vocab_size,), ("vocab",), Constant(), role="vector"),
            },
        }

    def apply(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """Hidden states [B, L, 2D] in `dtype`, both streams side by side, normalised.

        `batch` has tokens_BL and may have positions_BL (otherwise the index in the row), documents_BL (attention stays
        inside equal numbers; -1 is padding, which no token sees) and rotations_HCRK (what all layers hash by; else
        they are drawn). `key` turns dropout on. capture=("hidden_states",) adds [layers + 1, B, L, D] of the second
        stream, and keeps the activations.
        """
        for name in capture:
            if name not in CAPTURES:
                raise unknown("capture", name, CAPTURES)
        L = batch["tokens_BL"].shape[1]
        if L > self.max_len:
            raise UsageError(f"a sequence of {L} tokens is longer than max_len={self.max_len}: raise model.max_len")
        tokens_BL, positions_BL, documents = self._padded(batch)
        x = dropout(embed_tokens(params["embed"], tokens_BL, "float32"), self.dropout, fold(key, 0))
        x = x + dropout(self._positions(params["positions"], positions_BL), self.dropout, fold(key, 1))
        x = constrain(x, "batch", "residual_length", "act_embed")
        repeats = self.layers // len(self.pattern)
        hash_key = jax.random.key(self.hash_seed or 0) if key is None else jax.random.fold_in(key, 2)
        own = {
            "hash": jax.random.split(hash_key, repeats),
            "dropout": None if key is None else jax.random.split(jax.random.fold_in(key, 3), repeats),
        }
        shared = {"documents": documents, "rotations": batch.get("rotations_HCRK")}
        halves = tuple(
            half for j, kind in enumerate(self.pattern) for half in (self._attention(j, kind), self._feed_forward(j))
        )
        p = tuple(params["layers"][f"layer{j}"][half] for j in range(len(self.pattern)) for half in _HALVES)
        unroll, captured = 1 if self.scan else repeats, {}
        if self.remat == "none" or capture:
            streams, (_, states) = plain(halves, unroll, p, own, shared, (x, x))
            if capture:
                captured["hidden_states"] = jnp.concatenate([x[None], states.reshape(-1, *x.shape)])[:, :, :L]
        else:
            streams = reversible(halves, unroll, p, own, shared, (x, x))
        out = norm(params["final_norm"], jnp.concatenate(streams, -1)[:, :L], "layernorm", self.norm_eps)
        out = dropout(out, self.dropout, fold(key, 4)).astype(self.dtype)
        return Output(constrain(out, "batch", "residual_length", "act_embed"), None, captured=captured)

    def next_hidden(self, params: dict[str, Any], tokens_BL: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """[B, 2D] that predicts the token at place `lengths_B`, from those before it: ids from there on are padding.

        Raises UsageError for a model that sees both ways.
        """
        if not self.causal:
            raise UsageError("causal=False continues no text: it predicts tokens from both sides")
        B, L = tokens_BL.shape
        documents = jnp.where(jnp.arange(L)[None, :] < lengths_B[:, None], 0, -1)
        hidden = self.apply(params, {"tokens_BL": tokens_BL, "documents_BL": documents}).hidden_BLD
        return hidden[jnp.arange(B), lengths_B - 1]

    def attention_flops(self, length: int) -> float:
        """Forward floating-point operations a token in the products of attention, and of hashing."""
        return sum(self._attention_flops(kind, self.padded_length(length)) for kind in self.kinds)

    def forward_flops(self, spec: dict[str, Any], lengths: dict[str, int]) -> float:
        """Floating-point operations of a row, see lm.models.flops.forward_flops."""
        return forward_flops(self, spec, lengths)

    def head(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters that make logits."""
        return params["head"]

    def logits(self, head: dict[str, Any], x: jax.Array) -> jax.Array:
        """[..., V] in float32 for any hidden states [..., 2D]; logits that stand for no token are masked."""
        return biased_logits(head, x, self.valid_vocab_size)

    def padded_length(self, length: int) -> int:
        """A multiple of all chunks; what fits into the smallest one stays as it is."""
        chunks = [{"lsh": self.lsh.chunk, "local": self.local.chunk}[kind] for kind in self.pattern]
        return length if length <= min(chunks) else -(-length // math.lcm(*chunks)) * math.lcm(*chunks)

    def hash_factors(self, length: int) -> tuple[int, ...]:
        """The buckets of a row of `length` tokens, in factors; none where it is one chunk, and nothing is hashed."""
        length = self.padded_length(length)
        return () if "lsh" not in self.pattern or length <= self.lsh.chunk else self.lsh.factors(length, self.max_len)

    def _layer_spec(self, kind):
        init, sizes = Normal(self.init_std), {"heads": self.heads, "head_dim": self.head_size}
        attend = attention_spec(self.width, self.heads, self.heads, self.head_size, False, init, init)
        if kind == "lsh":
            shared = linear_spec({"embed": self.width}, sizes, init, False)
            attend = {"qk": shared, "v": attend["v"], "o": attend["o"]}
        between = mlp_spec(self.width, self.mlp_width or 4 * self.width, False, True, init, init)
        start = {"norm": norm_spec({"norm": self.width}, True)}
        return {"attention": start | attend, "mlp": start | between}

    def _padded(self, batch):
        """(tokens, positions [1 or B, L], documents (of queries, of keys) or None), all of the padded length."""
        tokens = batch["tokens_BL"]
        L, documents = tokens.shape[1], batch.get("documents_BL")
        positions = batch.get("positions_BL", jnp.arange(L)[None, :])
        more = self.padded_length(L) - L
        if more:
            documents = jnp.zeros_like(tokens) if documents is None else documents
            tokens, positions = (jnp.pad(x, ((0, 0), (0, more))) for x in (tokens, positions))
            documents = jnp.pad(documents, ((0, 0), (0, more)), constant_values=-1)
        # What padding itself sees matters only where its own state is read, as from the first place.
        return tokens, positions, None if documents is None else (jnp.maximum(documents, 0), documents)

    def _positions(self, p, positions):
        if self.axial is None:
            return embed(p, positions, "float32")
        return axial_embed(self.axial, p, positions, "float32")

    def _attention(self, j, kind):
        """The half layer j of the pattern adds by attention; hashing keeps its buckets, lest rounding changes them."""

        def half(p, x, own, shared, kept):
            key = fold(own["dropout"], 2 * j)
            given = {"causal": self.causal, "documents": shared["documents"], "key": fold(key, 0)}
            h = norm(p["norm"], x, "layernorm", self.norm_eps).astype(self.dtype)
            if kind == "local":
                q, k, v = (_heads(p[name], h) for name in ("q", "k", "v"))
                y = local_attention(self.local, q, k, v, **given)
            else:
                qk, v = (_heads(p[name], h) for name in ("qk", "v"))
                kept = self._hash(qk, own, shared, j) if kept is None else kept
                y = lsh_attention(self.lsh, qk, v, kept, **given)
            y = dropout(linear(p["o"], y, contracted=2), self.dropout, fold(key, 1))
            return constrain(y.astype(x.dtype), "batch", "residual_length", "act_embed"), kept

        return half

    def _hash(self, qk_BLHC, own, shared, j):
        B, L, H, C = qk_BLHC.shape
        factors, rotations = self.hash_factors(L), shared["rotations"]
        if not factors:
            return jnp.zeros((B, H, 1, L), jnp.int16)
        if rotations is None:
            rotations = draw_rotations(self.lsh, factors, H, C, jax.random.fold_in(own["hash"], j))
        padding = None if shared["documents"] is None else shared["documents"][1] < 0
        return hash_buckets(factors, qk_BLHC, rotations, padding)

    def _feed_forward(self, j):
        def part(p, x, key):
            h = norm(p["norm"], x, "layernorm", self.norm_eps).astype(self.dtype)
            h = mlp({n: p[n] for n in ("up", "down")}, h, self.activation, self.dropout, fold(key, 0))
            return dropout(h, self.dropout, fold(key, 1)).astype(x.dtype)

        def half(p, x, own, shared, kept):
            key = fold(own["dropout"], 2 * j + 1)
            y = part(p, x, key) if self.mlp_chunk is None else _in_parts(part, self.mlp_chunk, p, x, key)
            return constrain(y, "batch", "residual_length", "act_embed"), None

        return half

    def _attention_flops(self, kind, length):
        form = self.lsh if kind == "lsh" else self.local
        inner, factors = self.heads * self.head_size, self.hash_factors(length)
        window = min(length, form.chunk * (1 + form.before + form.after)) if length > form.chunk else length
        if kind == "local" or not factors:
            return 4 * inner * window
        return self.lsh.rounds * inner * (4 * window + sum(factors))


def _heads(p, x):
    return constrain(linear(p, x), "batch", "length", "act_heads", None)


def _in_parts(part, size, p, x_BLD, key):
    """part(p, x, key) over `size` places at a time, the last ones padded; backward each part is computed again."""
    B, L, D = x_BLD.shape
    padded = jnp.pad(x_BLD, ((0, 0), (0, -L % size), (0, 0)))
    parts = padded.reshape(B, -1, size, D).swapaxes(0, 1)
    run = jax.checkpoint(functools.partial(part, p))
    y = jax.lax.map(lambda i_x: run(i_x[1], fold(key, i_x[0])), (jnp.arange(len(parts)), parts))
    return y.swapaxes(0, 1).reshape(B, -1, D)[:, :L]
