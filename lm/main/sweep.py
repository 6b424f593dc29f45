"""Trains every run of an experiment that returns a list of them; the same command runs what is missing.

lm sweep --experiment=ablate_positions --workdir=runs/abl
lm sweep --experiment=scaling_markov --workdir=runs/lad --parallel=2
lm sweep --experiment=scaling_markov --workdir=runs/lad --launcher=slurm    (or commands: one a line; none: their plan)

Each run has a folder of its own under --workdir, by its name, with a row.json when it has ended. A run that is done is
known by the digest of its settings and not trained again; one that was cut off goes on from its last checkpoint.
"""

import dataclasses
import fnmatch
import os
import pathlib
import sys
from typing import Any

from absl import flags

from lm.core.errors import UsageError, unknown
from lm.main.flags import define_experiment, load_experiment, override, required, value

LAUNCHERS = ("local", "commands", "slurm", "none")


def define(values: flags.FlagValues) -> None:
    """Registers the flags of `lm sweep`."""
    define_experiment(values)
    flags.DEFINE_string("workdir", None, "the folder of the sweep, one folder a run in it", flag_values=values)
    flags.DEFINE_string("corpus", None, "a corpus folder for all runs, made by `lm corpus`", flag_values=values)
    flags.DEFINE_integer("parallel", 1, "runs at once on this host", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("retries", 1, "further tries of a run that fails", lower_bound=0, flag_values=values)
    flags.DEFINE_multi_string("only", [], "names of runs, or patterns such as rotary/*", flag_values=values)
    flags.DEFINE_enum("launcher", "local", LAUNCHERS, "who starts the runs; none prints their plan", flag_values=values)
    flags.DEFINE_string("worker", None, "I/N: used by `lm sweep` itself", flag_values=values)


def _check_launcher(values: flags.FlagValues) -> None:
    launcher = value(values, "launcher")
    idle = [] if launcher == "local" else ["parallel", "retries"] + ["only"] * (launcher == "none")
    for name in idle:
        if values[name].present:
            raise UsageError(f"--{name} has no effect with --launcher={launcher}: leave it out")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """An experiment's runs, with the vocabulary and the corpus of each filled in, by name."""

    experiment: str
    workdir: str
    runs: dict[str, Any]
    function: Any  # Of the experiment: `measure` and `verdict` lie beside it.

    def folder(self, name: str) -> str:
        return os.path.join(self.workdir, *name.split("/"))

    def beside(self, name: str) -> Any:
        """A function of the experiment's module; None where it has none."""
        return self.function.__globals__.get(name)


def main(values: flags.FlagValues) -> int:
    """Runs what is missing, prints the table of all; returns the exit code."""
    experiment, workdir = required(values, "experiment"), required(values, "workdir")
    _check_launcher(values)
    from lm.core import files
    from lm.main import workers

    if not files.is_local(workdir):
        raise UsageError(f"--workdir={workdir}: a sweep needs a file system, local or shared, for its workers' files")
    answers = workers.take_stdout() if value(values, "worker") else None
    sweep = load(experiment, workdir, value(values, "set"), value(values, "corpus"))
    if answers is not None:
        return workers.work(sweep, answers)
    if value(values, "launcher") == "none":
        return _print_plan(sweep)
    names = _chosen(list(sweep.runs), value(values, "only"))
    ended = [name for name in sweep.runs if _ended(sweep, name)]
    missing = [name for name in names if name not in ended]
    if value(values, "launcher") != "local":
        return _launch(values, sweep, missing)
    settings = [f"--{name}={item}" for name in ("corpus", "set") for item in _listed(value(values, name))]
    code = workers.run(sweep, missing, ended, settings, value(values, "parallel"), value(values, "retries"))
    if code or not all(_ended(sweep, name) for name in sweep.runs):
        return code
    return _conclude(sweep)


def load(experiment: str, workdir: str, assignments: list[str], corpus: str | None) -> Sweep:
    """The sweep with every run checked; builds the corpora that its runs bring.

    Raises UsageError for runs without names or with equal ones, and where the folder holds a run of other settings.
    """
    function = load_experiment(experiment)
    runs = function()

    from lm.core import config, files
    from lm.main import corpora
    from lm.main.train import with_corpus
    from lm.report import row
    from lm.report.arms import ORDER
    from lm.train import folder
    from lm.train.run import Run, resolve

    if not isinstance(runs, list) or not runs or not all(isinstance(run, Run) for run in runs):
        raise UsageError(f"--experiment={experiment} returns no list of Runs: is it one run, for lm train?")
    _check_names(runs)
    sweep = Sweep(experiment, workdir, {}, function)
    opened: dict[str, Any] = {}
    for run in runs:
        run = with_corpus(override(run, assignments, experiment), corpus)
        corpora.check_named(run)
        built = corpora.of_sweep(run, workdir, opened)
        run = dataclasses.replace(resolve(run, built.tokenizer()), data=_at(run.data, built))
        kept = folder.read_config(sweep.folder(run.name))
        if kept is not None and config.digest(kept) != config.digest(run):
            changed = config.diff(kept, run)
            shown = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in changed.items())
            raise _taken(sweep.folder(run.name), f"settings ({shown})")
        ended = row.read(sweep.folder(run.name))
        if ended is not None and ended["corpus"] != corpora.fingerprint(run, built):
            raise _taken(sweep.folder(run.name), f"text, a corpus of digest {ended['corpus'][:12]}")
        sweep.runs[run.name] = run
    order = {"experiment": experiment, "runs": list(sweep.runs)}
    files.path(workdir).mkdir(parents=True, exist_ok=True)
    files.write_json(files.path(workdir) / ORDER, order)
    return sweep


