"""What the families of decoders share: sizes, rotations, the order of layers, and which settings are numbers."""

import dataclasses
from typing import Any

from lm.core.errors import UsageError
from lm.interop.fields import Fields
from lm.interop.hf import Tensor, without_training
from lm.layers.block import Layer
from lm.layers.moe import Experts
from lm.layers.positions import LinearScaling, Llama3Scaling, Scaling, YarnScaling
from lm.models.decoder import Decoder
from lm.models.encoder import Encoder

ACTIVATIONS = {  # By Hugging Face's names, ours.
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "gelu_fast": "gelu_tanh",
    "relu2": "squared_relu",
    "tanh": "tanh",
}
ACTIVATION_NAMES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "silu": "silu",
    "squared_relu": "relu2",
    "tanh": "tanh",
}


def numbers(model: Decoder) -> Decoder:
    """The model with all that decides its logits written out, and nothing else: equal ones compute the same."""
    block, layers = model.stack.block, tuple(_numbers(layer, model) for layer in model.stack.layers)
    return dataclasses.replace(
        without_training(model),
        kv_heads=block.kv_heads,
        head_dim=block.head_dim,
        mlp_width=None if all(layer.experts for layer in layers) else block.mlp_width,
        prefix=(),
        pattern=layers,
    )


def _numbers(layer: Layer, model: Decoder) -> Layer:
    if layer.experts is None:
        return layer
    width = layer.experts.mlp_width or model.stack.block.mlp_width
    return dataclasses.replace(
        layer, experts=dataclasses.replace(layer.experts, mlp_width=width, balance=0.0, router_z=0.0)
    )


