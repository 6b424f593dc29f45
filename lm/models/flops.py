"""The floating-point operations of a forward pass: two for each parameter that a token meets, and attention's."""

from typing import Any

from lm.core import params


def body_flops(spec: Any, length: int) -> float:
    """Of the products of `length` tokens with all matrices of `spec`, of experts with the chosen ones."""
    return 2 * length * params.count_passed(spec, "matrix", "router")


def head_flops(head: Any, length: int) -> float:
    """Of the scores of `length` positions; `head` is the part of the spec that makes them."""
    return 2 * length * (params.count_passed(head, "matrix") + params.count(head, "embedding", "head"))


def forward_flops(model: Any, spec: Any, lengths: dict[str, int]) -> float:
    """Of one row of a model with one stack: its tokens pass the body, its targets alone the head.

    `lengths` are those of a row's arrays by their names in a batch.
    """
    length, scored = lengths["tokens_BL"], targets(lengths)
    head = model.head(spec) if scored else {}
    # Matrices of the head are part of the spec too.
    body = body_flops(spec, length) - 2 * length * params.count_passed(head, "matrix")
    return body + head_flops(head, scored) + length * model.attention_flops(length)


def targets(lengths: dict[str, int]) -> int:
    """How many positions of a row are scored; none where an objective asks for something else alone."""
    return next((lengths[name] for name in ("targets_BP", "targets_BL") if name in lengths), 0)
