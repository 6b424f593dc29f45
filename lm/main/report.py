"""The table of a sweep's arms as a paper would print it, with curves, in Markdown, CSV, LaTeX and HTML.

lm report --workdir=runs/abl
lm report --workdir=runs/abl --baseline=rotary --margin=0.005 --fit=runs/fit
lm report --workdir=runs/quickstart    (a run folder: also where its time went)

Runs that differ in seed and learning rate alone are one arm, taken at its best rate; the others are compared with the
baseline. --fit (a fit of the baseline's law, by lm fit) or --ladder (runs of the baseline at several budgets) turns
differences into gains in compute.
"""

import pathlib
from collections.abc import Callable

from absl import flags

from lm.core.errors import UsageError
from lm.main.flags import required, value


def define(values: flags.FlagValues) -> None:
    """Registers the flags of `lm report`."""
    flags.DEFINE_string("workdir", None, "the folder of a sweep, or any folder above run folders", flag_values=values)
    flags.DEFINE_string("out", None, "where the files go; unset, into --workdir", flag_values=values)
    flags.DEFINE_string("baseline", None, "the arm that others are compared with; unset, the first", flag_values=values)
    flags.DEFINE_float("margin", None, "nats: also test that arms differ by less", 0, flag_values=values)
    flags.DEFINE_string("fit", None, "a folder of lm fit --form=chinchilla for gains in compute", flag_values=values)
    flags.DEFINE_string("ladder", None, "runs or a CSV with C and loss of the baseline, instead", flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Writes report.md, .csv, .tex, .html and .svg, and prints the first; returns the exit code."""
    workdir = required(values, "workdir")
    if value(values, "fit") and value(values, "ladder"):
        raise UsageError("--fit and --ladder exclude each other: both say what a loss costs in compute")
    compute = _compute(value(values, "fit"), value(values, "ladder"))

    from rich.console import Console
    from rich.markdown import Markdown

    from lm.core import files
    from lm.report import ablation, arms, curves, formats, goodput, row
    from lm.train.ledger import Ledger

    spent = goodput.classes(Ledger(workdir).rows())  # Of a run folder: one above them has no ledger.
    if spent and row.read(workdir) is None:
        print(f"{workdir} has not ended; until its ledger's last row:\n\n{goodput.to_markdown(spent)}")
        return 0
    found, missing = arms.read(workdir)
    base = arms.baseline(found, value(values, "baseline"))
    table = ablation.table(found, base, value(values, "margin"), compute)
    notes = ablation.notes(found, base, missing) + (ablation.gain_notes(table) if compute else [])
    picture = curves.draw(found)
    pictures = [picture, goodput.draw(spent)] if spent else [picture]
    out = files.path(value(values, "out") or workdir)
    out.mkdir(parents=True, exist_ok=True)
    title = pathlib.PurePath(workdir).name
    markdown = formats.to_markdown(table, notes) + (f"\n{goodput.to_markdown(spent)}" if spent else "")
    written = {
        "report.md": f"# {title}\n\n{markdown}\n![curves](report.svg)\n",
        "report.csv": formats.to_csv(table),
        "report.tex": formats.to_latex(table, notes),
        "report.html": formats.to_html(title, table, notes, pictures),
        "report.svg": picture,
    }
    for name, text in written.items():
        files.write_bytes(out / name, text.encode())
    console = Console()
    console.print(Markdown(markdown) if console.is_terminal else markdown, soft_wrap=not console.is_terminal)
    print(f"{', '.join(written)}: {out}")
    return 0


def _compute(fit: str | None, ladder: str | None) -> Callable | None:
    """What a loss costs the baseline in compute, from a fit or from a ladder."""
    from lm.core import files
    from lm.report import compare, points

    if ladder:
        rows = points.read(ladder, ("C", "loss"))
        return compare.ladder_compute(rows["C"], rows["loss"])
    if not fit:
        return None
    file = files.path(fit) / "fit.json" if files.path(fit).is_dir() else files.path(fit)
    if not file.exists():
        raise UsageError(f"--fit={fit} has no fit.json: make one with lm fit --form=chinchilla --out={fit}")
    found = files.read_json(file)
    if found.get("form") != "chinchilla":
        raise UsageError(f"--fit={fit} is of form {found.get('form')!r}: gains need one of --form=chinchilla")
    p = found["params"]
    exponent = p["alpha"] * p["beta"] / (p["alpha"] + p["beta"])
    return compare.law_compute(p["E"], found["standard_errors"].get("E") or 0.0, exponent)


if __name__ == "__main__":
    from lm.main.verbs import run as run_verb

    run_verb("report")
