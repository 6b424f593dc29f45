"""Processes that train the runs of a sweep, several at once, each one run after another."""

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lm.core.errors import UsageError
from lm.main.verbs import DONE, FAILED, RESTART, SUSPICIOUS_RESULT, USAGE

ENDED = (DONE, SUSPICIOUS_RESULT)
LOG = "log.txt"


def run(sweep: Any, names: list[str], ended: list[str], settings: list[str], parallel: int, retries: int) -> int:
    """Trains the named runs, up to `parallel` at once, with a live table of them and of those that have ended.

    Returns FAILED where a run failed in all its tries, RESTART where the sweep was told to stop, and all has saved.
    """
    board = _Board(sweep, names, ended, retries)
    count = min(parallel, len(names))
    workers = [_Worker(sweep, settings, i, count, board) for i in range(count)]
    with _stopping(board, workers), board.shown():
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)
    return board.code()


class _Board:
    """Which runs wait, run, and have ended; shared by the threads that each feed one worker."""

    def __init__(self, sweep: Any, names: list[str], ended: list[str], retries: int):
        self._sweep, self._retries = sweep, retries
        self._states = dict.fromkeys(ended, "done") | dict.fromkeys(names, "waiting")
        self._tries = dict.fromkeys(names, 0)
        self._why: dict[str, str] = {}
        self._programs = {name: _program(sweep.runs[name]) for name in names}
        self._lock = threading.Lock()
        self.stopping = False
        self._console = Console(highlight=False, soft_wrap=True)

    def take(self, last: str | None) -> str | None:
        """The next run, one that shares its compiled programs with `last` if there is one; None where none is left."""
        with self._lock:
            waiting = [name for name, state in self._states.items() if state == "waiting"]
            if not waiting or self.stopping:
                return None
            running = {self._programs[n] for n, state in self._states.items() if state == "running"}
            same = [n for n in waiting if last is not None and self._programs[n] == self._programs[last]]
            other = [n for n in waiting if self._programs[n] not in running]
            name = (same or other or waiting)[0]
            self._states[name] = "running"
            self._tries[name] += 1
            return name

    def explain(self, name: str, why: str) -> None:
        """Why a worker died with its run, which says nothing itself."""
        self._why[name] = why

    def end(self, name: str, code: int) -> None:
        if self.stopping and code not in ENDED:
            code = RESTART
        with self._lock:
            again = code not in (*ENDED, USAGE) and not self.stopping and self._tries[name] <= self._retries
            states = {DONE: "done", SUSPICIOUS_RESULT: "diverged", RESTART: "stopped"}
            self._states[name] = "waiting" if again else states.get(code, "failed")
            if not self._console.is_terminal:
                again_text = "; trying again" if again else ""
                self._console.print(f"{name}: {states.get(code, 'failed')}{again_text}{_figure(self._sweep, name)}")

    def code(self) -> int:
        states = list(self._states.values())
        failed = [name for name, state in self._states.items() if state == "failed"]
        for name in (*failed, *(name for name, state in self._states.items() if state == "stopped")):
            why = self._why.get(name) or _last_line(os.path.join(self._sweep.folder(name), LOG))
            self._console.print(f"{name} {self._states[name]}: {why}")
        done = sum(state in ("done", "diverged") for state in states)
        diverged = f", {states.count('diverged')} of them diverged" if "diverged" in states else ""
        self._console.print(f"{done} of {len(self._sweep.runs)} runs have ended{diverged}: {self._sweep.workdir}")
        if failed:
            return FAILED
        return RESTART if done < len(states) else DONE

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """A table that follows the runs in a terminal; elsewhere each end is a line."""
        if not self._console.is_terminal:
            yield
            return
        with Live(get_renderable=self._table, console=self._console, refresh_per_second=2):
            yield

    def _table(self) -> Table:
        table = Table("run", "state", "step", "loss", "val loss", "tokens/s", box=None, pad_edge=False)
        styles = {"running": "cyan", "failed": "bold red", "diverged": "red", "waiting": "dim", "stopped": "yellow"}
        shown = sorted(self._states.items(), key=lambda item: item[1] != "running")
        for name, state in shown[: max(8, self._console.height - 4)]:
            figures = _progress(self._sweep, name) if state != "waiting" else ("", "", "", "")
            table.add_row(name, state, *figures, style=styles.get(state, ""))
        if len(shown) > self._console.height - 4:
            counted = {state: sum(s == state for _, s in shown) for state in dict.fromkeys(s for _, s in shown)}
            table.add_row("", ", ".join(f"{n} {state}" for state, n in counted.items()))
        return table


class _Worker(threading.Thread):
    """Feeds a process of its own, one run's name at a time, and starts another where it dies."""

    def __init__(self, sweep: Any, settings: list[str], index: int, count: int, board: _Board):
        super().__init__(daemon=True)
        self._board = board
        command = [sys.executable, "-m", "lm.main", "sweep", f"--experiment={sweep.experiment}"]
        self._command = [*command, f"--workdir={sweep.workdir}", *settings, f"--worker={index}/{count}"]
        self._environment = os.environ | _share(index, count)
        self._cores = _cores(index, count)
        self._log = os.path.join(sweep.workdir, f"worker{index}.txt")
        self._process: subprocess.Popen | None = None

    def run(self) -> None:
        last = None
        while (name := self._board.take(last)) is not None:
            try:
                code = self._train(name)
            except Exception as error:  # Such as no memory for another process.
                self._board.explain(name, f"{type(error).__name__}: {error}")
                code = FAILED
            self._board.end(name, code)
            last = name
        if self._process is not None:
            self._process.communicate()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def _train(self, name: str) -> int:
        if self._process is None or self._process.poll() is not None:
            # A session of its own: Ctrl-C reaches the sweep alone, which then tells all of them.
            with open(self._log, "w") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=self._environment,
                    start_new_session=True,
                )
            if self._cores:
                os.sched_setaffinity(self._process.pid, self._cores)
            if self._board.stopping:  # The signal came before there was a process to send it on to.
                self.stop()
        names, answers = self._process.stdin, self._process.stdout
        assert names is not None and answers is not None  # Both are pipes.
        try:
            names.write(name + "\n")
            names.flush()
            answer = json.loads(answers.readline())
        except (OSError, ValueError):
            self._process.kill()
            code = self._process.wait()
            self._board.explain(name, f"its process ended with code {code}. {_last_line(self._log)}")
            return RESTART if code == RESTART else FAILED
        if answer["ends"]:
            self._process.wait()
        return answer["code"]


