"""Weights in and out: checkpoints of our own, and those of others.

`save`, `forward` and `linen` come from their files when they are asked for.
"""

from typing import Any

_HOMES = {"save": "hf", "forward": "outputs", "linen": "flax_module"}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'lm.interop' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lm.interop.{_HOMES[name]}"), name)
