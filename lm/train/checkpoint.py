"""Checkpoints that are durable before they are called saved, and verified before they are used."""

import contextlib
import gc
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lm.core import files, tree
from lm.core.errors import UsageError
from lm.parallel import hosts
from lm.train import digest
from lm.train.record import Damaged, abstract_arrays, check_layout, check_seal, make_record, placed, read_record, seal

FOLDER = "checkpoints"
_PARTIAL = (".orbax-checkpoint-tmp", ".expired", ".replaced")


class SaveError(RuntimeError):
    """A checkpoint did not become durable; the message names its step and the last good one."""


class Checkpoints:
    """The steps of one run folder, under `checkpoints/`, saved by Orbax in the background.

    `keep_last` newest steps are kept, and of the others each whose number `keep_every` divides.
    `report(event, **fields)` is told of every step that is saved, skipped or quarantined (a `Ledger.write`).
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        keep_last: int = 2,
        keep_every: int | None = None,
        report: Callable[..., None] | None = None,
    ):
        if keep_last < 2:
            raise UsageError(f"train.keep_last={keep_last} must be at least 2: the newest may be the damaged one")
        if keep_every is not None and keep_every < 1:
            raise UsageError(f"train.keep_every={keep_every} must be at least 1, or None to keep none for good")
        self.folder = files.absolute(folder) / FOLDER  # Orbax takes no relative path.
        self._keep_last, self._keep_every = keep_last, keep_every
        self._report = report or _print
        self._trusted: set[int] = set()  # Steps that this process saved, or verified whole.
        self._current: int | None = None  # The step saved or restored last.
        self._pending: tuple[int, float] | None = None  # Step and start of the save under way.
        self._writer: Any = None

    def steps(self) -> list[int]:
        """The durable steps, as the disk has them now, in rising order."""
        if not self.folder.is_dir():
            return []
        names = (entry.name for entry in self.folder.iterdir())
        return sorted(int(name) for name in names if _is_step(name) and self._is_durable(int(name)))

    def save(self, step: int, state: Any, meta: dict[str, Any], wait: bool = False) -> None:
        """Starts saving `state` with its digests, `meta` (JSON) and the versions; returns once it may be donated.

        All processes call it. Saving the step that was saved or restored last does nothing. Raises SaveError where
        this save or the one before fails.
        """
        self.wait()
        if step == self._current:
            return
        import orbax.checkpoint as ocp

        flat = digest.flatten(state)
        record = make_record(step, meta, flat, digest.digests(state))
        self._pending = step, time.monotonic()
        with self._explained(step):
            if self._writer is None:
                self._writer = _writer([x.nbytes for x in flat.values()])
                self._clean()
            self._set_aside(step)
            filled = tree.unflatten({path: x for path, x in flat.items() if x.size})  # Orbax takes no empty array.
            items = ocp.args.Composite(state=ocp.args.PyTreeSave(filled), meta=ocp.args.JsonSave(record))
            self._writer.save(self.folder / str(step), args=items)
        self._current = step
        if wait:
            self.wait()

    def check(self) -> int | None:
        """The step that has become durable since the last call, or None; cheap, for every step of the loop.

        Raises SaveError as soon as the save under way has failed.
        """
        if self._pending is None:
            return None
        with self._explained(self._pending[0]):
            if self._is_durable(self._pending[0]):
                return self.wait()
            self._writer.check_for_errors()
            return None

    def wait(self) -> int | None:
        """Like `check`, once the save under way has ended."""
        if self._pending is None:
            return None
        with self._explained(self._pending[0]):
            self._writer.wait_until_finished()
            return self._finish()

    def newest(self, verify: bool = True) -> int | None:
        """The newest step, or the newest whose every array has its digest; None where there is none."""
        for step in reversed(self.steps()):
            if not verify or self._load(step, abstract_arrays)[2] is None:
                return step
        return None

    def restore(self, abstract: Any, step: int | None = None, quarantine: bool = False) -> tuple[Any, dict, int]:
        """(state, meta, step) of the newest step that verifies, or of `step`; all processes call it.

        `abstract` is the state's tree of ShapeDtypeStruct with shardings; digests are checked on that mesh. Damaged
        steps are passed over, and with `quarantine` (for the holder of the run's lock only) renamed to
        `<step>.damaged-<n>` once a good one is found. Raises UsageError where none verifies, or where a leaf of
        `abstract` is not in the file or has another shape or type there.
        """
        return self._restore("", abstract, step, quarantine)

    def restore_params(self, abstract: Any, step: int | None = None, part: str = "params") -> tuple[Any, dict, int]:
        """(params, meta, step): like `restore`, for the sub-tree `part` alone, by its own digests."""
        return self._restore(part + "/", abstract, step, False)

    def _restore(self, prefix: str, abstract: Any, step: int | None, quarantine: bool) -> tuple[Any, dict, int]:
        wanted = {prefix + path: placed(x) for path, x in digest.flatten(abstract).items()}
        steps = hosts.broadcast(self.steps())
        if not steps:
            raise UsageError(f"there is no checkpoint in {self.folder}")
        if step is not None and step not in steps:
            raise UsageError(f"there is no step {step} in {self.folder}, only {', '.join(map(str, steps))}")
        candidates = steps if step is None else [step]
        damaged: dict[int, str] = {}
        for candidate in reversed(candidates):

            def checked(record: dict, candidate: int = candidate) -> dict[str, Any]:
                check_layout(f"{self.folder}/{candidate}", record, wanted, prefix)
                return wanted

            arrays, meta, problem = self._load(candidate, checked)
            if problem is None:
                self._pass_over(damaged, candidate, quarantine)
                if not prefix:
                    self._current = candidate
                    self._trusted = {s for s in self._trusted if s < candidate} | {candidate}
                leaves = [arrays[path] for path in wanted]
                return jax.tree.unflatten(jax.tree.structure(abstract), leaves), meta, candidate
            damaged[candidate] = problem
        listed = "; ".join(f"step {s}: {problem}" for s, problem in damaged.items())
        raise UsageError(
            f"no checkpoint in {self.folder} verifies ({listed}): restore the files from a copy, or move the "
            "folder away to start anew"
        )

    def _load(self, step: int, choose: Callable[[dict], dict[str, Any]]) -> tuple[dict[str, Any], dict, str | None]:
        """({path: array}, meta, None), or what is wrong with the step in words; every process says the same.

        `choose` gives the wanted {path: ShapeDtypeStruct} for the step's record.
        """
        arrays, record, problem = {}, {}, None
        try:
            record = read_record(self.folder, step)
            if hosts.is_main():
                check_seal(self.folder / str(step))
        except Damaged as error:
            problem = str(error)
        if _agree(problem):
            return {}, {}, problem or "another process cannot read it"
        wanted = choose(record)
        try:
            with _without_echoes():
                arrays = _read_arrays(self.folder / str(step), wanted)
        except Exception as error:
            # Whatever Orbax raises on damaged files counts as damage, except what is no fault of theirs.
            if isinstance(error, MemoryError | PermissionError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            problem = _first_line(error)
        if _agree(problem):
            return {}, {}, problem or "another process cannot read it"
        found = digest.digests(arrays)
        wrong = [path for path in wanted if found[path] != record["arrays"][path]["digest"]]
        if wrong:
            return {}, {}, f"the digest of {wrong[0]} is wrong" + (f", and {len(wrong) - 1} more" if wrong[1:] else "")
        return arrays, record["meta"], None

    def _finish(self) -> int:
        assert self._pending is not None
        step, start = self._pending
        if hosts.is_main():
            # Orbax syncs the files and their folder, but not the rename that put the step in its place.
            files.fsync_folder(self.folder)
            if files.is_local(self.folder):
                seal(self.folder / str(step))
        self._pending = None
        self._trusted.add(step)
        self._report("saved", step=step, seconds=round(time.monotonic() - start, 3))
        self._expire()
        return step

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except SaveError:
            raise
        except Exception as error:
            self._pending = self._current = None
            if self._writer is not None:
                with contextlib.suppress(Exception):
                    self._writer.wait_until_finished()
            good = [s for s in self.steps() if s != step]
            last = f"the last good step is {good[-1]}" if good else "no step was saved before"
            raise SaveError(
                f"saving step {step} in {self.folder} failed ({_first_line(error)}); {last}: "
                "make room or mend the file system, and the same command continues from there"
            ) from error

    def _pass_over(self, damaged: dict[int, str], chosen: int, quarantine: bool) -> None:
        for step, problem in damaged.items():
            if not quarantine:
                self._report("skipped", step=step, reason=problem, used=chosen)
            elif hosts.is_main():
                name = self._free_name(f"{step}.damaged")
                (self.folder / str(step)).rename(self.folder / name)
                files.fsync_folder(self.folder)
                self._report("quarantined", step=step, to=name, reason=problem, used=chosen)
        if damaged and quarantine:
            hosts.barrier("quarantined")

    def _expire(self) -> None:
        """Removes the steps that retention does not keep; only ones older than `keep_last` trusted ones go."""
        trusted = sorted(self._trusted & set(self.steps()))
        if len(trusted) < self._keep_last or not hosts.is_main():
            return
        for step in self.steps():
            if step < trusted[-self._keep_last] and not (self._keep_every and step % self._keep_every == 0):
                gone = self.folder / str(step)
                # A kill amid the removal must not leave a step that looks whole.
                if files.is_local(self.folder):
                    gone = gone.rename(self.folder / f"{step}.expired")
                gone.rmtree()

    def _clean(self) -> None:
        """Removes what a killed writer left half written or half removed."""
        if not hosts.is_main() or not self.folder.is_dir():
            return
        for entry in self.folder.iterdir():
            if any(mark in entry.name for mark in _PARTIAL):
                entry.rmtree()

    def _set_aside(self, step: int) -> None:
        """A step of this number from work that was rolled back gives way to the new one."""
        target = self.folder / str(step)
        if hosts.is_main() and target.exists():
            target.rename(self.folder / self._free_name(f"{step}.replaced"))

    def _free_name(self, stem: str) -> str:
        return next(f"{stem}-{n}" for n in range(1, 10**6) if not (self.folder / f"{stem}-{n}").exists())

    def _is_durable(self, step: int) -> bool:
        # Orbax renames a finished step into place; on an object store its last act is this file instead.
        target = self.folder / str(step)
        return target.exists() if files.is_local(self.folder) else (target / "commit_success.txt").exists()


def locate(name: str | os.PathLike) -> tuple[str, int | None]:
    """(run folder, step or None) of a run folder, its `checkpoints`, or one step's folder.

    Raises UsageError for anything else.
    """
    target = files.path(name)
    if _is_step(target.name) and target.parent.name == FOLDER and target.exists():
        return os.fspath(target.parent.parent), int(target.name)
    if target.name == FOLDER and target.exists():
        return os.fspath(target.parent), None
    if (target / FOLDER).exists():
        return os.fspath(target), None
    raise UsageError(f"{os.fspath(name)} is neither a run folder with {FOLDER}/ in it nor the folder of one step")


def read_meta(folder: str | os.PathLike, step: int) -> dict[str, Any]:
    """The `meta` that was saved with a step of the run folder, and "versions"; loads no array.

    Raises UsageError where it is missing or is not what was saved.
    """
    try:
        return read_record(files.path(folder) / FOLDER, step)["meta"]
    except Damaged as error:
        raise UsageError(f"step {step} in {folder}: {error}; take another step") from None


def _read_arrays(target: Any, wanted: dict[str, Any]) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    _hush()
    how = {
        path: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
        for path, x in wanted.items()
        if x.size
    }
    items = tree.unflatten({path: wanted[path] for path in how})
    # The handler itself, because a Checkpointer ends in a barrier that a process with damaged files never reaches.
    args = ocp.args.PyTreeRestore(item=items, restore_args=tree.unflatten(how), partial_restore=True)
    empty = {path: jnp.zeros(x.shape, x.dtype, device=x.sharding) for path, x in wanted.items() if not x.size}
    return tree.flatten(ocp.PyTreeCheckpointHandler().restore(target / "state", args=args)) | empty


@contextlib.contextmanager
def _without_echoes() -> Iterator[None]:
    """Of a read that fails one error is raised; Orbax's reads beside it would print theirs as they are dropped."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        raise
    finally:
        sys.unraisablehook = before


def _writer(sizes: list[int]) -> Any:
    import orbax.checkpoint as ocp

    _hush()
    # Orbax would hold all that it compresses until the commit: at 124M parameters 1 GB beside the state.
    in_flight = max(1, math.ceil(max(*sizes, sum(sizes) / 4) / 1e9))
    arrays = ocp.PyTreeCheckpointHandler(save_concurrent_gb=in_flight)
    handler = ocp.CompositeCheckpointHandler(state=arrays, meta=ocp.JsonCheckpointHandler())
    options = ocp.options.AsyncOptions(
        post_finalization_callback=lambda: _failpoint("before_commit"),
        # A folder that cannot be made is then an error here, and not a thread that waits for it past the exit.
        create_directories_asynchronously=False,
    )
    return ocp.AsyncCheckpointer(handler, async_options=options)


def _failpoint(name: str) -> None:
    """Dies here without a word where LM_FAILPOINT says so: a test's power cut."""
    if os.environ.get("LM_FAILPOINT") == name:
        os._exit(9)


def _agree(problem: str | None) -> bool:
    return hosts.any_process(problem is not None)


def _is_step(name: str) -> bool:
    return re.fullmatch(r"0|[1-9]\d*", name) is not None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:500]}"


def _print(event: str, **fields: Any) -> None:
    if event != "saved":
        print(f"checkpoint {event}: " + ", ".join(f"{k} {v}" for k, v in fields.items()), file=sys.stderr)


def _hush() -> None:
    """Keeps Orbax's own log off the terminal: each error of its threads is raised again in ours."""
    logger = logging.getLogger("absl")
    if not any(isinstance(f, _NotOrbax) for f in logger.filters):
        logger.addFilter(_NotOrbax())


class _NotOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname
