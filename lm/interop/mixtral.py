"""Mixtral: Mistral with experts in every layer, which always share their weights out to a sum of 1."""

import dataclasses
from typing import Any

from lm.interop import llama
from lm.interop.decoders import expert_tensors, layer_tensors, numbers, read_experts, write_experts
from lm.interop.fields import Fields
from lm.interop.hf import Tensor
from lm.layers.block import Layer
from lm.models.decoder import Decoder

__all__ = ["ARCHITECTURES", "MODEL", "PREFIX", "UNPREFIXED", "numbers", "read", "tensors", "write"]

MODEL, PREFIX, UNPREFIXED = llama.MODEL, llama.PREFIX, llama.UNPREFIXED
ARCHITECTURES = {"MixtralForCausalLM": "mixtral"}
_DENSE = "MistralForCausalLM"


def read(fields: Fields, architecture: str) -> Decoder:
    """The model of a MixtralConfig."""
    fields.expect("attention_bias", False)
    fields.expect("router_jitter_noise", 0.0)
    layer = Layer(window=fields.get("sliding_window"), experts=read_experts(fields, normalize=True))
    model = llama.read(fields, _DENSE)
    # Defaults of its own.
    base = 1e6 if fields.first("rope_parameters", "rope_theta") is None else model.rope_base
    eps = fields.get("rms_norm_eps", 1e-5)
    return dataclasses.replace(model, pattern=(layer,), rope_base=base, norm_eps=eps)


def write(model: Decoder, architecture: str) -> dict[str, Any]:
    """The settings of a MixtralConfig."""
    experts = model.stack.layers[0].experts
    width = (experts and experts.mlp_width) or model.stack.block.mlp_width
    own = {"intermediate_size": width, "router_jitter_noise": 0.0}
    return llama.write(model, _DENSE) | write_experts(experts) | own


def tensors(model: Decoder, architecture: str) -> list[Tensor]:
    """Every tensor of the file, in which each expert has its own."""
    router = layer_tensors(model, "model.layers.{}.", [("block_sparse_moe.gate", ("mlp/router",), {})])
    names = {"gate": "w1", "down": "w2", "up": "w3"}
    experts = expert_tensors(model, "model.layers.{}.block_sparse_moe.experts.{}.", names)
    return llama.tensors(model, _DENSE) + router + experts
