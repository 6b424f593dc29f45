"""Hugging Face's folders: config.json and tensors, both ways, by the families that declare them."""

import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Container, Iterator
from typing import Any

import jax
import numpy as np

from lm.core import files, tree
from lm.core.errors import UsageError
from lm.core.params import Param
from lm.interop import safetensors
from lm.interop.fields import Fields
from lm.models.electra import Electra
from lm.models.headed import Headed, with_vocabulary

# The first that can express a model does.
FAMILIES = (
    *("gpt2", "llama", "gpt1", "neox", "falcon", "gemma3", "mixtral", "qwen3_moe"),
    *("bert", "modernbert", "xlnet", "reformer", "t5", "bart", "heads"),
)
CONFIG = "config.json"
_BARE = {"BartModel": "BartForConditionalGeneration"}  # What BART's own checkpoints call themselves.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# Buffers that old files hold.
_COMPUTED = r"(\.(attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq|embeddings\.position_ids)$"


Index = int | tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file, and our leaves in it, (path, index of the layer or None), one after another.

    The index of an expert's leaf is (layer, expert).

    Matrices lie in a file as [outputs, inputs], or as [inputs, outputs] with `conv1d`; vectors have one dimension;
    tables are as ours. Several leaves share `groups` of outputs: in each, first the share of the first leaf.
    `shape` is the tensor's in the file where it has more dimensions than these.
    """

    name: str
    leaves: tuple[tuple[str, Index], ...]
    conv1d: bool = False
    groups: int = 1
    shape: tuple[int, ...] | None = None


def subtree_tensors(known: Container[str], ours: str, name: str, index: int | None) -> list[Tensor]:
    """The tensors `name`.weight and `name`.bias of our sub-tree, as far as its leaves are among the `known` paths."""
    kinds = {"table": "weight", "scale": "weight", "kernel": "weight", "bias": "bias"}
    leaves = {f"{ours}/{leaf}": kind for leaf, kind in kinds.items()}
    return [Tensor(f"{name}.{kind}", ((leaf, index),)) for leaf, kind in leaves.items() if leaf in known]


def without_training(model: Any) -> Any:
    """The model with the defaults of all settings that decide none of its numbers."""
    names = ("embed_dropout", "residual_dropout", "attention_dropout", "mlp_dropout", "init", "init_std")
    free = (*names, "dtype", "attention_kernel", "remat", "scan")
    return dataclasses.replace(model, **{f.name: f.default for f in dataclasses.fields(model) if f.name in free})


def is_folder(name: str | os.PathLike) -> bool:
    """Whether this is a folder in Hugging Face's form: a config.json that names a model type, and no run."""
    path = pathlib.Path(name)
    if not (path / CONFIG).is_file() or (path / "checkpoints").exists():
        return False
    try:
        return "model_type" in files.read_json(path / CONFIG)
    except (ValueError, OSError, TypeError):
        return False


def load(folder: str | os.PathLike, mesh: jax.sharding.Mesh | None = None) -> tuple[Any, dict[str, Any]]:
    """(model, params), float32, of a folder with config.json and safetensors; one tensor is widened at a time.

    Raises UsageError for a class or setting that is not supported, and for tensors that are missing, unknown, cut,
    or of another shape than the config says.
    """
    model, architecture, family, reader, names = _open(folder)
    spec = tree.flatten(model.spec())
    # A bias that the file of a model without a head does not have is zero.
    zero = getattr(family, "ZERO", ())
    entries = [e for e in family.tensors(model, architecture) if e.name in names or e.name not in zero]
    unused = getattr(family, "UNUSED", "")
    _check_tensors(folder, entries, spec, {name: reader.shapes[old] for name, old in names.items()}, unused)
    for name, computed in _constants(family, model, architecture).items():
        if name in names and not _agree(np.asarray(reader.read(names[name]), np.float32), computed):
            raise UsageError(
                f"{folder}: tensor {name} is not the table that {architecture} computes, and no other is supported"
            )
    arrays = {path: np.zeros(p.shape, p.dtype) for path, p in spec.items()}
    for entry in entries:
        tensor = np.asarray(reader.read(names[entry.name]), np.float32)
        for (path, index), part in zip(entry.leaves, _split(entry, tensor, spec), strict=True):
            arrays[path][... if index is None else index] = part
    return model, _on_devices(arrays, model, mesh)