def _taken(folder: str, what: str) -> UsageError:
    return UsageError(f"{folder} holds a run of other {what}: take another --workdir, or move the folder away")


def _at(data: Any, corpus: Any) -> Any:
    return data if data.mixture else dataclasses.replace(data, corpus=os.fspath(corpus.folder))


def _check_names(runs: list[Any]) -> None:
    for i, run in enumerate(runs):
        parts = pathlib.PurePosixPath(run.name).parts
        if not parts or run.name.startswith("/") or ".." in parts:
            raise UsageError(f"run {i} of the sweep has name={run.name!r}: give it one, such as 'rotary/seed0'")
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two runs of the sweep have name={twice!r}: names are their folders, and must differ")


def _chosen(names: list[str], patterns: list[str]) -> list[str]:
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise unknown("run of this sweep", pattern, names)
    return [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def _ended(sweep: Sweep, name: str) -> bool:
    from lm.report import row

    found = row.read(sweep.folder(name))
    if found is None:
        return False
    # What the experiment measures on the finished run belongs to its row.
    return found["status"] == "diverged" or "measured" in found or sweep.beside("measure") is None


def _print_plan(sweep: Sweep) -> int:
    from rich.console import Console
    from rich.table import Table

    from lm.report import ladder

    rows = ladder.plan(sweep.runs.values())
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for v in (row.get(c, "") for c in columns)))
    Console(width=max(100, 16 * len(columns))).print(table)
    return 0


def _launch(values: flags.FlagValues, sweep: Sweep, missing: list[str]) -> int:
    """Prints a command a run, or writes a Slurm array of them."""
    import shlex

    command = [sys.executable, "-m", "lm.main", "sweep", f"--experiment={sweep.experiment}"]
    command += [f"--workdir={sweep.workdir}"]
    command += [f"--{name}={item}" for name in ("corpus", "set") for item in _listed(value(values, name))]
    lines = [shlex.join([*command, f"--only={name}"]) for name in missing]
    if not lines:
        print(f"nothing is missing: {sweep.workdir}")
        return 0
    if value(values, "launcher") == "commands":
        print("\n".join(lines))
        return 0
    script = pathlib.Path(sweep.workdir) / "sweep.sbatch"
    cases = "\n".join(f"  {i}) exec {line} ;;" for i, line in enumerate(lines))
    script.write_text(
        f"#!/bin/bash\n#SBATCH --job-name=lm-sweep\n#SBATCH --array=0-{len(lines) - 1}\n#SBATCH --requeue\n"
        f"#SBATCH --output={sweep.workdir}/slurm-%A_%a.txt\n"
        f"case $SLURM_ARRAY_TASK_ID in\n{cases}\nesac\n"
    )
    print(f"{len(lines)} runs: sbatch {script}; then the same lm sweep without --launcher, for the verdict")
    return 0


def _listed(given: Any) -> list[str]:
    return given if isinstance(given, list) else [given] if given else []


def _conclude(sweep: Sweep) -> int:
    """The experiment's own verdict over its rows, where it has one."""
    from lm.report import row

    verdict = sweep.beside("verdict")
    if verdict is None:
        print(f"next:\n  lm report --workdir={sweep.workdir}")
        return 0
    rows = [row.read(sweep.folder(name)) for name in sweep.runs]
    text, passed = verdict(rows, pathlib.Path(sweep.workdir))
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    from lm.main.verbs import run as run_verb

    run_verb("sweep")
