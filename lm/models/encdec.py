"""The encoder-decoder Transformer: the original, Marian, FSMT, T5, UMT5 and BART are settings of one class."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from lm.core import tree
from lm.core.config import setting
from lm.core.errors import UsageError, check_choice, check_given, check_positive, unknown
from lm.core.parametrization import Ratios, ratios_of
from lm.core.params import Constant, Normal, Param
from lm.layers import cache as caches
from lm.layers.block import Block, Context, Layer
from lm.layers.buckets import Buckets, bucket_bias
from lm.layers.dropout import dropout, fold
from lm.layers.embed import embed, embed_spec, embed_tokens, mask_padding, unembed
from lm.layers.positions import SINUSOIDS, sinusoids
from lm.layers.stack import Stack, groups
from lm.models.flops import body_flops, head_flops, targets
from lm.models.output import Output
from lm.parallel.rules import constrain

POSITIONS = ("learned", "sinusoidal", "none")
CAPTURES = ("hidden_states",)


@dataclasses.dataclass(frozen=True)
class EncDec:
    """The config, hashable, and the pure functions over its parameters (Vaswani et al. 2017, 1706.03762).

    `decoder_layers`, `decoder_heads` and `decoder_mlp_width` are the encoder's unless given. One table embeds the
    tokens of both sides unless `source_vocab_size` gives the source one of its own. The decoder begins with
    `start_id`. Positions count from `position_offset` (BART's learned ones from 2); `buckets` add biases by distance
    to the scores of self-attention (T5). `head_bias` is added to the logits and never trained (BART's and Marian's).
    `embed_dropout` is also that of what a final norm leaves, on both sides. What the layers share is explained at
    lm.layers.block.Block. `init_std` is with init="fan_in" and "t5" the embeddings' alone. `valid_vocab_size`: logits
    from there on stand for no token and are masked. With another `parametrization` than "sp" all settings are those of
    the base, see lm.core.parametrization.ratios_of; its tunable multipliers of input and output are `embed_scale` and
    `logit_scale`.
    """

    layers: int = 6
    decoder_layers: int | None = None
    width: int = 512
    heads: int = 8
    decoder_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    decoder_mlp_width: int | None = None
    vocab_size: int | None = None
    valid_vocab_size: int | None = None
    source_vocab_size: int | None = None
    start_id: int = 0
    positions: str = "sinusoidal"
    sinusoid_layout: str = "interleaved"
    position_offset: int = 0
    max_len: int | None = None
    buckets: Buckets | None = None
    norm: str = "layernorm"
    norm_bias: bool = True
    norm_eps: float = 1e-5
    norm_place: str = "post"
    embed_norm: bool = False
    activation: str = "relu"
    gated: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    attention_scale: float | None = None
    tied: bool = True
    head_bias: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    embed_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    init: str = "normal"
    init_std: float = 0.02
    parametrization: str = "sp"
    base_width: int | None = None
    base_layers: int | None = None
    base_head_dim: int | None = None
    decay_keeps: str = "product"
    dtype: str = "float32"
    attention_kernel: str = setting("auto", identity=False)
    remat: str = "none"
    scan: bool = True

    def __post_init__(self):
        check_positive(layers=self.layers, width=self.width, heads=self.heads)
        check_given(self, "decoder_layers", "decoder_heads", "head_dim", "mlp_width", "decoder_mlp_width")
        check_given(self, "max_len", "source_vocab_size")
        check_choice("positions", self.positions, POSITIONS)
        check_choice("sinusoid_layout", self.sinusoid_layout, SINUSOIDS)
        for name in ("heads", "decoder_heads"):
            if self.head_dim is None and self.width % (getattr(self, name) or 1):
                raise UsageError(f"width={self.width} is no multiple of {name}={getattr(self, name)}: set head_dim")
        if (self.positions == "learned") != (self.max_len is not None):
            raise UsageError(
                f"max_len={self.max_len} with positions={self.positions!r}: learned positions alone need it"
            )
        if self.positions == "sinusoidal" and self.width % 2:
            raise UsageError(f"width={self.width} with positions='sinusoidal' must be even")
        if self.positions != "sinusoidal" and self.sinusoid_layout != "interleaved":
            raise UsageError(f"sinusoid_layout has no effect with positions={self.positions!r}: leave it out")
        if self.position_offset < 0 or (self.positions == "none" and self.position_offset):
            raise UsageError(f"position_offset={self.position_offset} must not be negative, and 0 without positions")
        if self.start_id < 0:
            raise UsageError(f"start_id={self.start_id} must not be negative")
        if not 0 <= self.embed_dropout < 1:
            raise UsageError(f"embed_dropout={self.embed_dropout} must be at least 0 and below 1")
        if self.valid_vocab_size is not None and not 0 < self.valid_vocab_size <= (self.vocab_size or 0):
            raise UsageError(f"valid_vocab_size={self.valid_vocab_size} is not within vocab_size={self.vocab_size}")
        if self.parametrization == "completep" and self.decoder_layers not in (None, self.layers):
            raise UsageError(
                f"parametrization='completep' has one depth: decoder_layers={self.decoder_layers} must be "
                f"layers={self.layers}"
            )
        _ = self.encoder_stack, self.decoder_stack

    offers = ("source",)  # What an objective may need of it.

    @property
    def context_limit(self) -> int | None:
        """The longest source, and the longest target, that has positions; None where any length has."""
        return self.max_len

    @functools.cached_property
    def encoder_stack(self) -> Stack:
        """The encoder's layers, with every size filled in."""
        return self._stack(self.layers, self.heads, self.mlp_width, decoder=False)

    @functools.cached_property
    def decoder_stack(self) -> Stack:
        """The decoder's, which see the tokens before and the memory."""
        heads, mlp_width = self.decoder_heads or self.heads, self.decoder_mlp_width or self.mlp_width
        return self._stack(self.decoder_layers or self.layers, heads, mlp_width, decoder=True)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return self.encoder_stack, self.decoder_stack

    @property
    def ratios(self) -> Ratios:
        """Its sizes over those of the base, by which it is parametrized."""
        return ratios_of(self, self.head_dim or self.width // self.heads)

    def spec(self) -> dict[str, Any]:
        """{"embed", "encoder", "decoder"}, "source_embed" and "head" where they are apart; layers are stacked."""
        if self.vocab_size is None:
            raise UsageError("vocab_size=None is not resolved: take it from the tokenizer or set it")
        embeddings = Normal(self.init_std)
        spec: dict[str, Any] = {
            "embed": embed_spec(self.vocab_size, self.width, embeddings),
            "encoder": self._side_spec(self.encoder_stack),
            "decoder": self._side_spec(self.decoder_stack),
        }
        if self.source_vocab_size is not None:
            spec["source_embed"] = embed_spec(self.source_vocab_size, self.width, embeddings, axis="source_vocab")
        head = {}
        if not self.tied:
            table = embed_spec(self.vocab_size, self.width, self.decoder_stack.block.kernel_init(self.width))["table"]
            head["table"] = dataclasses.replace(table, inputs=("embed",), role="head")
        if self.head_bias:
            head["bias"] = Param((self.vocab_size,), ("vocab",), Constant(), role="vector", trainable=False)
        return self.ratios.apply(spec | ({"head": head} if head else {}))

    def apply(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """The decoder's hidden states [B, L, D] in `dtype`, ready for `logits`.

        `batch` has tokens_BL and what `encode` takes, and may have positions_BL (otherwise the index in the row) and
        documents_BL: attention stays inside equal numbers, also that to the memory where the source has
        source_documents_BS. Without documents_BL, tokens see all of the source that is no padding. `key` turns
        dropout on. With a `cache` the tokens continue each row from its own length; a batch with a source fills in
        the memory, one without continues on that of the cache. capture=("hidden_states",) adds [layers + 1, B, L, D],
        the encoder's as "encoder_states", and "memory", the encoder's output.
        """
        tokens_BL, documents, stack = batch["tokens_BL"], batch.get("documents_BL"), self.decoder_stack
        self._check_length(tokens_BL.shape[1])
        captured: dict[str, jax.Array] = {}
        memory_BSD, source, aux = None, batch.get("source_documents_BS"), {}
        if "source_tokens_BS" in batch:
            encoded = self.encode(params, batch, key=fold(key, 0), capture=capture)
            memory_BSD, aux = encoded.hidden_BLD, encoded.aux
            if cache is not None:
                source = jnp.zeros(memory_BSD.shape[:2], jnp.int32) if source is None else source
                cache = cache | {"source_documents_BS": source}
            if capture:
                captured = {"memory": memory_BSD, "encoder_states": encoded.captured["hidden_states"]}
        elif cache is None:
            raise ValueError("a batch without source_tokens_BS needs a cache that holds the memory")
        else:
            source = cache["source_documents_BS"]
        starts_B, length_B = None, None
        if cache is not None:
            # One document a row, of which these tokens are: the cache's length alone hides what is behind it.
            starts_B, length_B = cache["length"], caches.grown(cache["length"], tokens_BL, documents)
            documents = None
        index_BL = jnp.arange(tokens_BL.shape[1])[None, :] + (0 if starts_B is None else starts_B[:, None])
        x = self._embed(params, "decoder", tokens_BL, batch.get("positions_BL", index_BL), fold(key, 1))
        keys = index_BL if cache is None else jnp.arange(cache["group0"]["layer0"]["k"].shape[2])[None, :]
        context = self._biased(params["decoder"], stack, index_BL, keys)._replace(
            starts_B=starts_B,
            documents=None if documents is None else (documents, documents),
            memory_BSD=memory_BSD,
            memory_documents=_pair(documents, source, tokens_BL),
        )
        stacked = stack.apply(params["decoder"], x, context, key=fold(key, 2), cache=cache, capture=bool(capture))
        if stacked.states is not None:
            captured["hidden_states"] = stacked.states
        if cache is not None:
            cache = cache | stacked.cache | {"length": length_B}
        x = self._leave(params["decoder"], stack, stacked.x, fold(key, 3))
        return Output(x, cache, aux | stacked.aux, captured)

    def encode(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """The memory, hidden states [B, S, D] of the encoder.

        `batch` has source_tokens_BS and may have source_positions_BS (otherwise the index in the row) and
        source_documents_BS (attention stays inside equal numbers; -1 is padding).
        """
        for name in capture:
            if name not in CAPTURES:
                raise unknown("capture", name, CAPTURES)
        tokens_BS, stack = batch["source_tokens_BS"], self.encoder_stack
        self._check_length(tokens_BS.shape[1])
        documents, index_BS = batch.get("source_documents_BS"), jnp.arange(tokens_BS.shape[1])[None, :]
        x = self._embed(params, "encoder", tokens_BS, batch.get("source_positions_BS", index_BS), fold(key, 0))
        context = self._biased(params["encoder"], stack, index_BS, index_BS)
        context = context._replace(documents=None if documents is None else (documents, documents))
        stacked = stack.apply(params["encoder"], x, context, key=fold(key, 1), capture=bool(capture))
        x = self._leave(params["encoder"], stack, stacked.x, fold(key, 2))
        return Output(x, None, stacked.aux, {} if stacked.states is None else {"hidden_states": stacked.states})

    def cache_spec(self, batch_size: int, length: int, source_length: int) -> dict[str, Any]:
        """Keys and values of `length` tokens a row and of a source of `source_length`, and each row's own length.

        Raises UsageError where a length has no positions.
        """
        for n in (length, source_length):
            self._check_length(n)
        axes = ("batch", "length")
        source = Param((batch_size, source_length), axes, Constant(), role="vector", trainable=False, dtype="int32")
        own = {"length": caches.length_spec(batch_size), "source_documents_BS": source}
        return own | self.decoder_stack.cache_spec(batch_size, length, source_length)

    def forward_flops(self, spec: dict[str, Any], lengths: dict[str, int]) -> float:
        """Floating-point operations of a row: of its source in the encoder, of its tokens in the decoder."""
        S, L = lengths["source_tokens_BS"], lengths["tokens_BL"]
        keys = {path: p for path, p in tree.flatten(spec["decoder"]).items() if re.search("memory/[kv]/kernel$", path)}
        products = body_flops(spec["encoder"], S) + body_flops(spec["decoder"], L)
        products += body_flops(keys, S) - body_flops(keys, L)  # The memory's are of the source.
        encoder, decoder = (
            s.block.layers * s.block.heads * s.block.head_dim for s in (self.encoder_stack, self.decoder_stack)
        )
        # Masked pairs of the decoder are not counted.
        attention = 4 * (encoder * S * S + decoder * (L * L / 2 + L * S))
        return products + attention + head_flops(self.head(spec), targets(lengths))

    def head(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters that make logits: the table is the embedding's where tied."""
        return params.get("head", {}) | ({"table": params["embed"]["table"]} if self.tied else {})

    def logits(self, head: dict[str, Any], x: jax.Array) -> jax.Array:
        """[..., V] in float32 for any hidden states [..., D]; logits that stand for no token are masked."""
        logits = unembed(head, x) * (self.logit_scale * self.ratios.forward("head"))
        if self.head_bias:
            logits = logits + jax.lax.stop_gradient(head["bias"]).reshape((1,) * (logits.ndim - 1) + (-1,))
        return mask_padding(logits, self.valid_vocab_size)

    def _stack(self, layers: int, heads: int, mlp_width: int | None, decoder: bool) -> Stack:
        names = {f.name for f in dataclasses.fields(Block)} & {f.name for f in dataclasses.fields(self)}
        own = {name: getattr(self, name) for name in names}
        sizes = {
            "layers": layers,
            "heads": heads,
            "kv_heads": heads,
            "head_dim": self.head_dim or self.width // heads,
            "mlp_width": mlp_width or 4 * self.width,
            "buckets": self.buckets if self.buckets is not None and self.buckets.each_layer else None,
            "ratios": self.ratios,
        }
        block = Block(**own | sizes, causal=decoder, memory=decoder)
        return Stack(block, groups(layers, (Layer(),)), self.remat, self.scan)

    def _side_spec(self, stack: Stack) -> dict[str, Any]:
        block, spec = stack.block, stack.spec()
        if self.max_len is not None:
            rows = self.max_len + self.position_offset
            spec["positions"] = embed_spec(rows, self.width, Normal(self.init_std), axis="positions")
        if self.buckets is not None and not self.buckets.each_layer:
            spec["buckets"] = self.buckets.spec(block.heads, block.base_width)
        if self.embed_norm:
            spec["embed_norm"] = block.norm_spec({"norm": self.width})
        if self.norm_place != "post":
            spec["final_norm"] = block.norm_spec({"norm": self.width})
        return spec

    def _embed(
        self, params: dict[str, Any], side: str, tokens_BL: jax.Array, positions: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        own = side == "encoder" and self.source_vocab_size is not None
        x = embed_tokens(params["source_embed" if own else "embed"], tokens_BL, self.dtype)
        x = x * jnp.asarray(self.embed_scale, self.dtype)
        positions = positions + self.position_offset
        if self.positions == "learned":
            x = x + embed(params[side]["positions"], positions, self.dtype)
        elif self.positions == "sinusoidal":
            x = x + sinusoids(positions, self.width, self.sinusoid_layout).astype(self.dtype)
        if self.embed_norm:
            x = self.encoder_stack.block.normalize(params[side]["embed_norm"], x)
        return constrain(dropout(x, self.embed_dropout, key), "batch", "residual_length", "act_embed")

    def _biased(self, p: dict[str, Any], stack: Stack, query_BL: jax.Array, key_BS: jax.Array) -> Context:
        """The context with what the layers add to their scores by distance."""
        if self.buckets is None:
            return Context()
        rows = self.buckets.rows(query_BL, key_BS, stack.block.causal)
        return Context(bucket_rows=rows) if self.buckets.each_layer else Context(bias=bucket_bias(p["buckets"], rows))

    def _leave(self, p: dict[str, Any], stack: Stack, x: jax.Array, key: jax.Array | None) -> jax.Array:
        if self.norm_place != "post":
            x = dropout(stack.block.normalize(p["final_norm"], x), self.embed_dropout, key)
        return constrain(x, "batch", "residual_length", "act_embed")

    def _check_length(self, length: int) -> None:
        if self.max_len is not None and length > self.max_len:
            raise UsageError(
                f"a sequence of {length} tokens is longer than max_len={self.max_len}: raise model.max_len"
            )


def _pair(
    documents_BL: jax.Array | None, source_documents_BS: jax.Array | None, tokens_BL: jax.Array
) -> tuple[jax.Array, jax.Array] | None:
    """(of tokens, of the source) for attention to the memory, None where every token sees all of it."""
    if source_documents_BS is None:
        return None
    if documents_BL is None:
        return jnp.zeros_like(tokens_BL), jnp.minimum(source_documents_BS, 0)
    return documents_BL, source_documents_BS
