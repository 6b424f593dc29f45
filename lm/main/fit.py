"""lm fit --runs=FILE.csv|DIR --form=FORM --out=DIR

Fits a scaling law to finished runs and writes fit.json, fit.txt and fit.png. A folder is searched for row.json files.
The forms and the columns that they read, of a CSV or of row.json:

  power       x or N or D or C, loss           loss = E + A/x^alpha; without E: --nofloor
  chinchilla  N, D, loss                       loss = E + A/N^alpha + B/D^beta
  kaplan      N, D, loss                       loss = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D
  isoflop     N, C, loss                       N* ~ C^a: the best size of each budget C, by interpolation in log N
  frontier    N, C, loss                       N* ~ C^a: the best size along C, from a loss curve of each size
  overtrain   N, D, loss [error]               loss = E + A/N^eta + B/D^eta; 1 - error = floor + k exp(-gamma loss)
  repeat      N, D, U (unique tokens), loss    chinchilla of N and D worth as much as if fresh; [U_N]
  hparams     N, D, lr and/or batch, loss      best lr and batch ~ N^p D^q, with the regret of following them
  cbs         batch, steps (to one loss)       steps = S_min + E_min/batch; the critical batch is E_min/S_min
  task        N, D, loss, accuracy             chinchilla, then accuracy = floor + rise / (1 + exp(-k (L_0 - loss)))

D is C / 6N and C is 6ND where it is missing. Optional columns: C, seed, name, and group, which the bootstrap then draws
as one. N and C are of one convention: several values of `convention` are refused. Rows whose `status` is not done,
whose `decayed` is false, or that lack a positive number are left out by name.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags

from lm.core.errors import UsageError, check_choice, check_positive
from lm.main.flags import required, value

if TYPE_CHECKING:
    from lm.report.bootstrap import Progress
    from lm.report.result import Settings

OBJECTIVES = ("huber", "lad", "mse")


def define(values: flags.FlagValues) -> None:
    """Registers the verb's flags."""
    flags.DEFINE_string("runs", None, "a CSV file, or a folder with row.json files below it", flag_values=values)
    flags.DEFINE_string("form", None, "the law, by one of the names above", flag_values=values)
    flags.DEFINE_string("out", None, "the folder for fit.json, fit.txt and fit.png", flag_values=values)
    flags.DEFINE_string(
        "objective",
        "huber",
        "of log residuals, summed over rows: huber, lad (absolute deviations) or mse (squares)",
        flag_values=values,
    )
    flags.DEFINE_float("delta", None, "the threshold of huber, 1e-3 unless given", flag_values=values)
    flags.DEFINE_integer("drop_highest", 0, "how many rows of the highest losses to leave out", flag_values=values)
    flags.DEFINE_integer("bootstrap", 1000, "resamples for the intervals; 0 for none", flag_values=values)
    flags.DEFINE_string("predict", None, "N,D (or the form's columns before loss): predict there", flag_values=values)
    flags.DEFINE_float("budget", None, "the C of N* and D*; the highest of the rows unless given", flag_values=values)
    flags.DEFINE_string("x", None, "the column that a power law is of, where several vary", flag_values=values)
    flags.DEFINE_bool("floor", True, "whether a power law has a floor E", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the bootstrap", flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Fits, writes the three files and prints the table."""
    runs, form, out = (required(values, name) for name in ("runs", "form", "out"))
    settings = settings_of(values)
    from lm.core import files
    from lm.report import figures, fit, table

    if files.path(out).exists() and not files.path(out).is_dir():
        raise UsageError(f"--out={out} is a file: give a folder")
    with progress_bar() as progress:
        result = fit.run(form, runs, settings, progress)
    folder = files.path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = table.text(result)
    files.write_json(folder / "fit.json", table.to_json(result))
    files.write_bytes(folder / "fit.txt", text.encode())
    figures.save(result, folder / "fit.png")
    sys.stdout.write(text + f"{folder / 'fit.json'}, fit.txt, fit.png\n")
    return 0


def settings_of(values: flags.FlagValues) -> "Settings":
    """The flags as the settings of a fit. Raises UsageError for a value that none takes."""
    objective, delta = value(values, "objective"), value(values, "delta")
    check_choice("objective", objective, OBJECTIVES)
    for name in ("delta", "budget"):
        if value(values, name) is not None:
            check_positive(**{f"--{name}": value(values, name)})
    for name in ("drop_highest", "bootstrap", "seed"):
        if value(values, name) < 0:
            raise UsageError(f"--{name}={value(values, name)} must be 0 or more")
    if delta is not None and objective != "huber":
        raise UsageError(f"--delta={delta:g} has no effect on --objective={objective}: it is huber's threshold")
    try:
        predict = tuple(float(v) for v in (value(values, "predict") or "").split(",") if v.strip())
    except ValueError:
        raise UsageError(
            f"--predict={value(values, 'predict')} is not numbers with commas between, such as 7e10,1.4e12"
        ) from None
    check_positive(**{f"--predict {v:g}": v for v in predict})
    from lm.report.minimize import Objective
    from lm.report.result import Settings

    return Settings(
        objective=Objective(objective, delta or 1e-3),
        bootstrap=value(values, "bootstrap"),
        seed=value(values, "seed"),
        drop_highest=value(values, "drop_highest"),
        predict=predict,
        budget=value(values, "budget"),
        x=value(values, "x"),
        floor=value(values, "floor"),
    )


@contextlib.contextmanager
def progress_bar() -> Iterator["Progress"]:
    """A function of (done, total), shown as a bar where standard error is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("bootstrap", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    from lm.main import verbs

    verbs.run("fit")
