"""The figures of a run: rows of metrics.jsonl, TensorBoard events, and a picture of both."""

import json
import math
import os
from typing import Any

from lm.core import files

NAME = "metrics.jsonl"
PICTURE = "loss.png"


class Metrics:
    """Writes the rows of a run that goes on at `step`; rows of later steps are of lost work and are dropped.

    So the file is a function of the run and not of its interruptions. Processes other than 0 write nothing.
    """

    def __init__(self, folder: str | os.PathLike, step: int = 0, writes: bool = True):
        self._folder = files.path(folder)
        self._writes = writes
        self._events: Any = None
        if writes:
            self._forget_after(step)
            from tensorboardX import SummaryWriter

            # purge_step tells TensorBoard to drop the events of lost work in the same way.
            self._events = SummaryWriter(os.fspath(self._folder), purge_step=step + 1, flush_secs=30)

    def write(self, step: int, **scalars: float) -> None:
        """One row; numbers that are not finite are written as null."""
        if not self._writes:
            return
        row = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        files.append_line(self._folder / NAME, json.dumps({"step": step, **row}))
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the events."""
        if self._events is not None:
            self._events.close()

    def _forget_after(self, step: int) -> None:
        rows = read(self._folder)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            text = "".join(json.dumps(row) + "\n" for row in kept)
            files.write_bytes(self._folder / NAME, text.encode())


def read(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run folder in order; none where nothing was logged yet."""
    name = files.path(folder) / NAME
    return files.read_jsonl(name) if name.exists() else []


def plot(folder: str | os.PathLike) -> str | None:
    """The path of loss.png (losses over steps, the learning rate below), or None where nothing was logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read(folder)
    loss, val_loss, rate = (_series(rows, name) for name in ("loss", "val_loss", "learning_rate"))
    if not loss[0] and not val_loss[0]:
        return None
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    top.plot(*loss, ".-" if len(loss[0]) < 30 else "-", color="tab:blue", alpha=0.7, label="training")
    if val_loss[0]:
        final = val_loss[1][-1]
        top.plot(*val_loss, "o-", color="tab:orange", markersize=4, label=f"validation (last {final:.4f})")
    top.set_ylabel("loss (nats per token)")
    top.set_title(os.path.basename(os.path.abspath(os.fspath(folder))))
    top.legend(frameon=False)
    bottom.plot(*rate, color="tab:green")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    out = files.path(folder) / PICTURE
    with out.open("wb") as f:
        figure.savefig(f, format="png")
    return os.fspath(out)


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]
