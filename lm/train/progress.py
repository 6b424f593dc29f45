"""What a person sees while a run goes on: a bar in a terminal, plain lines elsewhere, nothing off process 0."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """A bar of steps with the figures of the last logged one; `say` prints above it."""

    def __init__(self, *, visible: bool, total: int, start: int):
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=not visible)
        self._total = total
        self._bar = None
        if self._console.is_terminal and visible:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}")
            self._bar = Progress(*columns, TimeRemainingColumn(compact=True), console=self._console)
            self._task = self._bar.add_task(f"step {start}/{total}", total=total, completed=start, figures="")

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Moves the bar to `step` finished steps."""
        if self._bar:
            self._bar.update(self._task, completed=step, description=f"step {step}/{self._total}")

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Shows the figures of a logged step: on the bar, or as a line where there is none."""
        text = _figures(figures)
        if self._bar:
            self._bar.update(self._task, figures=text)
        else:
            self._console.print(f"step {step}/{self._total}  {text}", markup=False)


def _figures(row: dict[str, float]) -> str:
    parts = [f"loss {row['loss']:.4f}"] if row.get("loss") is not None else []
    if row.get("tokens_per_second"):
        parts.append(f"{_si(row['tokens_per_second'])} tokens/s")
    if row.get("mfu"):
        parts.append(f"MFU {row['mfu']:.0%}")
    return "  ".join(parts)


def _si(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"