def read_model(folder: str | os.PathLike) -> Any:
    """The model of `load`, without its parameters."""
    return _open(folder)[0]


def _open(folder: str | os.PathLike) -> tuple[Any, str, Any, safetensors.Reader, dict[str, str]]:
    """(model, class, its family, reader of the tensors, {name as the family has it: name in the file})."""
    model, architecture, family = _read_config(folder)
    reader = safetensors.Reader(folder)
    names = _file_names(reader, family)
    copies = family.aliases(model, architecture) if hasattr(family, "aliases") else {}
    _drop_copies(folder, copies, reader, names)
    model = _settle_tie(model, architecture, family, reader, names)
    wanted = {entry.name for entry in family.tensors(model, architecture)}
    names |= {alias: names[name] for alias, name in copies.items() if alias in wanted and name in names}
    return model, architecture, family, reader, names


def save(
    folder: str | os.PathLike,
    model: Any,
    params: dict[str, Any],
    architecture: str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> str:
    """The class name of the folder that was made: config.json, for transformers 4.x and 5.x, and float32 safetensors.

    `architecture` asks for a class; else it is the first of the families' that expresses the model exactly. Rows of
    the vocabulary that stand for no token are left out; of an Electra, what the class is not for is too. Raises
    UsageError where no class expresses the model, as where its parametrization multiplies in the forward pass.
    """
    model, params = part(model, params, architecture)
    model, params = _without_padding(_standard(model), params)
    architecture, family, config = express(model, architecture)
    spec = tree.flatten(model.spec())
    shapes = {entry.name: _file_shape(entry, spec) for entry in family.tensors(model, architecture)}
    constants = _constants(family, model, architecture)
    shapes |= {name: array.shape for name, array in constants.items()}
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = itertools.chain(named(model, params, architecture), constants.items())
    safetensors.write(path, tensors, shapes, shard_bytes)
    files.write_json(path / CONFIG, config)
    return architecture


def part(model: Any, params: dict[str, Any], architecture: str | None = None) -> tuple[Any, dict[str, Any]]:
    """(model, params) of what one class holds: of an Electra its discriminator, or for its class the generator."""
    if not isinstance(model, Electra):
        return model, params
    name = "generator" if architecture == "ElectraForMaskedLM" else "discriminator"
    return model.parts[name], model.part_params(params, name)


def named(model: Any, params: dict[str, Any], architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of the class's file, made one at a time, from parameters or from gradients."""
    spec, flat = tree.flatten(model.spec()), tree.flatten(params)
    for entry in architectures()[architecture].tensors(model, architecture):
        yield entry.name, _join(entry, flat, spec)


def architecture_of(folder: str | os.PathLike) -> str:
    """The class of the folder; raises UsageError for one that is not supported."""
    return _read_config(folder)[1]


def architectures() -> dict[str, Any]:
    """{class name: the family that reads and writes it}."""
    families = [importlib.import_module(f"lm.interop.{name}") for name in FAMILIES]
    return {architecture: family for family in families for architecture in family.ARCHITECTURES}


def _read_config(folder: str | os.PathLike) -> tuple[Any, str, Any]:
    path = pathlib.Path(folder) / CONFIG
    try:
        config = files.read_json(path)
        named = config.get("architectures") or []
        named = [named] if isinstance(named, str) else named
    except (ValueError, OSError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read as a config ({type(error).__name__}: {error})") from None
    known = architectures()
    architecture = named[0] if named else next((a for a in known if _type_of(a) == config.get("model_type")), None)
    architecture = _BARE.get(str(architecture), str(architecture))
    if architecture not in known:
        raise UsageError(f"{path} is of class {architecture}, which is not supported: {', '.join(sorted(known))} are")
    fields = Fields(config, str(path))
    try:
        model = known[architecture].read(fields, architecture)
    except UsageError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path} has a setting of which no {architecture} can be made ({what})") from None
    fields.finish()
    return model, architecture, known[architecture]


def _type_of(architecture: str) -> str:
    known = architectures()[architecture]
    return known.ARCHITECTURES[architecture]


def _file_names(reader: safetensors.Reader, family: Any) -> dict[str, str]:
    """{name as the family has it: name in the file}, without the buffers that old files hold."""
    old = {name: name for name in reader.shapes if not re.search(_COMPUTED, name)}
    if family.PREFIX and not any(name.startswith(family.PREFIX) for name in old):
        old = {name if name in family.UNPREFIXED else family.PREFIX + name: o for name, o in old.items()}

    def new(name: str) -> str:
        for before, after in _OLD_NAMES.items():
            name = name.replace(before, after)
        return name

    return {new(name): o for name, o in old.items()}


def _drop_copies(folder: Any, aliases: dict[str, str], reader: safetensors.Reader, names: dict[str, str]) -> None:
    """Takes out of `names` what is only a further name of a tensor, by {alias: name}."""
    for alias, name in aliases.items():
        if alias in names:
            copy = names.pop(alias)
            if not np.array_equal(reader.read(copy), reader.read(names.setdefault(name, copy))):
                raise UsageError(f"{folder}: tensors {copy} and {names[name]} differ, and their class has one for both")


def _settle_tie(model: Any, architecture: str, family: Any, reader: safetensors.Reader, names: dict[str, str]) -> Any:
    """The model as its file has it: tied as its config says, except that a head that differs is its own."""
    if not hasattr(model, "tied") or "tokens" not in getattr(model, "outputs", ("tokens",)):
        return model
    tied, untied = (dataclasses.replace(model, tied=tied) for tied in (True, False))
    heads = [entry.name for entry in family.tensors(untied, architecture) if entry.leaves[0][0] == "head/table"]
    tables = [entry.name for entry in family.tensors(tied, architecture) if entry.leaves[0][0] == "embed/table"]
    if any(name not in names for name in (*heads, *tables)):
        return model
    head, table = (reader.read(names[n]) for n in (*heads, *tables))
    if model.tied and np.array_equal(head, table):
        for name in heads:
            del names[name]
        return tied
    return untied


def _check_tensors(
    folder: Any, entries: list[Tensor], spec: dict[str, Param], shapes: dict[str, Any], unused: str
) -> None:
    wanted = {entry.name: _file_shape(entry, spec) for entry in entries}
    missing = sorted(wanted.keys() - shapes.keys())
    unknown = sorted(name for name in shapes.keys() - wanted.keys() if not re.fullmatch(unused, name))
    if missing:
        raise UsageError(f"{folder} lacks the tensor {missing[0]}, which its config asks for ({len(missing)} missing)")
    if unknown:
        raise UsageError(f"{folder} has a tensor {unknown[0]} that its config does not ask for ({len(unknown)} such)")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise UsageError(f"{folder}: tensor {name} has shape {shapes[name]}, and the config says {shape}")


def _constants(family: Any, model: Any, architecture: str) -> dict[str, np.ndarray]:
    """{name: array} of what the class's file holds and no training changes."""
    return family.constants(model, architecture) if hasattr(family, "constants") else {}


def _agree(found: np.ndarray, computed: np.ndarray) -> bool:
    """Up to float32's rounding of the angles, on the rows that both have."""
    rows = min(len(found), len(computed))
    return found.shape[1:] == computed.shape[1:] and np.allclose(found[:rows], computed[:rows], atol=1e-3)


def _on_devices(arrays: dict[str, np.ndarray], model: Any, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    from lm.parallel import rules

    places = {} if mesh is None else tree.flatten(rules.shardings(model.spec(), mesh))
    # Each array is given up as soon as the device has it.
    return tree.unflatten({path: jax.device_put(arrays.pop(path), places.get(path)) for path in list(arrays)})


def _standard(model: Any) -> Any:
    """The model without its parametrization, where that decides how it trains alone."""
    if isinstance(model, Headed):
        return dataclasses.replace(model, base=_standard(model.base))
    if getattr(model, "parametrization", "sp") == "sp":
        return model
    if model.ratios.changes_forward:
        raise UsageError(
            f"parametrization={model.parametrization!r} at width={model.width} and layers={model.layers} multiplies in "
            "the forward pass, and no class of Hugging Face's does"
        )
    return dataclasses.replace(
        model, parametrization="sp", base_width=None, base_layers=None, base_head_dim=None, decay_keeps="product"
    )


def _without_padding(model: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    valid = model.valid_vocab_size
    if valid is None or valid == model.vocab_size:
        return with_vocabulary(model, model.vocab_size, None), params
    flat = tree.flatten(params)
    for path, p in tree.flatten(model.spec()).items():
        if "vocab" in p.axes:
            flat[path] = np.take(np.asarray(flat[path]), range(valid), p.axes.index("vocab"))
    return with_vocabulary(model, valid, None), tree.unflatten(flat)


def express(model: Any, wanted: str | None) -> tuple[str, Any, dict[str, Any]]:
    """The class, its family and its config.json."""
    known = architectures()
    if wanted is not None and wanted not in known:
        raise UsageError(f"architecture {wanted!r} is not supported: {', '.join(sorted(known))} are")
    for architecture, family in known.items():
        if wanted not in (None, architecture) or not isinstance(model, family.MODEL):
            continue
        try:
            own = family.write(model, architecture)
            head = {"architectures": [architecture], "model_type": family.ARCHITECTURES[architecture]}
            config = own | head | {"dtype": "float32", "torch_dtype": "float32"}
            again = family.read(Fields(json.loads(json.dumps(config)), "the config"), architecture)
        except UsageError:
            continue
        if family.numbers(again) == family.numbers(model):
            return architecture, family, config
    tried = wanted or ", ".join(sorted(a for a, family in known.items() if isinstance(model, family.MODEL))) or "none"
    raise UsageError(f"no class of Hugging Face's ({tried} looked at) computes what this model computes: {model}")


def _file_shape(entry: Tensor, spec: dict[str, Param]) -> tuple[int, ...]:
    parts = [_shape2(spec[path], index) for path, index in entry.leaves]
    shape = (sum(part[0] for part in parts), *parts[0][1:])
    return entry.shape or (shape[::-1] if entry.conv1d else shape)


def _shape2(p: Param, index: Index) -> tuple[int, ...]:
    """The leaf's shape in a file: [outputs, inputs] of a matrix, [outputs] of a vector, a table's own."""
    shape = _own_shape(p, index)
    if p.role in ("embedding", "head"):
        return shape
    inputs = p.fan_in if p.inputs else 1
    outputs = int(np.prod(shape)) // inputs
    return (outputs, inputs) if p.inputs else (outputs,)


def _own_shape(p: Param, index: Index) -> tuple[int, ...]:
    """Of the leaf's part that one tensor of the file holds."""
    indexed = len(index) if isinstance(index, tuple) else int(index is not None)
    return p.shape[indexed:]


def _split(entry: Tensor, tensor: np.ndarray, spec: dict[str, Param]) -> Iterator[np.ndarray]:
    if entry.shape is not None:
        tensor = tensor.reshape(_file_shape(dataclasses.replace(entry, shape=None), spec))
    tensor = tensor.T if entry.conv1d and tensor.ndim == 2 else tensor
    grouped = tensor.reshape(entry.groups, -1, *tensor.shape[1:])
    first = 0
    for path, index in entry.leaves:
        p = spec[path]
        shape2 = _shape2(p, index)
        rows = shape2[0] // entry.groups
        part = grouped[:, first : first + rows].reshape(shape2)
        first += rows
        yield (part.T if p.role in ("matrix", "router") else part).reshape(_own_shape(p, index))


def _join(entry: Tensor, flat: dict[str, Any], spec: dict[str, Param]) -> np.ndarray:
    parts = []
    for path, index in entry.leaves:
        p, leaf = spec[path], flat[path] if index is None else flat[path][index]
        shape2 = _shape2(p, index)
        part = np.asarray(leaf, np.float32)
        part = part.reshape(shape2[::-1]).T if p.role in ("matrix", "router") else part.reshape(shape2)
        parts.append(part.reshape(entry.groups, -1, *shape2[1:]))
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, 1)
    tensor = joined.reshape(-1, *joined.shape[2:])
    tensor = tensor.T if entry.conv1d and tensor.ndim == 2 else tensor
    return tensor if entry.shape is None else tensor.reshape(entry.shape)