def repeated(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The shortest pattern that, repeated and cut short at the end, gives the layers."""
    for length in range(1, len(layers) + 1):
        if all(layer == layers[i % length] for i, layer in enumerate(layers)):
            return layers[:length]
    raise UsageError("a stack needs at least one layer")


def read_experts(fields: Fields, normalize: bool, mlp_width: int | None = None) -> Experts:
    """The experts of a config; their number is in 4.x and 5.x not always under the same name.

    Their loss is taken as ours is, a figure a layer over the share of choices: transformers takes one over all layers,
    and `num_experts_per_tok` times as large.
    """
    names = fields.get("num_local_experts"), fields.get("num_experts")
    counts = {count for count in names if count is not None}
    if len(counts) != 1:
        raise UsageError(f"num_local_experts={names[0]} and num_experts={names[1]}: one of them, or both the same")
    return Experts(
        count=counts.pop(),
        chosen=fields["num_experts_per_tok"],
        mlp_width=mlp_width,
        normalize=normalize,
        balance=fields.get("router_aux_loss_coef", 0.001),
    )


def write_experts(experts: Experts | None) -> dict[str, Any]:
    """The settings that `read_experts` reads, under both names; of no experts a number that it refuses."""
    count = 0 if experts is None else experts.count
    chosen = {} if experts is None else {"num_experts_per_tok": experts.chosen, "router_aux_loss_coef": experts.balance}
    return {"num_local_experts": count, "num_experts": count, "output_router_logits": False} | chosen


def read_rotation(fields: Fields, partial: bool = False) -> dict[str, Any]:
    """Our rope_base, rope_scaling and rope_fraction, from either spelling of them.

    Classes other than the `partial` ones rotate all of a head whatever their config says: a fraction is refused there.
    """
    rope = dict(fields.first("rope_parameters", "rope_scaling", default={}))
    fields.get("rope_scaling")
    base = rope.pop("rope_theta", None) or fields.first("rope_theta", "rotary_emb_base", default=10000.0)
    fraction = rope.pop("partial_rotary_factor", None)
    old_fraction = fields.first("partial_rotary_factor", "rotary_pct", default=1.0)
    for name in ("rope_theta", "rotary_emb_base"):
        fields.get(name)
    fraction = float(old_fraction if fraction is None else fraction)
    if fraction != 1.0 and not partial:
        raise UsageError(f"partial_rotary_factor={fraction} is not what this class computes: GPT-NeoX alone does")
    scaling = _scaling(rope, fields.get("max_position_embeddings"))
    return {"rope_base": float(base), "rope_scaling": scaling, "rope_fraction": fraction}


def read_scaling(rope: dict[str, Any], longest: Any) -> tuple[float, Scaling | None]:
    """(base, scaling) of one set of rope_parameters, whose lengths are `longest` where it names none."""
    return float(rope.pop("rope_theta")), _scaling(rope, longest)


def _scaling(rope: dict[str, Any], longest: Any) -> Scaling | None:
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    original = rope.pop("original_max_position_embeddings", None) or longest
    if kind == "default":
        return None
    try:
        factor = float(rope.pop("factor"))
        if kind == "linear":
            scaling: Scaling = LinearScaling(factor)
        elif kind == "llama3":
            scaling = Llama3Scaling(factor, rope.pop("low_freq_factor"), rope.pop("high_freq_factor"), original)
        elif kind == "yarn":
            ends = float(rope.pop("beta_fast", None) or 32), float(rope.pop("beta_slow", None) or 1)
            scaling = YarnScaling(
                factor, original, *ends, rope.pop("attention_factor", None), rope.pop("truncate", True)
            )
        else:
            raise UsageError(f"rope_type={kind!r} is not supported: default, linear, llama3 and yarn are")
    except KeyError as error:
        raise UsageError(f"rope_type={kind!r} needs {error}") from None
    left = [name for name, value in rope.items() if value is not None]
    if left:
        raise UsageError(f"rope_type={kind!r} has a setting {left[0]!r} that is not supported")
    return scaling


def write_rotation(model: Decoder) -> dict[str, Any]:
    """rope_parameters for transformers 5.x, rope_theta and rope_scaling for 4.x."""
    scaling = scaling_fields(model.rope_scaling)
    fraction = {} if model.rope_fraction == 1.0 else {"partial_rotary_factor": model.rope_fraction}
    return {
        "rope_parameters": {"rope_theta": model.rope_base} | scaling | fraction,
        "rope_theta": model.rope_base,
        "rope_scaling": None if model.rope_scaling is None else scaling,
    } | longest_position(model.rope_scaling)


def longest_position(scaling: Scaling | None) -> dict[str, int]:
    """max_position_embeddings, from which transformers 4.x takes the factor of yarn."""
    if not isinstance(scaling, YarnScaling):
        return {}
    return {"max_position_embeddings": round(scaling.factor * scaling.original_len)}


def scaling_fields(given: Scaling | None) -> dict[str, Any]:
    """rope_type and its settings."""
    fields: dict[str, Any] = {"rope_type": "default"}
    match given:
        case LinearScaling(factor):
            fields = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, original):
            fields = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
        case YarnScaling(factor, original, fast, slow, attention_factor, truncate):
            fields = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                "beta_fast": fast,
                "beta_slow": slow,
                "attention_factor": attention_factor,
                "truncate": truncate,
            }
    return fields


def layer_tensors(
    model: Decoder | Encoder, prefix: str, parts: list[tuple[str, tuple[str, ...], dict[str, Any]]]
) -> list[Tensor]:
    """The tensors of every layer, where `parts` gives (name, our sub-trees, how they lie) and each may have a bias.

    `prefix` has a place for the layer's number. A part whose leaves the model does not have is left out, and so are
    experts, see `expert_tensors`.
    """
    from lm.core import tree

    known, found = tree.flatten(model.spec()), []
    for number, (path, index) in enumerate(model.stack.places):
        for name, own, form in parts:
            for kind, ours in (("weight", ("kernel", "scale")), ("bias", ("bias",))):
                leaves = [f"{path}/{part}/{leaf}" for part in own for leaf in ours]
                leaves = [leaf for leaf in leaves if leaf in known and "experts" not in known[leaf].axes]
                if leaves:
                    full = f"{prefix.format(number)}{name}.{kind}"
                    found.append(Tensor(full, tuple((leaf, index) for leaf in leaves), **form))
    return found


def expert_tensors(model: Decoder, prefix: str, names: dict[str, str]) -> list[Tensor]:
    """The tensors of every expert, where `names` gives {our kernel's: name}.

    `prefix` has places for the layer's number and the expert's.
    """
    return [
        Tensor(f"{prefix.format(number, expert)}{name}.weight", ((f"{path}/mlp/{own}/kernel", (index, expert)),))
        for number, (layer, (path, index)) in enumerate(zip(model.stack.layers, model.stack.places, strict=True))
        if layer.experts is not None
        for expert in range(layer.experts.count)
        for own, name in names.items()
    ]


def outer_tensors(model: Any, names: dict[str, str]) -> list[Tensor]:
    """The tensors outside the layers that the model has, by {our path: name}."""
    from lm.core import tree

    known = tree.flatten(model.spec())
    return [Tensor(name, ((path, None),)) for path, name in names.items() if path in known]
