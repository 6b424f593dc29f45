"""Models and tokenizers from checkpoints."""

import os
import pathlib
from typing import Any

import jax

from lm.core import config, tree
from lm.core import params as specs
from lm.core.errors import UsageError
from lm.data import huggingface, tokenizers
from lm.interop import hf
from lm.models.decoder import Decoder
from lm.models.encdec import EncDec
from lm.models.encoder import Encoder
from lm.models.reformer import Reformer
from lm.models.xlnet import XLNet
from lm.objectives.causal import Causal
from lm.objectives.denoise import Denoise
from lm.objectives.mlm import MaskedLM
from lm.objectives.permutation import Permutation
from lm.objectives.span import SpanCorruption
from lm.parallel import rules
from lm.train import checkpoint, counted, folder
from lm.train import run as run_module
from lm.train.checkpoint import Checkpoints
from lm.train.optimizers import SGD
from lm.train.run import Run, Train


def load(name: str | os.PathLike, mesh: jax.sharding.Mesh | None = None) -> tuple[Any, dict[str, Any]]:
    """(model, params) of a run folder's newest verified step, of one step's folder, or of a Hugging Face folder.

    Parameters are float32, laid out for `mesh` or else on the default device: the average of the weights where
    the run keeps one. Those of a counted model are its tables, mapped from their files. Raises UsageError where `name`
    is none of them, or where no step verifies.
    """
    if hf.is_folder(name):
        return hf.load(name, mesh)
    run_folder, step = checkpoint.locate(name)
    run = load_run(name)
    if counted.is_counted(run.model):
        return run.model, counted.open_tables(run_folder, run.model)
    spec = run.model.spec()
    abstract = specs.abstract(spec)
    if mesh is not None:
        places = rules.shardings(spec, mesh)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
    return run.model, Checkpoints(run_folder).restore_params(abstract, step, _part(run))[0]


def load_params(name: str | os.PathLike, abstract: dict[str, Any]) -> dict[str, jax.Array]:
    """What `load` takes of a checkpoint, placed like `abstract`, a tree of ShapeDtypeStruct with shardings.

    Raises UsageError where a leaf is missing or has another shape.
    """
    if hf.is_folder(name):
        return _placed(hf.load(name)[1], abstract, name)
    run_folder, step = checkpoint.locate(name)
    run = load_run(name)
    if counted.is_counted(run.model):
        raise UsageError(f"{os.fspath(name)} holds counts, and no weights to start from")
    return Checkpoints(run_folder).restore_params(abstract, step, _part(run))[0]


def _placed(weights: dict[str, Any], abstract: dict[str, Any], name: str | os.PathLike) -> dict[str, jax.Array]:
    found, wanted = tree.flatten(weights), tree.flatten(abstract)
    for path in sorted(found.keys() | wanted.keys()):
        has, wants = (leaves[path].shape if path in leaves else None for leaves in (found, wanted))
        if has != wants:
            raise UsageError(
                f"{os.fspath(name)} has {path} of shape {has}, and the run's model of {wants}: "
                "set the model's sizes to those of the checkpoint, model.vocab_size among them"
            )
    return tree.unflatten({path: jax.device_put(x, wanted[path].sharding) for path, x in found.items()})


def _part(run: Any) -> str:
    return "params" if run.train.ema_decay is None else "ema"


def load_run(name: str | os.PathLike) -> Any:
    """The resolved Run that a checkpoint was saved with; of a Hugging Face folder, one that has yet to be trained."""
    if hf.is_folder(name):
        has_tokenizer = huggingface.found(pathlib.Path(name)) is not None
        return untrained(hf.read_model(name), load_tokenizer(name) if has_tokenizer else None)
    return config.from_json(read_meta(name)["run"])


def untrained(model: Any, tokenizer: tokenizers.Tokenizer | None) -> Run:
    """A Run around a model that came from elsewhere, with the objective that its kind of model is trained by.

    The objective is None where the model scores no tokens, or lacks ids that it would need.
    """
    objective = _objective(model)
    if objective is not None and tokenizer is not None:
        objective = run_module.with_ids(objective, tokenizer)
        if run_module.ids_in_all(objective, tokenizer) > model.vocab_size:
            objective = None
    length = min(model.context_limit or Train.seq_len, Train.seq_len)
    return Run(model, objective, optimizer=SGD(), train=Train(seq_len=length))


def _objective(model: Any) -> Any:
    match model:
        case Decoder():
            return Causal()
        case Reformer():
            return Causal() if model.causal else MaskedLM()
        case XLNet():
            return Permutation()
        case Encoder() if "tokens" in model.outputs:
            return MaskedLM()
        case EncDec() if model.buckets is not None:
            return SpanCorruption()
        case EncDec() if model.positions == "learned":
            return Denoise()
    return None


def read_tokenizer_digest(name: str | os.PathLike) -> str:
    """The sha256 of the tokenizer that a checkpoint's ids come from; of a Hugging Face folder that of its file."""
    return load_tokenizer(name).digest if hf.is_folder(name) else read_meta(name)["tokenizer"]


def read_meta(name: str | os.PathLike) -> dict[str, Any]:
    """What was saved beside the arrays: "run", "corpus" and "tokenizer" digests, "versions", and "val_losses" where a
    rate may follow them.

    Of a run folder it is that of the newest step whose record is whole.
    """
    run_folder, step = checkpoint.locate(name)
    steps = [step] if step is not None else Checkpoints(run_folder).steps()
    if not steps:
        raise UsageError(f"there is no checkpoint in {os.fspath(name)}")
    for candidate in reversed(steps[1:]):
        try:
            return checkpoint.read_meta(run_folder, candidate)
        except UsageError:
            continue  # Reading its arrays will say what is wrong with it.
    return checkpoint.read_meta(run_folder, steps[0])


def load_tokenizer(name: str | os.PathLike) -> tokenizers.Tokenizer:
    """The tokenizer of a checkpoint; raises UsageError where its file is not the one that the run was trained with."""
    if hf.is_folder(name):
        return tokenizers.load(name)
    run_folder, _ = checkpoint.locate(name)
    file = folder.tokenizer_file(run_folder)
    tokenizer = tokenizers.load(file)
    if tokenizer.digest != read_meta(name)["tokenizer"]:
        raise UsageError(f"{file} is not the tokenizer that the run was trained with: restore it from the corpus")
    return tokenizer
