"""Trees of nested dicts as {path: leaf}, the form in which digests, maps and masks are written."""

from typing import Any

from flax import traverse_util


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{"decoder/attention/q": leaf, ...}; empty dicts have no path and vanish."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")
