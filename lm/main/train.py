"""Trains an experiment in a run folder; the same command continues it, and says so when it is done.

lm train --experiment=quickstart --workdir=runs/quickstart
lm train --experiment=shakespeare_char --corpus=runs/shk --workdir=runs/shk_run --set=train.steps=500
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from lm.core.errors import UsageError
from lm.main.flags import define_experiment, load_run, required, value

FRUITLESS = 3  # Starts of one launch from the same step, after which another would end like them.


def define(values: flags.FlagValues) -> None:
    """Registers the flags of `lm train`."""
    define_experiment(values)
    flags.DEFINE_string("workdir", None, "the run folder, made where it does not exist", flag_values=values)
    flags.DEFINE_string("corpus", None, "a corpus folder, made by `lm corpus`", flag_values=values)
    flags.DEFINE_string(
        "init_from",
        None,
        "a checkpoint whose weights a new run starts from: a run folder, a step, or a Hugging Face folder",
        flag_values=values,
    )
    flags.DEFINE_string(
        "profile", None, "FIRST:LAST, steps of a profiler trace into the run folder", flag_values=values
    )
    flags.DEFINE_boolean("steal", False, "take the run folder from a live process that holds it", flag_values=values)
    flags.DEFINE_boolean(
        "allow_changed_data", False, "continue on another corpus than the run began with", flag_values=values
    )


def main(values: flags.FlagValues) -> int:
    """Trains; returns the exit code."""
    experiment, workdir = required(values, "experiment"), required(values, "workdir")
    run = with_corpus(load_run(experiment, value(values, "set")), value(values, "corpus"))
    options = Options(
        init_from=value(values, "init_from"),
        profile=_profile(value(values, "profile"), run.train.steps),
        steal=value(values, "steal"),
        allow_changed_data=value(values, "allow_changed_data"),
    )

    from lm.main import corpora, devices
    from lm.train.counted import is_counted
    from lm.train.run import resolve

    corpora.check_named(run)
    if not is_counted(run.model):  # Which is a matter of one process, and of no device.
        corpus = corpora.named(run)
        model = resolve(run, corpus.tokenizer()).model if corpus else run.model
        devices.start(run.train.batch_size, parameters(model), run.train.seq_len)
    return train(run, experiment, workdir, options, _began(workdir))


def with_corpus(run: Any, corpus: str | None) -> Any:
    """The run on the corpus folder, where one is given."""
    return dataclasses.replace(run, data=dataclasses.replace(run.data, corpus=corpus)) if corpus else run


@dataclasses.dataclass(frozen=True)
class Options:
    """What a start of a run may ask for, beyond the run itself."""

    init_from: str | None = None
    profile: tuple[int, int] | None = None
    steal: bool = False
    allow_changed_data: bool = False


def train(
    run: Any, experiment: str, workdir: str, options: Options = Options(), process_began: float | None = None
) -> int:
    """Trains `run`, named `experiment`, in its folder, on devices that have been started; returns the exit code.

    Its time counts from `process_began` on, as lm.train.times.process_start has it; unset, from now on.
    """
    from lm.core import files
    from lm.main import corpora
    from lm.parallel import hosts
    from lm.train.counted import is_counted
    from lm.train.ledger import Ledger
    from lm.train.lock import RunLock
    from lm.train.times import Times, last_sign

    if run.mesh.preset != "auto" and not is_counted(run.model):  # Refused before a corpus is built.
        hosts.host_rows(run.mesh.build(), run.train.batch_size)
    ledger = Ledger(workdir, writes=hosts.is_main())
    report = _reporter(ledger)
    lock = RunLock(workdir, steal=options.steal, report=report)
    seen = last_sign(workdir) if hosts.is_main() else None
    with Times(ledger, process_began) as times, contextlib.ExitStack() as stack:
        if hosts.is_main():
            files.path(workdir).mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock)
        corpus = corpora.of_run(run, workdir)
        return _train(run, experiment, workdir, options, corpus, ledger, report, lock, times, seen)


def _train(
    run: Any,
    experiment: str,
    workdir: str,
    options: Options,
    corpus: Any,
    ledger: Any,
    report: Callable[..., None],
    lock: Any,
    times: Any,
    seen: str | None,
) -> int:
    import jax

    from lm.core import config
    from lm.main import closing, corpora, counted
    from lm.parallel import hosts
    from lm.parallel.mesh import under
    from lm.plan import search
    from lm.report import row
    from lm.train import loop
    from lm.train.checkpoint import Checkpoints, SaveError
    from lm.train.counted import is_counted
    from lm.train.metrics import Metrics
    from lm.train.progress import Display
    from lm.train.run import resolve
    from lm.train.schedules import Plateau

    launch = os.environ.get("LM_LAUNCH")  # Of a launcher: the same for all starts that it makes of its own accord.

    def started(step: int) -> None:
        times.write(
            "start",
            step=step,
            counted_from=times.counted_from,
            seen=seen,
            lock=lock.id,
            launch=launch,
            experiment=experiment,
            digest=config.digest(run),
            corpus=corpora.fingerprint(run, corpus),
            init_from=options.init_from,
        )

    run = resolve(run, corpus.tokenizer())
    if isinstance(run.schedule, Plateau) and "validation" not in corpus.splits:
        raise UsageError(
            "schedule Plateau follows the loss on a validation split, and the corpus has none: build it with "
            "--validation or --validation_source, or take another schedule"
        )
    if is_counted(run.model):
        return counted.train(run, experiment, workdir, corpus, options, started, times)
    if run.mesh.preset == "auto":
        run = search.on_devices(run, jax.devices(), run.mesh.slices)
    mesh = run.mesh.build()
    checkpoints = Checkpoints(workdir, run.train.keep_last, run.train.keep_every, report)
    abstract, new, train_step = loop.prepare(run, mesh)
    say = print if hosts.is_main() else lambda *_: None

    val_losses: list[float | None] = []
    if hosts.broadcast(checkpoints.steps()):
        state, meta, step = checkpoints.restore(abstract, quarantine=True)
        _check_data(meta, corpus.tokenizer_digest, corpora.fingerprint(run, corpus), options.allow_changed_data)
        val_losses = meta.get("val_losses", [])  # Not in what `lm convert` or an older version saved.
        for name, (old, now) in config.diff(config.from_json(meta["run"]), run).items():
            say(f"setting changed since step {step}: {name} was {old}, is {now}")
        if options.init_from:
            say(f"--init_from is not read again: the run goes on from its own step {step}")
    else:
        state = new(jax.random.key(run.train.seed))
        if hasattr(run.model, "with_pieces"):
            pieces = corpus.tokenizer().pieces
            averaged = state.ema and run.model.with_pieces(state.ema, pieces)
            state = dataclasses.replace(state, params=run.model.with_pieces(state.params, pieces), ema=averaged)
        if options.init_from:
            state = _initialized_from(options.init_from, corpus, state, abstract)
            say(f"weights from {options.init_from}")
    first = int(state.step)
    fruitless = ledger.starts(launch, first) if launch and hosts.is_main() else 0
    if hosts.broadcast(fruitless) >= FRUITLESS and first < run.train.steps:
        ledger.write("crash_loop", step=first, launch=launch)
        if hosts.is_main():
            print(_crash_loop(workdir, first), file=sys.stderr)
        return 1
    started(first)
    if first >= run.train.steps:
        if hosts.is_main() and row.read(workdir) is None:
            row.write(workdir, run, corpus, corpora.fingerprint(run, corpus), "done", mesh.size)
        return closing.already_done(run, workdir, say)
    if hosts.is_main():
        _write_folder(workdir, run, experiment, corpus)
    say(closing.opening(run, corpus, mesh, first))

    metrics = Metrics(workdir, first, writes=hosts.is_main())
    display = Display(visible=hosts.is_main(), total=run.train.steps, start=first)
    parts = loop.Parts(
        batches=corpora.training_batches(run, corpus, mesh, int(state.examples), run.train.steps - first),
        checkpoints=checkpoints,
        lock=lock,
        times=times,
        folder=workdir,
        ledger=ledger,
        metrics=metrics,
        display=display,
        meta={
            "run": config.to_json(run),
            "corpus": corpora.fingerprint(run, corpus),
            "tokenizer": corpus.tokenizer_digest,
            "val_losses": val_losses,
        },
        validate=corpora.validation(run, corpus, mesh),
        sample=closing.sampler(run, corpus, workdir),
        profile=options.profile,
    )
    try:
        state, code = loop.fit(run, state, under(mesh, train_step, run.mesh), mesh, parts)
    except Exception as error:
        if hosts.is_peers_failure(error.__cause__ if isinstance(error, SaveError) and error.__cause__ else error):
            print(f"lm train: another process of the run has ended ({error})", file=sys.stderr)
            with contextlib.suppress(OSError):
                ledger.write("peer_lost", error=str(error)[:500])
            hosts.abandon(loop.RESTART)
        if not isinstance(error, SaveError | OSError):
            raise
        saved = checkpoints.steps()
        with contextlib.suppress(OSError):  # The ledger may be on the disk that is full.
            ledger.write("failed", error=str(error))
        last = "" if isinstance(error, SaveError) else f"; the last good step is {saved[-1] if saved else 'none'}"
        print(f"lm train: {error}{last}", file=sys.stderr)
        return 1
    times.write("stop", step=int(state.step), code=code)
    if hosts.is_main():
        metrics.close()
        if code in (loop.DONE, loop.SUSPICIOUS_RESULT):
            status = "done" if code == loop.DONE else "diverged"
            row.write(workdir, run, corpus, corpora.fingerprint(run, corpus), status, mesh.size)
        closing.report(run, corpus, workdir, code, sum(times.spent().values()), say)
    return code


def _began(workdir: str) -> float | None:
    """When this process started, where it was started for this run: its command line names the folder."""
    from lm.train.times import process_start

    return process_start() if any(workdir in argument for argument in sys.argv) else None


def _crash_loop(workdir: str, step: int) -> str:
    return (
        f"lm train: {FRUITLESS} starts from step {step} have ended without a newer checkpoint: giving up. "
        f"{os.path.join(workdir, 'ledger.jsonl')} has what happened; a launch of its own tries again"
    )


def _reporter(ledger: Any) -> Callable[..., None]:
    """Writes events to the ledger, and says those that a person should know of."""
    from lm.parallel import hosts

    def report(event: str, **fields: Any) -> None:
        ledger.write(event, **fields)
        if event != "saved" and hosts.is_main():
            print(f"{event.replace('_', ' ')}: " + ", ".join(f"{k} {v}" for k, v in fields.items()))

    return report


def parameters(model: Any) -> int:
    """How many there are, with the smallest table where the vocabulary is not known yet; of counted models none."""
    from lm.core import params
    from lm.models.headed import with_vocabulary
    from lm.train.counted import is_counted
    from lm.train.run import VOCAB_MULTIPLE

    if is_counted(model):
        return 0
    sized = model if model.vocab_size else with_vocabulary(model, VOCAB_MULTIPLE, None)
    return params.count(sized.spec())


def _write_folder(workdir: str, run: Any, experiment: str, corpus: Any) -> None:
    from lm.train import folder

    folder.write_config(workdir, run, experiment)
    folder.keep_tokenizer(workdir, corpus.tokenizer())


def _check_data(meta: dict[str, Any], tokenizer: str, corpus: str, allowed: bool) -> None:
    for name, now in (("tokenizer", tokenizer), ("corpus", corpus)):
        if meta[name] != now and not (allowed and name == "corpus"):
            way_out = " or pass --allow_changed_data" if name == "corpus" else ""
            raise UsageError(
                f"the run was trained with {name} {meta[name][:12]} and --corpus has {now[:12]}: "
                f"give it the corpus that it began with, another --workdir{way_out}"
            )


def _initialized_from(checkpoint: str, corpus: Any, state: Any, abstract: Any) -> Any:
    import jax

    from lm.interop.load import load_params, read_tokenizer_digest

    if read_tokenizer_digest(checkpoint) != corpus.tokenizer_digest:
        raise UsageError(
            f"--init_from={checkpoint} was trained with another tokenizer than the corpus has: build the corpus "
            f"with lm corpus --tokenizer={checkpoint}/tokenizer.*"
        )
    weights = load_params(checkpoint, abstract.params)
    average = None if state.ema is None else jax.tree.map(jax.numpy.copy, weights)
    return state.replace(params=weights, ema=average)


def _profile(text: str | None, steps: int) -> tuple[int, int] | None:
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last) <= steps):
        raise UsageError(f"--profile={text} needs FIRST:LAST, steps from 1 to train.steps={steps}")
    return int(first), int(last)


if __name__ == "__main__":
    from lm.main.verbs import run as run_verb

    run_verb("train")
