"""lm convert --checkpoint=CKPT --out=DIR

A Hugging Face folder becomes a run folder with one step, which lm generate, lm evaluate and --init_from take; a run
folder or a step of one becomes a Hugging Face folder. The class that a run was converted from is written again.
"""

import os
import pathlib
from typing import Any

from absl import flags

from lm.core.errors import UsageError
from lm.main.flags import required, value

_FROM = "converted from "  # What a run folder's config says in place of an experiment.


def define(values: flags.FlagValues) -> None:
    """Registers the verb's flags."""
    flags.DEFINE_string("checkpoint", None, "a Hugging Face folder, a run folder, or a step", flag_values=values)
    flags.DEFINE_string("out", None, "the folder to make", flag_values=values)
    flags.DEFINE_string("architecture", None, "the class to write; unset takes the one that fits", flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Converts; returns the exit code."""
    checkpoint, out = required(values, "checkpoint"), required(values, "out")
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UsageError(f"--out={out} is there already: name a new folder")
    from lm.interop import hf

    if hf.is_folder(checkpoint):
        if value(values, "architecture"):
            raise UsageError("--architecture is for the way to Hugging Face: leave it out")
        _to_run(checkpoint, out)
    else:
        _to_hugging_face(checkpoint, out, value(values, "architecture"))
    return 0


def _to_run(checkpoint: str, out: str) -> None:
    import jax.numpy as jnp

    from lm.core import config, params
    from lm.data import huggingface, tokenizers
    from lm.interop import hf
    from lm.interop.load import untrained
    from lm.train import folder
    from lm.train.checkpoint import Checkpoints
    from lm.train.step import State

    model, weights = hf.load(checkpoint)
    has_tokenizer = huggingface.found(pathlib.Path(checkpoint)) is not None
    tokenizer = tokenizers.load(checkpoint) if has_tokenizer else None
    run = untrained(model, tokenizer)
    slots = run.optimizer.build(model.spec()).init(weights)
    zero = jnp.zeros((), jnp.uint32)
    state = State(step=zero, examples=zero, skipped=zero, params=weights, optimizer=slots)
    meta = {"run": config.to_json(run), "corpus": "", "tokenizer": tokenizer.digest if tokenizer else ""}
    Checkpoints(out).save(0, state, meta, wait=True)
    folder.write_config(out, run, _FROM + hf.architecture_of(checkpoint))
    if tokenizer is None:
        print(f"{checkpoint} has no tokenizer that is known here: text needs one, arrays of ids do not")
    else:
        folder.keep_tokenizer(out, tokenizer)
    print(f"{out}: {params.count(model.spec()):,} parameters, step 0")


def _to_hugging_face(checkpoint: str, out: str, architecture: str | None) -> None:
    from lm.core import files, params
    from lm.interop import hf
    from lm.interop.load import load, load_run, load_tokenizer
    from lm.train import checkpoint as checkpoints
    from lm.train import folder

    model, weights = load(checkpoint)
    run_folder, _ = checkpoints.locate(checkpoint)
    name = pathlib.Path(run_folder) / folder.CONFIG
    experiment: Any = files.read_json(name).get("experiment") if name.exists() else None
    if architecture is None and str(experiment).startswith(_FROM):
        architecture = experiment.removeprefix(_FROM)
    model, weights = hf.part(model, weights, architecture)
    architecture = hf.save(out, model, weights, architecture)
    if any((files.path(run_folder) / f).exists() for f in folder.TOKENIZERS):
        _write_tokenizer(out, load_tokenizer(checkpoint), load_run(checkpoint).objective)
    print(f"{out}: {architecture}, {params.count(model.spec()):,} parameters")


def _write_tokenizer(out: str, tokenizer: Any, objective: Any) -> None:
    """tokenizer.json, with the objective's own special ids after ours; prints what keeps it from being written."""
    from lm.core import files
    from lm.data import export
    from lm.data.pretrained import Pretrained

    named = zip(objective.extra_ids, objective.ids, strict=True) if getattr(objective, "ids", None) else ()
    extra = [name for name, i in named if i >= tokenizer.vocab_size]
    try:
        content = export.tokenizer_json(tokenizer, extra)
    except UsageError as error:
        print(f"the {tokenizer.kind} tokenizer stays in the run: {error}")
        return
    files.write_bytes(files.path(out) / Pretrained.file_name, content)
    if not isinstance(tokenizer, Pretrained):
        files.write_json(files.path(out) / "tokenizer_config.json", export.tokenizer_config(tokenizer, extra))


if __name__ == "__main__":
    from lm.main import verbs

    verbs.run("convert")
