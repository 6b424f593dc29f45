"""Language-model pretraining research in JAX: every family in one core.

`lm.load(CKPT)` gives (model, params) and `lm.load_tokenizer(CKPT)` its tokenizer; both are imported when asked for.
"""

from typing import Any

__all__ = ["load", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lm' has no attribute {name!r}")
    from lm.interop import load

    return getattr(load, name)
