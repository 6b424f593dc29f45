"""Which process keeps the others waiting: the time that each takes for its own batches, compared between them."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lm.parallel import hosts
from lm.train.ledger import Ledger

SLOWER = 1.5  # Times the median of the others.
SHARE = 0.1  # Of a step: what is slow but takes less than this of it holds nobody up.
SHOWN = 8
_NOTE = "pace"


class Stragglers:
    """Measures how long `next` waits for a batch, and every `every` steps compares the processes.

    The collectives make all steps equally long, whoever is slow; the wait for one's own data is what differs. Each
    process leaves its figures with the coordinator and waits for nobody: process 0 reads what is there, prints a
    table when a process becomes the slowest, and writes it to the ledger as "straggler".
    """

    def __init__(self, every: int, ledger: Ledger, say: Callable[[str], None]):
        self._every, self._ledger, self._say = every, ledger, say
        self._waits: list[float] = []
        self._steps: list[float] = []
        self._last: float | None = None
        self._named: int | None = None
        self.waited_s = 0.0  # For the last batch; 0 for the first.

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch."""
        start = time.monotonic()
        batch = next(batches)
        end = time.monotonic()
        if self._last is not None:  # The first batch waits for its readers to start.
            self.waited_s = end - start
            self._waits.append(self.waited_s)
            self._steps.append(end - self._last)
        self._last = end
        return batch

    def step(self, done: int) -> None:
        """Step `done` has ended: every `every` steps its figures go out, and process 0 compares."""
        if done % self._every:
            return
        waits, steps, self._waits, self._steps = self._waits, self._steps, [], []
        if jax.process_count() == 1 or not waits:
            return
        # The median leaves out what an evaluation or a save adds to a step.
        times = {"step_s": statistics.median(steps), "data_s": statistics.fmean(waits)}
        hosts.post(_NOTE, json.dumps({"step": done, "host": platform.node(), **times}))
        if hosts.is_main():
            notes = {process: json.loads(text) for process, text in hosts.posted(_NOTE).items()}
            self._compare(done, {p: note for p, note in notes.items() if note["step"] > done - 2 * self._every})

    def _compare(self, done: int, figures: dict[int, dict[str, Any]]) -> None:
        slowest = straggler(figures)
        if slowest is not None and slowest != self._named:
            rows = dict(sorted(figures.items(), key=lambda item: -item[1]["data_s"])[:SHOWN])
            self._say(table(slowest, rows))
            self._ledger.write("straggler", step=done, process=slowest, slowest={str(p): f for p, f in rows.items()})
        self._named = slowest


def straggler(figures: dict[int, dict[str, Any]]) -> int | None:
    """The process that waits longest for its data, where that is longer than the others do and holds the step up."""
    if len(figures) < 2:
        return None
    slowest = max(figures, key=lambda process: figures[process]["data_s"])
    wait = figures[slowest]["data_s"]
    others = statistics.median(f["data_s"] for process, f in figures.items() if process != slowest)
    held_up = wait - others > SHARE * figures[slowest]["step_s"]
    return slowest if wait > SLOWER * others and held_up else None


def table(slowest: int, figures: dict[int, dict[str, Any]]) -> str:
    """Says who is slow, above a line for each process, slowest first."""
    lines = [f"process {slowest} on {figures[slowest]['host']} is slow: it waits longer for its data than the others"]
    lines += ["  process  step ms  data ms  host"]
    lines += [
        f"  {p:>7}  {1e3 * f['step_s']:>7.1f}  {1e3 * f['data_s']:>7.1f}  {f['host']}" for p, f in figures.items()
    ]
    return "\n".join(lines)
