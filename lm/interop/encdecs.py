"""What the families of encoder-decoders share: which settings are numbers, and where the layers' tensors are."""

import dataclasses

from lm.core import tree
from lm.interop.hf import Tensor, subtree_tensors, without_training
from lm.models.encdec import EncDec


def numbers(model: EncDec) -> EncDec:
    """The model with all that decides its logits written out, and nothing else: equal ones compute the same."""
    encoder, decoder = model.encoder_stack.block, model.decoder_stack.block
    same_head_dim = encoder.head_dim == decoder.head_dim
    return dataclasses.replace(
        without_training(model),
        decoder_layers=decoder.layers,
        decoder_heads=decoder.heads,
        head_dim=encoder.head_dim if same_head_dim else None,
        mlp_width=encoder.mlp_width,
        decoder_mlp_width=decoder.mlp_width,
    )


def side_tensors(model: EncDec, side: str, layer: str, parts: dict[str, str], outer: dict[str, str]) -> list[Tensor]:
    """The tensors of one side that the model has: of each layer, by {our sub-tree: name}, and those outside.

    `layer` has a place for the layer's number.
    """
    known, found = tree.flatten(model.spec()), []

    for ours, name in outer.items():
        found += subtree_tensors(known, f"{side}/{ours}", name, None)
    stack = model.encoder_stack if side == "encoder" else model.decoder_stack
    for number, (path, index) in enumerate(stack.places):
        for ours, name in parts.items():
            found += subtree_tensors(known, f"{side}/{path}/{ours}", layer.format(number) + name, index)
    return found
