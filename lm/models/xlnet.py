"""XLNet: two-stream attention over a permuted order, with relative positions and a memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lm.core import params as specs
from lm.core.errors import UsageError, check_choice, check_given, check_positive, unknown
from lm.core.params import Constant, Normal, Param
from lm.layers.activations import ACTIVATIONS
from lm.layers.attention import Form, attention, attention_spec
from lm.layers.dropout import dropout, fold
from lm.layers.embed import biased_logits, embed_spec, embed_tokens
from lm.layers.linear import linear, linear_spec
from lm.layers.mlp import mlp, mlp_spec
from lm.layers.norm import norm, norm_spec
from lm.layers.positions import sinusoids
from lm.layers.transformer_xl import by_key, distances
from lm.models.flops import body_flops, forward_flops
from lm.models.output import Output
from lm.parallel.rules import constrain

CAPTURES = ("hidden_states",)
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class XLNet:
    """The config, hashable, and the pure functions over its parameters (Yang et al. 2019, 1906.08237).

    `causal` hides later tokens whatever the order ("uni"). `clamp` bounds relative distances; `two_directions` runs
    the second half of a batch with the distances' sign turned, for text that is fed backwards. `memory` is how many
    hidden states a layer keeps for the next segment (None: all), of a segment the first `reuse` (None: all).
    `same_length` lets each token see as many keys as the memory holds, and itself.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp_width: int | None = None
    vocab_size: int | None = None
    valid_vocab_size: int | None = None
    causal: bool = False
    two_directions: bool = False
    clamp: int | None = None
    memory: int | None = None
    reuse: int | None = None
    same_length: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-12
    tied: bool = True
    dropout: float = 0.0
    init_std: float = 0.02
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True

    def __post_init__(self):
        check_positive(layers=self.layers, width=self.width, heads=self.heads, norm_eps=self.norm_eps)
        check_positive(init_std=self.init_std)
        check_given(self, "mlp_width", "clamp", "memory", "reuse")
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("remat", self.remat, ("none", "full"))
        if self.width % self.heads or self.width % 2:
            raise UsageError(f"width={self.width} must be even and a multiple of heads={self.heads}")
        if self.same_length and not self.causal:
            raise UsageError("same_length=True has no effect with causal=False: leave it out")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.valid_vocab_size is not None and not 0 < self.valid_vocab_size <= (self.vocab_size or 0):
            raise UsageError(f"valid_vocab_size={self.valid_vocab_size} is not within vocab_size={self.vocab_size}")

    @property
    def offers(self) -> tuple[str, ...]:
        """What an objective may need of it."""
        return ("permuted", "causal") if self.causal else ("permuted",)

    @property
    def context_limit(self) -> None:
        """Any length has positions."""
        return None

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def spec(self) -> dict[str, Any]:
        """{"embed", "mask" (what a position to be predicted starts from), "layers" (stacked), "head"}."""
        if self.vocab_size is None:
            raise UsageError("vocab_size=None is not resolved: take it from the tokenizer or set it")
        init = Normal(self.init_std)
        head: dict[str, Any] = {"bias": Param((self.vocab_size,), ("vocab",), Constant(), role="vector")}
        if not self.tied:
            table = embed_spec(self.vocab_size, self.width, init)["table"]
            head["table"] = dataclasses.replace(table, inputs=("embed",), role="head")
        return {
            "embed": embed_spec(self.vocab_size, self.width, init),
            "mask": {"vector": Param((self.width,), ("embed",), init, role="vector")},
            "layers": specs.stack(self._layer_spec(), self.layers),
            "head": head,
        }

    def apply(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """Hidden states of the content stream [B, L, D], or with picks_BP of the query stream there [B, P, D].

        `batch` has tokens_BL and may have order_BL (each token's place in the factorisation order: the content
        stream sees places up to its own, the query stream those below), blocked_BLL (true where a query, the second
        dimension, must not see a key), picks_BP, documents_BL (attention stays inside equal numbers; the memory
        belongs to document 0, and -1 is padding, which no other token sees) and types_BL (segments, of which only same
        or different counts; the memory's is 0). A `cache` is the memory, see `carry_spec`. capture=("hidden_states",)
        adds [layers + 1, B, L, D] of the content stream and, with picks_BP, "query_states" [layers + 1, B, P, D].
        """
        for name in capture:
            if name not in CAPTURES:
                raise unknown("capture", name, CAPTURES)
        B, L = batch["tokens_BL"].shape
        M = 0 if cache is None else cache["memory"].shape[2]
        picks_BP = batch.get("picks_BP")
        h = embed_tokens(params["embed"], batch["tokens_BL"], self.dtype)
        h = constrain(dropout(h, self.dropout, fold(key, 0)), "batch", "residual_length", "act_embed")
        g = None
        if picks_BP is not None:
            g = jnp.broadcast_to(params["mask"]["vector"].astype(self.dtype), (*picks_BP.shape, self.width))
            g = dropout(g, self.dropout, fold(key, 1))
        context = self._context(batch, M, cache, fold(key, 2))

        def body(streams, scanned):
            p, memory_BMD, key = scanned
            new = self._layer(p, streams[0], streams[1], memory_BMD, context, key)
            return new, (streams[0] if cache is not None else None, new if capture else None)

        keys = None if key is None else jax.random.split(jax.random.fold_in(key, 3), self.layers)
        memory = None if cache is None else cache["memory"]
        body = jax.checkpoint(body, prevent_cse=not self.scan) if self.remat == "full" else body
        unroll = 1 if self.scan else self.layers
        first = (h, g)
        (h, g), (entered, states) = jax.lax.scan(body, first, (params["layers"], memory, keys), unroll=unroll)
        captured = {}
        if capture:
            names = ("hidden_states", "query_states")
            pairs = zip(names, first, states, strict=True)
            captured = {n: jnp.concatenate([a[None], b]) for n, a, b in pairs if a is not None}
        out = dropout(h if g is None else g, self.dropout, fold(key, 4))
        cache = None if cache is None else self._remember(cache, entered)
        return Output(constrain(out, "batch", "residual_length", "act_embed"), cache, captured=captured)

    def next_hidden(self, params: dict[str, Any], tokens_BL: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """[B, D] that predicts the token at place `lengths_B`, from those before it in full: ids from there on count
        for nothing. Raises UsageError with `same_length`, which shows as many tokens as there are in a memory.
        """
        if self.same_length:
            raise UsageError("same_length=True lets a token see nothing where there is no memory: set it to False")
        batch = {
            "tokens_BL": tokens_BL,
            "order_BL": (jnp.arange(tokens_BL.shape[1])[None, :] >= lengths_B[:, None]).astype(jnp.int32),
            "picks_BP": lengths_B[:, None],
        }
        return self.apply(params, batch).hidden_BLD[:, 0]

    def carry_spec(self, batch_size: int) -> dict[str, Any] | None:
        """{"memory" [layers, B, M, D]: what entered each layer, "length" [B]: how many of its last slots are filled};
        None where `memory` gives no size.
        """
        if self.memory is None:
            return None
        shape, axes = (self.layers, batch_size, self.memory, self.width), ("layers", "batch", "length", "act_embed")
        return {
            "memory": Param(shape, axes, Constant(), role="vector", trainable=False, dtype=self.dtype),
            "length": Param((batch_size,), ("batch",), Constant(), role="vector", trainable=False, dtype="int32"),
        }

    def attention_flops(self, length: int) -> float:
        """Forward floating-point operations a token in the three products of attention, of the content stream."""
        keys = length / 2 if self.causal else length
        return self.layers * self.width * (4 * keys + 4 * length)

    def forward_flops(self, spec: dict[str, Any], lengths: dict[str, int]) -> float:
        """Floating-point operations of a row: those of the query stream's picks come on top of the content stream's."""
        layers, length = spec["layers"], lengths["tokens_BL"]
        query = {"q": layers["attention"]["q"], "o": layers["attention"]["o"], "mlp": layers["mlp"]}
        picks = lengths.get("picks_BP", 0)
        return (
            forward_flops(self, spec, lengths)
            - body_flops(layers["attention"]["r"], length)  # Distances are the same in all rows.
            + body_flops(query, picks)
            + picks * self.attention_flops(length)
        )

    def head(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters that make logits: the table is the embedding's where tied."""
        return {"table": params["embed" if self.tied else "head"]["table"], "bias": params["head"]["bias"]}

    def logits(self, head: dict[str, Any], x: jax.Array) -> jax.Array:
        """[..., V] in float32 for any hidden states [..., D]; logits that stand for no token are masked."""
        return biased_logits(head, x, self.valid_vocab_size)

    def _layer_spec(self):
        init, width, heads = Normal(self.init_std), self.width, {"heads": self.heads, "head_dim": self.head_dim}
        attend = attention_spec(width, self.heads, self.heads, self.head_dim, False, init, init)
        attend["r"] = linear_spec({"embed": width}, heads, init, False)
        for name in ("content_bias", "position_bias", "segment_bias"):
            attend[name] = Param(tuple(heads.values()), tuple(heads), init, role="vector")
        attend["segments"] = Param((2, *heads.values()), ("positions", *heads), init, role="vector")
        return {
            "attention": attend,
            "attention_norm": norm_spec({"norm": width}, True),
            "mlp": mlp_spec(width, self.mlp_width or 4 * width, False, True, init, init),
            "mlp_norm": norm_spec({"norm": width}, True),
        }

    def _context(self, batch, M, cache, key):
        """What all layers read: positions [1 or B, R, D], and a pair (masks, same segment, picks) for each stream."""
        B, L = batch["tokens_BL"].shape
        steps = distances(L, M + L, self.clamp)
        positions = sinusoids(steps, self.width, "halves")[None]
        if self.two_directions:
            if B % 2:
                raise UsageError(f"two_directions=True needs an even number of rows, not {B}")
            both = jnp.concatenate([positions, sinusoids(-steps, self.width, "halves")[None]])
            positions = jnp.repeat(both, B // 2, 0)
        elif key is not None:
            positions = jnp.broadcast_to(positions, (B, *positions.shape[1:]))
        positions = dropout(positions, self.dropout, key).astype(self.dtype)
        seen, own = self._seen(batch, M, cache)
        same = None
        if "types_BL" in batch:
            types = batch["types_BL"]
            same = types[:, :, None] == jnp.pad(types, ((0, 0), (M, 0)))[:, None, :]
        content = (seen | own, same, None)
        picks = batch.get("picks_BP")
        if picks is None:
            return positions, content, None
        if "order_BL" in batch:
            order = batch["order_BL"]
            seen = seen & _beside(order[:, :, None] > order[:, None, :], M, True)
        rows = jnp.broadcast_to(seen, (B, L, M + L))
        return positions, content, (_pick(rows, picks), None if same is None else _pick(same, picks), picks)

    def _seen(self, batch, M, cache):
        """(which keys a token may see [1 or B, L, S], which key is the token itself [1, L, S])."""
        L = batch["tokens_BL"].shape[1]
        index, keys = jnp.arange(L)[None, :, None], jnp.arange(-M, L)[None, None, :]
        own = index == keys
        seen = jnp.full((1, L, M + L), True)
        if self.causal:
            seen &= keys <= index
        if self.same_length:
            seen &= keys + M >= index
        if cache is not None:
            seen = seen & (keys >= -cache["length"][:, None, None])
        if "order_BL" in batch:
            order = batch["order_BL"]
            seen = seen & _beside(order[:, :, None] >= order[:, None, :], M, True)
        if "blocked_BLL" in batch:
            seen = seen & ~_beside(batch["blocked_BLL"].astype(bool), M, False)
        if "documents_BL" in batch:
            documents = batch["documents_BL"]
            own_BL = jnp.maximum(documents, 0)  # Padding itself sees document 0.
            seen = seen & (own_BL[:, :, None] == jnp.pad(documents, ((0, 0), (M, 0)))[:, None, :])
        return seen, own

    def _layer(self, p, h, g, memory_BMD, context, key):
        positions, content, query = context
        cat = h if memory_BMD is None else jnp.concatenate([memory_BMD.astype(h.dtype), h], 1)
        a = p["attention"]
        k, v = (constrain(linear(a[n], cat), "batch", "length", "act_kv_heads", None) for n in ("k", "v"))
        r = linear(a["r"], positions)

        def stream(x, part, key):
            y = self._attend(a, x, k, v, r, part, h.shape[1], fold(key, 0))
            x = norm(p["attention_norm"], x + dropout(y, self.dropout, fold(key, 1)), "layernorm", self.norm_eps)
            y = dropout(mlp(p["mlp"], x, self.activation, self.dropout, fold(key, 2)), self.dropout, fold(key, 3))
            return constrain(
                norm(p["mlp_norm"], x + y, "layernorm", self.norm_eps), "batch", "residual_length", "act_embed"
            )

        return stream(h, content, fold(key, 0)), None if g is None else stream(g, query, fold(key, 1))

    def _attend(self, a, x, k, v, r_BRHC, part, length, key):
        seen, same, picks = part
        q = constrain(linear(a["q"], x), "batch", "length", "act_heads", None)
        S, form = k.shape[1], Form(causal=False, dropout=self.dropout)

        def plus(name):
            return q + a[name].astype(q.dtype)[None, None]

        if r_BRHC.shape[0] == 1:
            scores = jnp.einsum("blhc,rhc->bhlr", plus("position_bias"), r_BRHC[0], preferred_element_type=jnp.float32)
        else:
            scores = jnp.einsum("blhc,brhc->bhlr", plus("position_bias"), r_BRHC, preferred_element_type=jnp.float32)
        bias = by_key(scores, S, picks, length)
        if same is not None:
            segments = a["segments"].astype(q.dtype)
            either = jnp.einsum("blhc,thc->tbhl", plus("segment_bias"), segments, preferred_element_type=jnp.float32)
            bias = bias + jnp.where(same[:, None], either[0][..., None], either[1][..., None])
        bias = jnp.where(seen[:, None], bias * self.head_dim**-0.5, _HIDDEN)
        return linear(a["o"], attention(form, plus("content_bias"), k, v, bias=bias, key=key), contracted=2)

    def _remember(self, cache, entered):
        kept = entered if self.reuse is None else entered[:, :, : self.reuse]
        memory = jnp.concatenate([cache["memory"].astype(kept.dtype), kept], 2)
        size = memory.shape[2] if self.memory is None else min(self.memory, memory.shape[2])
        length = jnp.minimum(cache["length"] + kept.shape[2], size)
        return {"memory": jax.lax.stop_gradient(memory[:, :, memory.shape[2] - size :]), "length": length}


def _beside(pairs_BLL, M, value):
    """[B, L, M + L]: with `value` for the memory."""
    return jnp.pad(pairs_BLL, ((0, 0), (0, 0), (M, 0)), constant_values=value)


def _pick(rows_BLS, picks_BP):
    return jnp.take_along_axis(rows_BLS, picks_BP[:, :, None], 1)
