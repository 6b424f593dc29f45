"""Fits by the name of their form: the columns that each reads, and the function that does it."""

import dataclasses
from collections.abc import Callable

import numpy as np

from lm.core.errors import UsageError, check_choice
from lm.report import points, repeat
from lm.report.bootstrap import Progress
from lm.report.exponents import FLOPS
from lm.report.hparams import fit_hparams
from lm.report.isoflop import fit_isoflop
from lm.report.laws import LAWS, power
from lm.report.parametric import fit_laws
from lm.report.points import Points
from lm.report.result import Result, Settings


@dataclasses.dataclass(frozen=True)
class Form:
    """A form's needed and optional columns, its fit, and whether --objective changes it."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    fit: Callable[[str, Points, Settings, Progress], Result]
    has_objective: bool = True


def run(form: str, runs: str, settings: Settings, progress: Progress = lambda done, total: None) -> Result:
    """The fit of `form` to the rows of `runs`. Raises UsageError for a form, a file or rows that allow none."""
    check_choice("form", form, FORMS)
    chosen = FORMS[form]
    if not chosen.has_objective and settings.objective != Settings().objective:
        raise UsageError(f"--objective and --delta have no effect on {form}, which is fitted by least squares")
    if form != "power" and (settings.x or not settings.floor):
        raise UsageError(f"--x and --nofloor have no effect on {form}: they are for power")
    needed = chosen.needed + ((settings.x,) if settings.x else ())
    rows = points.read(runs, needed, chosen.optional)
    with np.errstate(all="ignore"):  # Lines of search and rows without a law reach numbers that overflow.
        return chosen.fit(form, rows, settings, progress)


def _power(form: str, rows: Points, settings: Settings, progress: Progress) -> Result:
    return fit_laws(form, [power(_variable(rows, settings.x), "loss", settings.floor)], rows, settings, progress)


def _variable(rows: Points, x: str | None) -> str:
    """The column that a power law is of: --x, or the only one of N and D that varies, or x, or C."""
    varying = [c for c in ("x", "N", "D", "C") if c in rows and len(np.unique(rows[c])) > 1]
    if x or not varying:
        if not x:
            raise UsageError("no column x, N, D or C varies: name the column of the power law, --x=COLUMN")
        return x
    if {"N", "D"} <= set(varying):
        raise UsageError("N and D both vary: say which of them the power law is of, --x=N or --x=D")
    return varying[0]


def _law(form: str, rows: Points, settings: Settings, progress: Progress) -> Result:
    if form == "cbs" and "loss" in rows and np.ptp(rows["loss"]) > 1e-3 * rows["loss"].min():
        raise UsageError(
            f"cbs is of steps to one loss, and the rows have {rows['loss'].min():g} to {rows['loss'].max():g}"
        )
    return fit_laws(form, [LAWS[form]], rows, settings, progress)


def _overtrain(form: str, rows: Points, settings: Settings, progress: Progress) -> Result:
    laws = [LAWS["overtrain"]]
    if "error" in rows:
        if rows["error"].max() >= 1:
            raise UsageError(f"error is a share below 1, and reaches {rows['error'].max():g}")
        rows = dataclasses.replace(rows, columns=rows.columns | {"right": 1 - rows["error"]})
        laws.append(LAWS["error"])
    return fit_laws(form, laws, rows, settings, progress)


def _repeat(form: str, rows: Points, settings: Settings, progress: Progress) -> Result:
    law, rows = repeat.prepare(rows, settings.objective)
    return fit_laws(form, [law], rows, settings, progress)


def _task(form: str, rows: Points, settings: Settings, progress: Progress) -> Result:
    return fit_laws(form, [LAWS["chinchilla"], LAWS["accuracy"]], rows, settings, progress)


FORMS = {
    "power": Form(("loss",), ("x", "N", "D", "C"), _power),
    "chinchilla": Form(("N", "D", "loss"), ("C", *FLOPS), _law),
    "kaplan": Form(("N", "D", "loss"), ("C",), _law),
    "isoflop": Form(("N", "C", "loss"), ("D", *FLOPS), fit_isoflop, has_objective=False),
    "frontier": Form(("N", "C", "loss"), ("D", *FLOPS), fit_isoflop, has_objective=False),
    "overtrain": Form(("N", "D", "loss"), ("C", "error"), _overtrain),
    "repeat": Form(("N", "D", "U", "loss"), ("C", "U_N"), _repeat),
    "hparams": Form(("N", "D", "loss"), ("lr", "batch"), fit_hparams, has_objective=False),
    "cbs": Form(("batch", "steps"), ("loss",), _law),
    "task": Form(("N", "D", "loss", "accuracy"), ("C",), _task),
}
