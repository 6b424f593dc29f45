"""Frozen dataclasses as configs: overrides by dotted name, JSON, a digest and a diff."""

import ast
import dataclasses
import hashlib
import importlib
import json
import re
import sys
import types
import typing
from typing import Any

from lm.core.errors import UsageError, unknown

_ROOTS = re.compile(r"(lm|experiments)(\.[A-Za-z_]\w*)+")


def setting(default: Any, *, identity: bool = True) -> Any:
    """A dataclass field; with `identity=False` it says where or how often, and stays out of the digest."""
    return dataclasses.field(default=default, metadata={"identity": identity})


def override_all(config: Any, assignments: typing.Iterable[str]) -> Any:
    """A copy of `config` after every "dotted.name=value", each value parsed by the type of its field.

    All of them take effect at once, so their order does not matter: a later one of the same name wins. A field
    that holds a config takes a class name from the module of its present value ("schedule=Linear"), and keeps
    the settings that both have. Raises UsageError for an unknown name, a value of another type, or no "=".
    """
    wanted: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set={assignment} needs the form name=value")
        *parents, last = name.strip().split(".")
        inner = wanted
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner.setdefault(last, {})[""] = text.strip()
    return _override(config, wanted, "")


def _override(config: Any, wanted: dict[str, Any], prefix: str) -> Any:
    """`wanted` is {field: {"": text of its own, field of a nested config: {...}}}."""
    fields = {f.name for f in dataclasses.fields(config)}
    changes = {}
    for head, inner in wanted.items():
        if head not in fields:
            raise unknown(f"setting of {type(config).__name__}", head, fields)
        value = getattr(config, head)
        if "" in inner:
            value = _parse(inner[""], _hints(type(config))[head], value, prefix + head)
        rest = {name: entry for name, entry in inner.items() if name}
        if rest and not dataclasses.is_dataclass(value):
            raise UsageError(f"{prefix}{head} is a plain value and has no setting {next(iter(rest))!r}")
        changes[head] = _override(value, rest, f"{prefix}{head}.") if rest else value
    return dataclasses.replace(config, **changes)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted name: plain value} over all fields; a nested config also gives "name.class"."""
    flat: dict[str, Any] = {}
    for name, value in _items(config):
        flat.update(_flat_value(prefix + name, value))
    return flat


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """{dotted name: (old value, new value)} where two configs differ; None stands for a missing name."""
    a, b = flatten(old), flatten(new)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def to_json(config: Any) -> dict[str, Any]:
    """A JSON-ready dict; every config carries its qualified name under "class"."""
    return _encode(config)


def from_json(data: dict[str, Any]) -> Any:
    """The config that `to_json` wrote.

    Classes resolve only under `lm.` and `experiments.`; raises UsageError for any other, and for an
    unknown field, which names the version difference that it usually is.
    """
    return _decode(data)


def digest(config: Any) -> str:
    """16 hex digits over class names and all identity fields that differ from their defaults.

    Fields made with `setting(..., identity=False)` are left out, so a new field, another mesh or another
    cadence keeps a run's identity.
    """
    text = json.dumps(_identity(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _items(config: Any) -> list[tuple[str, Any]]:
    return [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]


def _flat_value(name: str, value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        return {f"{name}.class": _qualified(type(value)), **flatten(value, f"{name}.")}
    if isinstance(value, tuple) and any(dataclasses.is_dataclass(v) for v in value):
        return {k: v for i, item in enumerate(value) for k, v in _flat_value(f"{name}.{i}", item).items()}
    return {name: value}


def _identity(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = [f for f in dataclasses.fields(value) if f.metadata.get("identity", True)]
        pairs = {f.name: (_identity(getattr(value, f.name)), _identity(_default(f))) for f in fields}
        kept = {name: given for name, (given, default) in pairs.items() if given != default}
        return {"class": _qualified(type(value)), **kept}
    return [_identity(v) for v in value] if isinstance(value, tuple) else value


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {"class": _qualified(type(value)), **{k: _encode(v) for k, v in _items(value)}}
    if isinstance(value, tuple | list):
        return [_encode(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(f"a config cannot hold {value!r}: use numbers, strings, tuples and frozen dataclasses")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if not isinstance(value, dict):
        return value
    fields = dict(value)
    cls = _resolve(fields.pop("class", None))
    known = {f.name for f in dataclasses.fields(cls)}
    for name in fields:
        if name not in known:
            raise UsageError(f"{_qualified(cls)} has no setting {name!r}: the config was written by another version")
    return cls(**{k: _decode(v) for k, v in fields.items()})


def _resolve(name: Any) -> type:
    if not isinstance(name, str) or not _ROOTS.fullmatch(name):
        raise UsageError(f"config class {name!r} is refused: only classes under lm. and experiments. are read")
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        raise UsageError(f"config class {name!r} does not exist in this version") from None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise UsageError(f"config class {name!r} is not a dataclass")
    return cls


def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _parse(text: str, hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(value) and text.isidentifier() and text != "None":
        return _class_choice(text, value, name)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in options and text in ("None", "none", "null"):
        return None
    for option in options:
        try:
            return _parse_as(text, option)
        except (ValueError, SyntaxError, TypeError, KeyError):
            continue
    raise UsageError(f"{name}={text!r} is not of type {_type_name(hint)}")


def _class_choice(text: str, value: Any, name: str) -> Any:
    module = sys.modules[type(value).__module__]
    classes = {k: v for k, v in vars(module).items() if isinstance(v, type) and dataclasses.is_dataclass(v)}
    if text not in classes:
        raise unknown(name, text, classes)
    shared = {f.name for f in dataclasses.fields(classes[text])}
    return classes[text](**{k: v for k, v in _items(value) if k in shared})


def _parse_as(text: str, hint: Any) -> Any:
    if hint is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if hint is int:
        number = float(text) if re.search(r"[.eE]", text) else int(text)
        if number != int(number):
            raise ValueError
        return int(number)
    if hint is float:
        return float(text)
    if hint is str:
        return text
    if typing.get_origin(hint) is tuple:
        if any(dataclasses.is_dataclass(item) for item in typing.get_args(hint)):
            raise ValueError  # Configs in a tuple have no form on a command line: they belong in an experiment.
        literal = ast.literal_eval(text)
        return tuple(literal) if isinstance(literal, tuple | list) else (literal,)
    raise TypeError


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not isinstance(hint, types.UnionType) else str(hint)
