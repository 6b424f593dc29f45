"""Chinchilla's law through the points of its own figure 4, under one rule after another about what counts as a point.

The points were read off the figure by Besiroglu et al. (2024, 2404.10102), a CSV with columns Model Size, Training FLOP
and loss: epoch-research/analyzing-chinchilla, data/svg_extracted_data.csv, which has no licence and so is not here.
Claim: without the 5 highest losses the minimum lies at E 1.8172, alpha 0.34731, beta 0.36717, objective 1.018274e-3,
where the published row, E 1.8172, alpha 0.3478, beta 0.3658, has 1.02284e-3; and no rule is innocent: dropping none or
20 points moves the exponent a from 0.57 to 0.48.
Command: python -m experiments.chinchilla_refit --points=svg_extracted_data.csv --out=runs/refit
Hardware and time: 1 CPU core, a minute.
"""

import csv
import dataclasses
import pathlib

from absl import app, flags
from rich.console import Console
from rich.table import Table

from lm.core import files
from lm.report import figures, fit, table
from lm.report.minimize import Objective
from lm.report.result import Result, Settings

_POINTS = flags.DEFINE_string("points", None, "the CSV of the points", required=True)
_OUT = flags.DEFINE_string("out", None, "the folder for points.csv, the fit and the table", required=True)
_BOOTSTRAP = flags.DEFINE_integer("bootstrap", 1000, "resamples of the main fit", lower_bound=0)

Row = dict[str, float]
BUDGET = 5.76e23  # Chinchilla's own, for N* and D* / N*.


def main(argv: list[str]) -> None:
    """Writes points.csv, fit.json, fit.txt, fit.png and rules.txt; prints the last two."""
    del argv
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    rows = _read(_POINTS.value)
    main_fit = _fit(out / "points.csv", rows, Settings(drop_highest=5, bootstrap=_BOOTSTRAP.value, budget=BUDGET))
    (out / "fit.txt").write_text(table.text(main_fit))
    files.write_json(out / "fit.json", table.to_json(main_fit))
    figures.save(main_fit, out / "fit.png")
    shown = Table("rule", "points", "E", "alpha", "beta", "a", "N* at 5.76e23", "D*/N*", box=None)
    for rule, kept, settings in _rules(rows):
        found = _fit(out / "rule.csv", kept, dataclasses.replace(settings, bootstrap=0, budget=BUDGET))
        numbers = (found.params[name] for name in ("E", "alpha", "beta"))
        derived = found.derived
        cells = [f"{x:.4f}" for x in (*numbers, derived["a"])]
        shown.add_row(rule, str(found.rows), *cells, f"{derived['N*']:.3g}", f"{derived['D*'] / derived['N*']:.1f}")
    (out / "rule.csv").unlink()
    print(table.text(main_fit))
    with (out / "rules.txt").open("w") as file:
        Console(file=file, width=120).print(shown)
    print((out / "rules.txt").read_text())


def _rules(rows: list[Row]) -> list[tuple[str, list[Row], Settings]]:
    """(name, points, settings): what is dropped, how residuals weigh, which ratios and budgets count."""
    five = Settings(drop_highest=5)
    rules = [(f"drop the {k} highest", rows, Settings(drop_highest=k)) for k in (0, 1, 3, 5, 10, 20)]
    for name, objective in (
        ("least absolute deviations", Objective("lad")),
        ("Huber 1e-2", Objective("huber", 1e-2)),
        ("least squares in log", Objective("mse")),
    ):
        rules.append((f"5, {name}", rows, dataclasses.replace(five, objective=objective)))
    kept = sorted(rows, key=lambda r: r["loss"])[:-5]
    for low, high in ((1, 100), (5, 50)):
        rules.append((f"5, D/N in [{low}, {high}]", [r for r in kept if low <= r["D"] / r["N"] <= high], Settings()))
    for limit in (1e21, 3e20, 1e20):
        rules.append((f"5, C < {limit:.0e}", [r for r in kept if r["C"] < limit], Settings()))
    return rules


def _read(name: str) -> list[Row]:
    with open(name, newline="") as file:
        found = [(float(r["Model Size"]), float(r["Training FLOP"]), float(r["loss"])) for r in csv.DictReader(file)]
    return [{"N": n, "D": c / (6 * n), "C": c, "loss": loss} for n, c, loss in found]


def _fit(file: pathlib.Path, rows: list[Row], settings: Settings) -> Result:
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, ("N", "D", "C", "loss"))
        writer.writeheader()
        writer.writerows(rows)
    return fit.run("chinchilla", str(file), settings)


if __name__ == "__main__":
    app.run(main)
