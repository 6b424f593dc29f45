"""Language-model pretraining research in JAX: every family in one core.

`lm.load(CKPT)` gives (model, params) and `lm.load_tokenizer(CKPT)` its tokenizer; `lm.interop` has the other ways in
and out. All are imported when asked for.
"""

from typing import Any

__all__ = ["interop", "load", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lm' has no attribute {name!r}")
    import importlib

    if name == "interop":
        return importlib.import_module("lm.interop")
    return getattr(importlib.import_module("lm.interop.load"), name)