def take_stdout() -> IO[str]:
    """Where a worker answers: its standard output, which all that prints loses to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def work(sweep: Any, answers: IO[str]) -> int:
    """A worker: trains the runs whose names come on standard input, and answers each with its exit code.

    It ends with its parent: where the input ends while a run goes on, the run is told to save. SIGTERM saves a run
    that trains, and ends the process at once outside of training, where nothing is lost.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(RESTART))
    from lm.main import devices
    from lm.main.train import parameters

    runs = sweep.runs.values()
    sizes = math.gcd(*(r.train.batch_size for r in runs)), max(parameters(r.model) for r in runs)
    devices.start(*sizes, min(r.train.seq_len for r in runs))
    names: queue.Queue[str | None] = queue.Queue()
    busy, closed = threading.Event(), threading.Event()

    def read() -> None:
        for line in sys.stdin:
            names.put(line.strip())
        closed.set()
        names.put(None)
        if busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()
    while (name := names.get()) is not None:
        busy.set()
        if closed.is_set():  # The parent died before the run began.
            return RESTART
        code, held = _train(sweep, name)
        busy.clear()
        ends = code == RESTART and not held
        answers.write(json.dumps({"name": name, "code": code, "ends": ends}) + "\n")
        answers.flush()
        if ends:
            return RESTART
    return DONE


def _train(sweep: Any, name: str) -> tuple[int, bool]:
    """(exit code, whether another process holds the run: RESTART then)."""
    from lm.core import files
    from lm.main.train import train
    from lm.report import row
    from lm.train.lock import Held

    folder = sweep.folder(name)
    files.path(folder).mkdir(parents=True, exist_ok=True)
    with open(os.path.join(folder, LOG), "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        held = False
        try:
            for wait_s in (2, 4, 8, 16, 30, 0):  # A killed sweep's worker may be saving still.
                try:
                    code = train(sweep.runs[name], sweep.experiment, folder)
                    break
                except Held as error:
                    print(error, file=sys.stderr)
                    code, held = RESTART, wait_s == 0
                    time.sleep(wait_s)
            measure = sweep.beside("measure")
            if code == DONE and measure is not None:
                row.add(folder, measured=True, **measure(sweep.runs[name], folder))
        except UsageError as error:  # A further try would end in the same.
            print(error, file=sys.stderr)
            code = USAGE
        except Exception:
            traceback.print_exc()
            code = FAILED
        sys.stdout.flush()
        sys.stderr.flush()
        return code, held


@contextlib.contextmanager
def _stopping(board: _Board, workers: list[_Worker]) -> Iterator[None]:
    """SIGTERM and Ctrl-C let every run save."""

    def stop(number, frame):
        board.stopping = True
        for worker in workers:
            worker.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _program(run: Any) -> tuple:
    """What runs must share to share their compiled step, see lm.train.loop.prepare."""
    train = run.train
    return run.model, run.objective, run.optimizer, train.batch_size, train.seq_len, train.accumulate, train.ema_decay


def _cores(index: int, count: int) -> list[int]:
    """A worker's share of this process's cores; all of them where there is but one worker."""
    if count == 1 or not hasattr(os, "sched_setaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return cores[index::count] or [cores[index % len(cores)]]


def _share(index: int, count: int) -> dict[str, str]:
    """A GPU of its own for each worker, in turns; the memory of one in parts where workers outnumber them."""
    found = [f[6:] for f in os.listdir("/dev") if f.startswith("nvidia") and f[6:].isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = sorted(found) if visible is None else [gpu for gpu in visible.split(",") if gpu]
    if count == 1 or not found or not gpus:
        return {}
    each = -(-count // len(gpus))
    return {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)], "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / each:.2f}"}


def _progress(sweep: Any, name: str) -> tuple[str, str, str, str]:
    from lm.train import metrics

    latest: dict[str, Any] = {}
    for figures in metrics.read(sweep.folder(name)):
        latest |= {k: v for k, v in figures.items() if v is not None}

    def shown(key: str, form: str) -> str:
        return format(latest[key], form) if key in latest else ""

    step = f"{latest.get('step', 0)}/{sweep.runs[name].train.steps}"
    return step, shown("loss", ".4f"), shown("val_loss", ".4f"), shown("tokens_per_second", ",.0f")


def _figure(sweep: Any, name: str) -> str:
    step, _, val_loss, _ = _progress(sweep, name)
    return f"  step {step}" + (f"  val_loss {val_loss}" if val_loss else "")


def _last_line(path: str) -> str:
    try:
        with open(path) as f:
            lines = [line.strip() for line in f if line.strip()]
    except OSError:
        return ""
    return lines[-1] if lines else ""
