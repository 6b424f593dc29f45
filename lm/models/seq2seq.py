"""Recurrent encoder-decoders: with attention over the source, and with one code for all of it, as autoencoders have."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lm.core import params as specs
from lm.core.errors import UsageError, check_choice, check_given, check_positive, unknown
from lm.core.params import Constant, Param, Uniform
from lm.layers import cache as caches
from lm.layers.additive_attention import additive_spec, as_source, attentive
from lm.layers.dropout import dropout, fold
from lm.layers.embed import biased_logits, embed_spec, embed_tokens
from lm.layers.linear import linear, linear_spec
from lm.layers.recurrent import CELLS, continuing, last, recurrent, recurrent_spec, state_spec
from lm.models.flops import body_flops, head_flops, targets
from lm.models.output import Output
from lm.parallel.rules import constrain

DIRECTIONS = {"both": ("forward", "backward"), "forward": ("forward",), "backward": ("backward",)}


@dataclasses.dataclass(frozen=True)
class Seq2Seq:
    """The config, hashable, and the pure functions over its parameters (Bahdanau et al. 2014, 1409.0473).

    `attention`: with "additive" each step of the decoder's first layer attends to the places of the source from the
    state before it, by scores of `attention_width` (None: `hidden`). With "none" the source is one code of `code_width`
    (None: `hidden`), tanh of the encoder's last states, and takes the place of what attention finds at every step (Cho
    et al. 2014, 1406.1078); the decoder starts from tanh of the code, or of the encoder's state at the first word where
    it attends. What is scored is a maxout of `readout_width` (None: `width`) over pairs of sums of the decoder's state,
    the embedding of the token before and the context, as in both papers, since the state then need not carry the token
    and the source on to the output.

    `layers` read the source in `directions`: "both", "forward", or "backward", which is a reversed source (Sutskever et
    al. 2014, 1409.3215, whose decoder starts from the encoder's states themselves). `decoder_layers` beyond the first
    see the layer below alone. `dropout` is on what enters each layer and the head. The source has embeddings of its own
    where `source_vocab_size` is set. Departures: a GRU's reset comes after its product, and initial values are as
    lm.models.recurrent.Recurrent has them, within `init_limit` and `cell_limit`, those of projections within
    inputs^-0.5. `start_id` is what the decoder starts from; logits from `valid_vocab_size` on stand for no token.
    """

    cell: str = "gru"
    layers: int = 1
    decoder_layers: int = 1
    width: int = 256
    hidden: int = 512
    directions: str = "both"
    attention: str = "additive"
    attention_width: int | None = None
    code_width: int | None = None
    readout_width: int | None = None
    dropout: float = 0.0
    start_id: int = 0
    vocab_size: int | None = None
    valid_vocab_size: int | None = None
    source_vocab_size: int | None = None
    init_limit: float = 0.1
    cell_limit: float | None = None
    dtype: str = "float32"

    offers = ("source",)  # What an objective may need of it.
    context_limit = None  # Any length.

    def __post_init__(self):
        check_choice("cell", self.cell, CELLS)
        check_choice("directions", self.directions, DIRECTIONS)
        check_choice("attention", self.attention, ("additive", "none"))
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        for name in ("layers", "decoder_layers", "width", "hidden", "init_limit"):
            check_positive(**{name: getattr(self, name)})
        check_given(self, "attention_width", "code_width", "readout_width", "source_vocab_size", "cell_limit")
        for name, kind in (("attention_width", "additive"), ("code_width", "none")):
            if getattr(self, name) is not None and self.attention != kind:
                raise UsageError(f"{name}={getattr(self, name)} has no effect with attention={self.attention!r}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.start_id < 0:
            raise UsageError(f"start_id={self.start_id} must not be negative")
        if self.valid_vocab_size is not None and not 0 < self.valid_vocab_size <= (self.vocab_size or 0):
            raise UsageError(f"valid_vocab_size={self.valid_vocab_size} is not within vocab_size={self.vocab_size}")

    @property
    def memory_width(self) -> int:
        """Of the encoder's output."""
        return len(DIRECTIONS[self.directions]) * self.hidden

    @property
    def context_width(self) -> int:
        """Of what the decoder sees of the source at each step."""
        return self.memory_width if self.attention == "additive" else self.code_width or self.hidden

    def spec(self) -> dict[str, Any]:
        """{"embed", "encoder", "start", "decoder", "readout", "head"}, "attention" or "code", and "source_embed"."""
        if self.vocab_size is None:
            raise UsageError("vocab_size=None is not resolved: take it from the tokenizer or set it")
        tables = Uniform(self.init_limit)
        spec: dict[str, Any] = {
            "embed": embed_spec(self.vocab_size, self.width, tables),
            "encoder": {
                f"layer_{i}": {
                    name: self._layer_spec(self.memory_width if i else self.width)
                    for name in DIRECTIONS[self.directions]
                }
                for i in range(self.layers)
            },
            "decoder": {
                f"layer_{i}": self._layer_spec(self.hidden if i else self.width + self.context_width)
                for i in range(self.decoder_layers)
            },
        }
        if self.source_vocab_size is not None:
            spec["source_embed"] = embed_spec(self.source_vocab_size, self.width, tables, axis="source_vocab")
        if self.attention == "additive":
            rank = self.attention_width or self.hidden
            spec["attention"] = additive_spec(self.hidden, self.memory_width, rank, Uniform(self.hidden**-0.5))
            code_width = self.hidden
        else:
            code_width = self.context_width
            spec["code"] = _projection(self.memory_width, {"mlp": code_width})
        states = self._states_spec(1)
        spec["start"] = {
            layer: {name: _projection(code_width, {"mlp": self.hidden}) for name in states[layer]} for layer in states
        }
        readout = self.readout_width or self.width
        spec["readout"] = _projection(self.hidden + self.width + self.context_width, {"gates": 2, "mlp": readout})
        table = embed_spec(self.vocab_size, readout, tables)["table"]
        spec["head"] = {
            "table": dataclasses.replace(table, inputs=("embed",), role="head"),
            "bias": Param((self.vocab_size,), ("vocab",), Constant(), role="vector"),
        }
        return spec

    def apply(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """What the head scores, [B, L, readout] in `dtype`.

        `batch` has tokens_BL and what `encode` takes, one source a row. `key` turns dropout on. With a `cache` a batch
        with a source begins anew, and one without continues; documents_BL of -1 is then padding at a row's end, which
        the cache does not hold. capture=("attention",) adds its weights [B, L, S], ("memory",)
        and ("code",) what `encode` makes.
        """
        _check_captures(capture, ("code", "memory") + ("attention",) * (self.attention == "additive"))
        if "documents_BL" in batch and cache is None:
            raise ValueError("a row of Seq2Seq is one text with one source: leave documents_BL out")
        lengths_B = caches.lengths(batch.get("documents_BL"))
        captured: dict[str, Any] = {}
        if "source_tokens_BS" in batch:
            encoded = self.encode(params, batch, key=fold(key, 0), capture=("code",))
            code_BC = encoded.captured["code"]
            source, states = self._source(params, batch, encoded.hidden_BLD, code_BC), self._start(params, code_BC)
            captured = {"memory": encoded.hidden_BLD, "code": code_BC}
        elif cache is None:
            raise ValueError("a batch without source_tokens_BS needs a cache that holds what was read of it")
        else:
            source, states = cache["source"], cache["states"]
        x_LBD = embed_tokens(params["embed"], batch["tokens_BL"], self.dtype).swapaxes(0, 1)
        x_LBD = dropout(x_LBD, self.dropout, fold(key, 1))
        after, context_LBD, captured["attention"] = self._first(params, x_LBD, source, states["layer_0"])
        left = {"layer_0": last(states["layer_0"], after, lengths_B)}
        for i in range(1, self.decoder_layers):
            name, below_LBH = f"layer_{i}", dropout(after["h"].astype(self.dtype), self.dropout, fold(key, i + 2))
            after = recurrent(self.cell, params["decoder"][name], below_LBH, states[name])
            left[name] = last(states[name], after, lengths_B)
        read = jnp.concatenate([after["h"].astype(self.dtype), x_LBD, context_LBD], -1)
        out_LBR = dropout(jnp.max(linear(params["readout"], read), -2), self.dropout, fold(key, 2))
        out_BLR = constrain(out_LBR.swapaxes(0, 1), "batch", "residual_length", "act_embed")
        cache = None if cache is None else {"source": source, "states": left}
        return Output(out_BLR, cache, captured={name: captured[name] for name in capture})

    def encode(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """The memory, states of the last layer at each place of the source [B, S, D] in `dtype`.

        `batch` has source_tokens_BS and may have source_documents_BS, where -1 is padding: each direction starts at the
        first real word it meets. capture=("code",) adds [B, code_width], or the state that the decoder starts from
        where it attends; it is zero for a row without a word.
        """
        _check_captures(capture, ("code",))
        table = params.get("source_embed", params["embed"])
        x_SBD = embed_tokens(table, batch["source_tokens_BS"], self.dtype).swapaxes(0, 1)
        documents_BS = _documents(batch)
        for i in range(self.layers):
            x_SBD = dropout(x_SBD, self.dropout, fold(key, i))
            layer = params["encoder"][f"layer_{i}"]
            read = {name: self._read(name, layer[name], x_SBD, documents_BS) for name in layer}
            x_SBD = jnp.concatenate([read[name] for name in DIRECTIONS[self.directions]], -1)
        # Said here and of the code, or over data, fsdp and tensor together the partitioner (jaxlib 0.10) pairs the rows
        # of the decoder's gradients with others of the encoder's.
        memory_BSD = constrain(x_SBD.swapaxes(0, 1), "batch", "length", "act_embed")
        return Output(memory_BSD, captured={name: self._code(params, read, documents_BS) for name in capture})

    def cache_spec(self, batch_size: int, length: int, source_length: int) -> dict[str, Any]:
        """The states of the decoder's layers and what it sees of the source: neither grows with the `length`."""

        def held(dtype: str, sizes: dict[str, int]) -> Param:
            shape, axes = (batch_size, *sizes.values()), ("batch", *sizes)
            return Param(shape, axes, Constant(), role="vector", trainable=False, dtype=dtype)

        if self.attention == "none":
            source = {"code": held(self.dtype, {"act_embed": self.context_width})}
        else:
            source = {
                "memory": held(self.dtype, {"length": source_length, "act_embed": self.memory_width}),
                "keys": held(self.dtype, {"length": source_length, "act_mlp": self.attention_width or self.hidden}),
                "real": held("float32", {"length": source_length}),
            }
        return {"source": source, "states": self._states_spec(batch_size)}

    def forward_flops(self, spec: dict[str, Any], lengths: dict[str, int]) -> float:
        """Floating-point operations of a row: of its source in the encoder, of its tokens in the decoder."""
        S, L = lengths["source_tokens_BS"], lengths["tokens_BL"]
        flops = body_flops(spec["encoder"], S) + body_flops([spec["decoder"], spec["readout"]], L)
        flops += body_flops([spec["start"], spec.get("code", {})], 1) + head_flops(self.head(spec), targets(lengths))
        if self.attention == "none":
            return flops
        p = spec["attention"]
        scored = S * L * (p["score"].shape[0] + self.memory_width)
        return flops + body_flops(p["key"], S) + body_flops(p["query"], L) + 2 * scored

    def head(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters that make logits."""
        return params["head"]

    def logits(self, head: dict[str, Any], x: jax.Array) -> jax.Array:
        """[..., V] in float32 for any hidden states; logits that stand for no token are masked."""
        return biased_logits(head, x, self.valid_vocab_size)

    def _layer_spec(self, inputs: int) -> dict[str, Param]:
        return recurrent_spec(self.cell, inputs, self.hidden, Uniform(self.cell_limit or self.hidden**-0.5))

    def _states_spec(self, batch_size: int) -> dict[str, Any]:
        return {f"layer_{i}": state_spec(self.cell, batch_size, self.hidden) for i in range(self.decoder_layers)}

    def _read(self, direction: str, p: dict[str, Any], x_SBD: jax.Array, documents_BS: jax.Array) -> jax.Array:
        """The states [S, B, H] of one direction: behind padding, which is another document, they start anew."""
        step = 1 if direction == "forward" else -1
        zeros = specs.initialize(state_spec(self.cell, x_SBD.shape[1], self.hidden), jax.random.key(0))
        states = recurrent(self.cell, p, x_SBD[::step], zeros, continuing(documents_BS[:, ::step]))
        return states["h"][::step].astype(x_SBD.dtype)

    def _code(self, params: dict[str, Any], read: dict[str, jax.Array], documents_BS: jax.Array) -> jax.Array:
        """[B, C] from the states that each direction ends in."""
        real_BS = documents_BS >= 0
        S, rows = real_BS.shape[1], jnp.arange(real_BS.shape[0])
        ends = {"forward": S - 1 - jnp.argmax(real_BS[:, ::-1], 1), "backward": jnp.argmax(real_BS, 1)}
        directions = DIRECTIONS[self.directions]
        if self.attention == "additive":
            directions = directions[-1:]
        code_BC = jnp.concatenate([read[name][ends[name], rows] for name in directions], -1)
        if self.attention == "none":
            code_BC = jnp.tanh(linear(params["code"], code_BC))
        return constrain(code_BC * jnp.any(real_BS, 1, keepdims=True).astype(code_BC.dtype), "batch", "act_embed")

    def _start(self, params: dict[str, Any], code_BC: jax.Array) -> dict[str, Any]:
        def start(p):
            return jnp.tanh(linear(p, code_BC)).astype(jnp.float32)

        return {layer: {name: start(p) for name, p in own.items()} for layer, own in params["start"].items()}

    def _source(
        self, params: dict[str, Any], batch: dict[str, jax.Array], memory_BSD: jax.Array, code_BC: jax.Array
    ) -> dict[str, jax.Array]:
        if self.attention == "none":
            return {"code": code_BC}
        return as_source(params["attention"], memory_BSD, (_documents(batch) >= 0).astype(jnp.float32))

    def _first(
        self, params: dict[str, Any], x_LBD: jax.Array, source: dict[str, jax.Array], state: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], jax.Array, jax.Array | None]:
        """(states of the decoder's first layer, what it saw of the source at each step, attention's weights)."""
        p = params["decoder"]["layer_0"]
        if self.attention == "none":
            code_LBC = jnp.broadcast_to(source["code"], (len(x_LBD), *source["code"].shape))
            return recurrent(self.cell, p, jnp.concatenate([x_LBD, code_LBC], -1), state), code_LBC, None
        states, context_LBD, weights_LBS = attentive(self.cell, p, params["attention"], x_LBD, state, source)
        return states, context_LBD.astype(x_LBD.dtype), weights_LBS.swapaxes(0, 1)


def _documents(batch: dict[str, jax.Array]) -> jax.Array:
    return batch.get("source_documents_BS", jnp.zeros_like(batch["source_tokens_BS"]))


def _check_captures(capture: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    for name in capture:
        if name not in allowed:
            raise unknown("capture", name, allowed)


def _projection(inputs: int, outputs: dict[str, int]) -> dict[str, Param]:
    return linear_spec({"embed": inputs}, outputs, Uniform(inputs**-0.5), bias=True)
