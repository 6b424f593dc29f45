"""What stands beside a step's arrays: the record, with shapes and digests, and the seal, with the sha256 of files."""

import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from lm.core import files
from lm.core.errors import UsageError

SEAL = "files.sha256"
_SEALED_BYTES = 16 << 20  # Larger files hold arrays, which have digests of their own.


class Damaged(Exception):
    """A step's files are not what was saved."""


def make_record(
    step: int, meta: Mapping[str, Any], flat: Mapping[str, Any], digests: Mapping[str, str]
) -> dict[str, Any]:
    """The JSON-ready record of the arrays {path: array}, with `meta` and the versions in it."""
    arrays = {k: {"shape": list(x.shape), "dtype": x.dtype.name, "digest": digests[k]} for k, x in flat.items()}
    record = {"step": step, "meta": {**meta, "versions": versions()}, "arrays": arrays}
    record = json.loads(json.dumps(record, allow_nan=False))
    return record | {"sha256": _sha256(record)}


def read_record(folder: Any, step: int) -> dict[str, Any]:
    """The record of a step in the folder of checkpoints; raises Damaged where it is not what was saved."""
    try:
        record = json.loads((folder / str(step) / "meta" / "metadata").read_bytes())
        expected = record.pop("sha256")
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"its meta cannot be read ({type(error).__name__}: {error})") from None
    if _sha256(record) != expected:
        raise Damaged("its meta does not have the sha256 that was saved")
    if record["step"] != step:
        raise Damaged(f"its meta is that of step {record['step']}")
    return record


def seal(step_folder: Any) -> None:
    """Writes down the sha256 of each file of a finished step (a local folder), so that a bit flipped anywhere shows."""
    files.write_json(step_folder / SEAL, _file_digests(step_folder))


def check_seal(step_folder: Any) -> None:
    """Raises Damaged at the first file that is not as it was sealed; a kill may have left a step unsealed."""
    if not (step_folder / SEAL).exists():
        return
    try:
        sealed = files.read_json(step_folder / SEAL)
        found = _file_digests(step_folder)
        wrong = [name for name in sealed.keys() | found.keys() if sealed.get(name) != found.get(name)]
    except PermissionError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise Damaged(f"its {SEAL} cannot be read ({type(error).__name__}: {error})") from None
    if wrong:
        raise Damaged(f"{min(wrong)} is not as it was saved")


def check_layout(where: str, record: dict[str, Any], wanted: dict[str, Any], prefix: str) -> None:
    """Raises UsageError at the first array under `prefix` that the record and `wanted` do not share alike."""
    saved = record["arrays"]
    for path, x in wanted.items():
        if path not in saved:
            raise UsageError(f"{where} has no array {path}, which this config needs: use the config it was saved with")
        for field, here in (("shape", list(x.shape)), ("dtype", x.dtype.name)):
            there = saved[path][field]
            if there != here:
                raise UsageError(
                    f"{path} has {field} {_shown(there)} in {where}, and this config expects {_shown(here)}: "
                    "use the config it was saved with"
                )
    for path in saved:
        if path.startswith(prefix) and path not in wanted:
            raise UsageError(f"{where} has an array {path} that this config lacks: use the config it was saved with")


def abstract_arrays(record: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and type} of every array, to be read onto this process's first device."""
    arrays = record["arrays"].items()
    return {k: placed(jax.ShapeDtypeStruct(tuple(a["shape"]), a["dtype"])) for k, a in arrays}


def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """`x` with its sharding, or else on this process's first device."""
    if x.sharding is not None:
        return x
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)


def versions() -> dict[str, str]:
    """Of what decides the bits of a run; values survive a change of them, bitwise continuation may not."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "orbax-checkpoint")}


def _file_digests(step_folder: Any) -> dict[str, str]:
    root = pathlib.Path(step_folder)
    found = (f for f in root.rglob("*") if f.is_file() and f.name != SEAL and f.stat().st_size <= _SEALED_BYTES)
    return {f.relative_to(root).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in found}


def _sha256(record: dict[str, Any]) -> str:
    text = json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _shown(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, list) else str(value)
