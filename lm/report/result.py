"""What is asked of a fit, and what every fit returns, whatever its form."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lm.report.minimize import Objective


@dataclasses.dataclass(frozen=True)
class Settings:
    """The choices that change a fit. `predict` are values of the law's columns, `budget` is a C for N* and D*."""

    objective: Objective = Objective()
    bootstrap: int = 1000
    seed: int = 0
    drop_highest: int = 0
    predict: tuple[float, ...] = ()
    budget: float | None = None
    x: str | None = None
    floor: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    """Numbers by name; `draw` paints the fit on a matplotlib figure."""

    form: str
    formula: str
    rows: int
    params: dict[str, float]
    derived: dict[str, float]
    objective: float
    intervals: dict[str, list[float]]
    standard_errors: dict[str, float]
    diagnostics: dict[str, Any]
    warnings: list[str]
    draw: Callable[[Any], None]
