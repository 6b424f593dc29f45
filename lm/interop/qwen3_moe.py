"""Qwen3-MoE: Qwen 3 with experts in all layers, in every n-th, or in all but some."""

import dataclasses
from typing import Any

from lm.interop import llama
from lm.interop.decoders import expert_tensors, layer_tensors, numbers, read_experts, repeated, write_experts
from lm.interop.fields import Fields
from lm.interop.hf import Tensor
from lm.layers.block import Layer
from lm.models.decoder import Decoder

__all__ = ["ARCHITECTURES", "MODEL", "PREFIX", "UNPREFIXED", "numbers", "read", "tensors", "write"]

MODEL, PREFIX, UNPREFIXED = llama.MODEL, llama.PREFIX, llama.UNPREFIXED
ARCHITECTURES = {"Qwen3MoeForCausalLM": "qwen3_moe"}
_DENSE = "Qwen3ForCausalLM"


def read(fields: Fields, architecture: str) -> Decoder:
    """The model of a Qwen3MoeConfig; its windows, unlike Qwen 3's, are in all layers or none."""
    model = llama.read(fields, _DENSE)
    window = fields.get("sliding_window") if fields.get("use_sliding_window", False) else None
    width = fields.get("moe_intermediate_size", 768)
    experts = read_experts(fields, fields.get("norm_topk_prob", False), width)
    dense, step = fields.get("mlp_only_layers") or [], fields.get("decoder_sparse_step", 1)
    layers = tuple(
        Layer(window=window, experts=experts if i not in dense and (i + 1) % step == 0 else None)
        for i in range(model.layers)
    )
    return dataclasses.replace(model, pattern=repeated(layers))


def write(model: Decoder, architecture: str) -> dict[str, Any]:
    """The settings of a Qwen3MoeConfig."""
    layers = model.stack.layers
    experts = next((layer.experts for layer in layers if layer.experts is not None), None)
    config = llama.write(model, _DENSE) | write_experts(experts)
    del config["layer_types"]
    return config | {
        "moe_intermediate_size": (experts and experts.mlp_width) or model.stack.block.mlp_width,
        "norm_topk_prob": experts is not None and experts.normalize,
        "mlp_only_layers": [i for i, layer in enumerate(layers) if layer.experts is None],
        "decoder_sparse_step": 1,
    }


def tensors(model: Decoder, architecture: str) -> list[Tensor]:
    """Every tensor of the file, in which each expert has its own."""
    router = layer_tensors(model, "model.layers.{}.", [("mlp.gate", ("mlp/router",), {})])
    names = {name: f"{name}_proj" for name in ("gate", "up", "down")}
    return llama.tensors(model, _DENSE) + router + expert_tensors(model, "model.layers.{}.mlp.experts.{}.", names)
