"""A table of cells as Markdown, CSV, LaTeX, and a page of HTML that needs nothing beside it."""

import csv
import html
import io
import math
from collections.abc import Sequence
from typing import Any

Cells = dict[str, Any]

PRINTED = (
    "arm",
    "seeds",
    "loss",
    "perplexity",
    "bits per byte",
    "difference",
    "p (Holm)",
    "test",
    "equivalence p",
    "compute gain",
    "parameters",
    "tokens",
    "FLOPs",
    "device-hours",
    "goodput",
    "learning rate",
    "rate at edge",
    "diverged",
    "settings",
)
_INTERVALS = {"loss": "loss interval", "difference": "difference interval", "compute gain": "gain interval"}
_LEFT = ("arm", "settings", "rate at edge", "test")


def to_csv(table: Sequence[Cells]) -> str:
    """Every column, unrounded; an interval gives two."""
    rows = [dict(pair for name, value in cells.items() for pair in _columns(name, value)) for cells in table]
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def to_markdown(table: Sequence[Cells], notes: Sequence[str]) -> str:
    """The columns of a paper that say something, and the notes below."""
    names, rows = _printed(table)
    lines = [" | ".join(names), " | ".join("---" if n in _LEFT else "---:" for n in names)]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def to_latex(table: Sequence[Cells], notes: Sequence[str]) -> str:
    """A tabular with booktabs rules, for \\input."""
    names, rows = _printed(table)
    columns = "".join("l" if name in _LEFT else "r" for name in names)
    lines = [" & ".join(map(_escaped, row)) + r" \\" for row in (names, *rows)]
    body = "\n".join([lines[0], r"\midrule", *lines[1:]])
    comments = "\n".join(f"% {note}" for note in notes)
    return f"{comments}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"


def to_html(title: str, table: Sequence[Cells], notes: Sequence[str], pictures: Sequence[str]) -> str:
    """One page with the table, the notes and `pictures` (SVG documents) in it."""
    names, rows = _printed(table)
    head = "".join(f"<th{_side(n)}>{html.escape(n)}</th>" for n in names)
    body = "\n".join(
        "<tr>" + "".join(f"<td{_side(n)}>{html.escape(c)}</td>" for n, c in zip(names, row, strict=True)) + "</tr>"
        for row in rows
    )
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    figures = "\n".join(f"<figure>{picture[picture.index('<svg') :]}</figure>" for picture in pictures)
    return _PAGE.format(title=html.escape(title), head=head, body=body, notes=items, figures=figures)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #222 }}
h1 {{ font-size: 1.4rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
th {{ border-bottom: 2px solid #222; font-weight: 600 }}
.left {{ text-align: left }}
td:last-child {{ white-space: normal; min-width: 16rem }}
ul {{ color: #555; padding-left: 1.2rem }}
figure {{ margin: 1.5rem 0 }} svg {{ max-width: 100%; height: auto }}
@media (prefers-color-scheme: dark) {{ body {{ background: #fff }} }}
</style></head><body>
<h1>{title}</h1>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<ul>{notes}</ul>
{figures}
</body></html>
"""


def _printed(table: Sequence[Cells]) -> tuple[list[str], list[list[str]]]:
    """The columns in which any arm has something, as text."""
    rows = [[_text(cells, name) for name in PRINTED] for cells in table]
    kept = [i for i, name in enumerate(PRINTED) if any(row[i] for row in rows)]
    return [PRINTED[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _text(cells: Cells, name: str) -> str:
    value = cells[name]
    if isinstance(value, float) and math.isnan(value):
        return ""
    forms = {
        "loss": "{:.4f}",
        "perplexity": "{:.2f}",
        "bits per byte": "{:.4f}",
        "difference": "{:+.4f}",
        "p (Holm)": "{:.2g}",
        "equivalence p": "{:.2g}",
        "compute gain": "x{:.2f}",
        "parameters": "{:.3g}",
        "tokens": "{:.3g}",
        "FLOPs": "{:.3g}",
        "device-hours": "{:.3g}",
        "goodput": "{:.1%}",
        "learning rate": "{:.3g}",
    }
    text = forms.get(name, "{}").format(value)
    low, high = cells.get(_INTERVALS.get(name, ""), (math.nan, math.nan))
    if math.isnan(low):
        return text
    return f"{text} [{forms[name].format(low)}, {forms[name].format(high)}]"


def _columns(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, tuple):
        return [(f"{name} low", _plain(value[0])), (f"{name} high", _plain(value[1]))]
    return [(name, _plain(value))]


def _plain(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value


def _side(name: str) -> str:
    return ' class="left"' if name in _LEFT else ""


def _escaped(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text
