"""A fit as a text table and as JSON: what was asked first, parameters next, evidence and warnings last."""

import io
import math
from typing import Any

from lm.report.result import Result


def text(result: Result) -> str:
    """The table: derived quantities, parameters, diagnostics, warnings."""
    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    console = Console(file=out, width=100, highlight=False, soft_wrap=True)
    console.print(f"{result.form}: {result.formula}", markup=False)
    console.print(f"{result.rows} rows, minimised sum {result.objective:.9g}\n", markup=False)
    table = Table("", "value", "95 % interval", "standard error", box=None, header_style="")
    for part in (result.derived, result.params):
        for name, value in part.items():
            low, high = result.intervals.get(name, (math.nan, math.nan))
            error = result.standard_errors.get(name, math.nan)
            known = math.isfinite(low)
            table.add_row(
                name, _shown(value), f"{_shown(low)} to {_shown(high)}" if known else "", _shown(error) if known else ""
            )
        table.add_section()
    console.print(table)
    console.print()
    for name, value in result.diagnostics.items():
        _print_diagnostic(console, name, value)
    for warning in result.warnings:
        console.print(f"warning: {warning}", markup=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def to_json(result: Result) -> dict[str, Any]:
    """Every number by name; what is not finite is null."""
    names = ("form", "formula", "rows", "params", "derived", "objective", "intervals", "standard_errors")
    return {name: _finite(getattr(result, name)) for name in (*names, "diagnostics", "warnings")}


def _print_diagnostic(console: Any, name: str, value: Any) -> None:
    if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
        console.print(name, markup=False)
        for key, inner in value.items():
            console.print(f"  {key:<6} {_pairs(inner)}", markup=False)
    elif isinstance(value, dict):
        console.print(f"{name}: {_pairs(value)}", markup=False)
    elif isinstance(value, list):
        console.print(f"{name}: {', '.join(_pairs(v) if isinstance(v, dict) else _shown(v) for v in value) or 'none'}")
    else:
        console.print(f"{name}: {'not tested, too few rows' if value is None else _shown(value)}", markup=False)


def _pairs(values: dict[str, Any]) -> str:
    return "  ".join(f"{k} {_shown(v)}" for k, v in values.items())


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
