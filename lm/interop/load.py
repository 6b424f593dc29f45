"""Models and tokenizers from checkpoints."""

import os
from typing import Any

import jax

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.data import tokenizers
from lm.parallel import rules
from lm.train import checkpoint, folder
from lm.train.checkpoint import Checkpoints


def load(name: str | os.PathLike, mesh: jax.sharding.Mesh | None = None) -> tuple[Any, dict[str, Any]]:
    """(model, params) of a run folder's newest verified step, or of one step's folder.

    Parameters are float32, laid out for `mesh` or else on the default device: the average of the weights where
    the run keeps one. Raises UsageError where `name` is neither, or where no step verifies.
    """
    run_folder, step = checkpoint.locate(name)
    run = load_run(name)
    part = "ema" if run.train.ema_decay is not None else "params"
    spec = run.model.spec()
    abstract = specs.abstract(spec)
    if mesh is not None:
        places = rules.shardings(spec, mesh)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
    return run.model, Checkpoints(run_folder).restore_params(abstract, step, part)[0]


def load_params(name: str | os.PathLike, abstract: dict[str, Any]) -> dict[str, jax.Array]:
    """The parameters of a checkpoint placed like `abstract`, a tree of ShapeDtypeStruct with shardings.

    Raises UsageError where a leaf is missing or has another shape.
    """
    run_folder, step = checkpoint.locate(name)
    return Checkpoints(run_folder).restore_params(abstract, step)[0]


def load_run(name: str | os.PathLike) -> Any:
    """The resolved Run that a checkpoint's folder keeps; raises UsageError where it keeps none."""
    run_folder, _ = checkpoint.locate(name)
    run = folder.read_config(run_folder)
    if run is None:
        raise UsageError(f"{run_folder} has checkpoints and no {folder.CONFIG}: restore it from a copy")
    return run


def load_tokenizer(name: str | os.PathLike) -> tokenizers.Tokenizer:
    """The tokenizer that a checkpoint's run folder keeps."""
    run_folder, _ = checkpoint.locate(name)
    return tokenizers.load(folder.tokenizer_file(run_folder))
