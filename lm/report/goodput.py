"""Where the wall time of a run went over all its starts, and the share of it that made steps that were kept."""

import datetime
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm.train.times import CLASSES

_OWN = ("start", "time", "saved", "skipped", "not_finite", "straggler", "hung", "peer_lost", "failed", "stop")
_OF_A_START = ("start", "compile")  # Not repeated for the sake of steps: they stay what they are.
_SHOWN = {
    "step": "tab:green",
    "data": "tab:olive",
    "evaluate": "tab:cyan",
    "checkpoint": "tab:blue",
    "compile": "tab:purple",
    "start": "tab:gray",
    "other": "silver",
    "lost": "tab:red",
    "down": "black",
}


def classes(ledger: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{class: seconds} of a ledger's rows, from the first start to the last row of a start that ran.

    The classes are those of lm.train.times, of work that was kept; "lost" is what was done after the save that a later
    start went on from; "down" the time from the last sign of one start to the beginning of the next. "other" includes
    what came after the last sums of a run that goes on. A last start that has run no step yet is left out. Empty where
    no step was run, or where a start has no sums, being of an older version.
    """
    starts = _starts(ledger)
    if not all("spent" in rows[0] for rows in starts):
        return {}
    total = dict.fromkeys(_SHOWN, 0.0) if starts else {}
    for i, rows in enumerate(starts):
        later = [start[0] for start in starts[i + 1 :]]
        sums = [row for row in rows if "spent" in row]
        resumed = min((row["step"] for row in later), default=math.inf)
        kept = next((_spent(row) for row in reversed(sums) if row["step"] <= resumed), dict.fromkeys(CLASSES, 0.0))
        for name, seconds in _spent(sums[-1]).items():
            lost = 0.0 if name in _OF_A_START else seconds - kept[name]
            total[name] += seconds - lost
            total["lost"] += lost
        end, rest = _instant(rows[-1]["time"]), "other"
        if later:
            began, seen = _began(later[0]), later[0]["seen"]
            end = end if seen is None else max(end, min(_instant(seen), began))
            total["down"] += max(0.0, began - end)
            rest = "start" if sums[-1]["event"] == "start" else "lost"  # Before its first step it had none to lose.
        total[rest] += end - _instant(sums[-1]["time"])
    return {name: round(seconds, 3) for name, seconds in total.items()}


def share(seconds: Mapping[str, float]) -> float:
    """The goodput of a run: its kept steps' share of all its time."""
    return seconds["step"] / sum(seconds.values())


def to_markdown(seconds: Mapping[str, float]) -> str:
    """A row a class, with its share."""
    total = sum(seconds.values())
    lines = ["| time | seconds | share |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {value:,.1f} | {value / total:.1%} |" for name, value in seconds.items()]
    return "\n".join([*lines, f"| all | {total:,.1f} | |"]) + "\n"


def draw(seconds: Mapping[str, float]) -> str:
    """One stacked bar of the classes, with the table as its legend, as an SVG document."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 2.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    total, left = sum(seconds.values()), 0.0
    for name, value in seconds.items():
        axes.barh(0, value / total, left=left, color=_SHOWN[name], label=f"{name} {value:,.1f} s ({value / total:.1%})")
        left += value / total
    axes.set(xlim=(0, 1), yticks=[], title=f"goodput {share(seconds):.1%} of {total:,.1f} seconds")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _starts(ledger: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The rows of each start, as far as its own process wrote them: the next one writes some before its "start"."""
    starts: list[list[Mapping[str, Any]]] = []
    for row in ledger:
        if row["event"] == "start":
            starts.append([row])
        elif starts and row["event"] in _OWN:
            starts[-1].append(row)
    while starts and all(row["event"] != "time" for row in starts[-1]):
        starts.pop()
    return starts


def _began(start: Mapping[str, Any]) -> float:
    return _instant(start["time"]) - sum(_spent(start).values())


def _spent(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: row["spent"][f"{name}_s"] for name in CLASSES}


def _instant(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()
