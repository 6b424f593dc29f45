"""Compiles a run's step for hardware that is not there, and says whether it fits, how fast it should go, and why.

lm plan --experiment=llama_8b --hardware=v5p:4x4x4
lm plan --experiment=llama_8b --hardware=h100:8 --search
lm plan --experiment=gpt2_124m --hardware=h200:1 --set=train.batch_size=64 --price=3.5
lm plan --experiment=llama_70b --hardware=h100:8 --decode=64:8192

Hardware is KIND:SHAPE: v4, v5p and tpu7x with three sides, v5e and v6e with two, two slices v6e:16x16*2; h100:8 and
h200:64 in hosts of 8; cpu:8 for forced host devices, which have memory and collectives but no speed. --decode plans a
step of generation with a cache, the weights in the compute type, instead of one of training. Exit code 1: it does not
fit.

A plan for cpu:N compiles the very program that lm train runs on N host devices: with JAX_COMPILATION_CACHE_DIR=DIR in
the environment of both, and the same --corpus, training takes it from there (JAX keeps what took a second or more).
"""

import dataclasses
import os
from typing import Any

from absl import flags

from lm.core.errors import UsageError
from lm.main.flags import define_experiment, load_run, required, value


def define(values: flags.FlagValues) -> None:
    """Registers the flags of `lm plan`."""
    define_experiment(values)
    flags.DEFINE_string("hardware", None, "KIND:SHAPE, such as v5p:8x8x8 or h100:8", flag_values=values)
    flags.DEFINE_string("corpus", None, "the corpus whose tokenizer sets the vocabulary", flag_values=values)
    flags.DEFINE_string("out", None, "a folder for plan.json and plan.png", flag_values=values)
    flags.DEFINE_bool("search", False, "try meshes, rematerialisation and micro-batches", flag_values=values)
    flags.DEFINE_string("decode", None, "ROWS[:CONTEXT], plan one token for so many rows", flag_values=values)
    flags.DEFINE_float("price", None, "of a chip-hour, in any currency", 0, flag_values=values)
    flags.DEFINE_float("tokens", None, "to train on; unset, those of the run", 1, flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Prints the plan; returns 0 where the run fits, else 1."""
    experiment, name = required(values, "experiment"), required(values, "hardware")
    os.environ["JAX_PLATFORMS"] = "cpu"  # Nothing runs here, whatever this machine has.
    run = load_run(experiment, value(values, "set"))

    from lm.plan import decode, hardware, report
    from lm.train.counted import is_counted

    if is_counted(run.model):
        raise UsageError(
            f"--experiment={experiment} counts and takes no step that could be planned: lm train counts it"
        )
    wanted = hardware.parse(name)
    search, tokens, decoding = (value(values, flag) for flag in ("search", "tokens", "decode"))
    if search and wanted.chip is None:
        raise UsageError(f"--search ranks by speed, and {name} has none: name a chip")
    if decoding and (search or tokens):
        raise UsageError("--search and --tokens are for training: leave them out with --decode")
    rows = decode.parse(decoding, run) if decoding else ()
    run = with_vocabulary(run, value(values, "corpus"))
    run = dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, slices=wanted.slices))
    devices, price = hardware.describe(wanted), value(values, "price")
    if rows:
        step = decode.make(run, wanted, devices, *rows)
        plan, text, numbers = step.plan, decode.text(step, experiment, price), decode.to_json(step, experiment, price)
    else:
        plan = report.make(run, wanted, devices, search, tokens)
        text, numbers = report.text(plan, experiment, price), report.to_json(plan, experiment, price)
    print(text)
    if out := value(values, "out"):
        report.write(out, numbers, report.draw(plan, experiment))
        print(f"{os.path.join(out, 'plan.json')}, plan.png")
    return 0 if plan.fits else 1


def with_vocabulary(run: Any, corpus: str | None) -> Any:
    """The run with the vocabulary of the corpus, of its own model, or of the tokenizer that it would build."""
    from lm.plan.program import sized

    if corpus:
        from lm.data.corpus import Corpus

        return sized(run, Corpus(corpus).tokenizer().vocab_size)
    if run.model.vocab_size is not None:
        return run
    kind, _, size = run.data.tokenizer.partition(":")
    if kind == "byte":
        size = "256"
    if not size.isdigit():
        raise UsageError(
            f"data.tokenizer={run.data.tokenizer!r} does not say how many ids there are: give --corpus=DIR, or "
            "--set=model.vocab_size=50304"
        )
    return sized(run, int(size))


if __name__ == "__main__":
    from lm.main.verbs import run as run_verb

    run_verb("plan")
