"""The arms of an ablation: runs that differ in seed and learning rate alone, each arm at its best rate."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from lm.core import config, files
from lm.core.errors import UsageError, unknown

ORDER = "sweep.json"  # In a sweep's folder: {"experiment", "runs": names in the experiment's order}.


@dataclasses.dataclass(frozen=True)
class Arm:
    """`rows` are all its runs, `best` those at the learning rate of the lowest mean loss, whose losses are compared."""

    label: str
    run: Any  # Its configuration, with neither seeds nor rate.
    rows: tuple[dict[str, Any], ...]
    best: tuple[dict[str, Any], ...]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.best]

    @property
    def rate(self) -> float:
        return self.best[0]["learning_rate"] if self.best else math.nan

    @property
    def edge(self) -> str:
        """Whether the best rate is the lowest or the highest tried, so that a better one may lie beyond."""
        rates = sorted({row["learning_rate"] for row in self.rows})
        if len(rates) == 1:
            return "one rate"
        return {rates[0]: "lowest", rates[-1]: "highest"}.get(self.rate, "no") if self.best else "none ended"

    @property
    def diverged(self) -> str:
        return f"{len(self.rows) - sum(map(_ended, self.rows))} of {len(self.rows)}"


def read(folder: str | os.PathLike) -> tuple[list[Arm], list[str]]:
    """(arms in the order of the sweep, names of its runs that have not ended).

    Raises UsageError for a folder without rows, or with rows that name no configuration.
    """
    root = files.path(folder)
    # A folder may have been moved since it was written.
    rows = [files.read_json(file) | {"run": os.fspath(file.parent)} for file in files.find(root, "row.json")]
    if not rows:
        raise UsageError(f"--workdir={folder} has no row.json below it: train its runs with lm sweep first")
    order = files.read_json(root / ORDER)["runs"] if (root / ORDER).exists() else []
    place = {name: i for i, name in enumerate(order)}
    rows.sort(key=lambda row: (place.get(row["name"], len(place)), row["name"]))
    groups: dict[str, tuple[Any, list[dict[str, Any]]]] = {}
    for row in rows:
        if "config" not in row:
            raise UsageError(f"run {row['name']} has a row without its config: train it again")
        run = _without_seed_and_rate(config.from_json(row["config"]))
        groups.setdefault(config.digest(run), (run, []))[1].append(row)
    arms = _named([_arm(run, _distinct(members)) for run, members in groups.values()])
    return arms, [name for name in order if name not in {row["name"] for row in rows}]


def work(arms: Sequence[Arm]) -> str:
    """The figure of a row by which arms are compared: C, and where models differ in kind the products of each, or the
    additions that counted it. Raises UsageError for a row that lacks it."""
    if len({type(arm.run.model) for arm in arms}) == 1:
        return "C"
    without = next((row["name"] for arm in arms for row in arm.rows if "flops_model" not in row), None)
    if without is not None:
        raise UsageError(f"run {without} has a row without flops_model: train it again to compare it with other models")
    return "flops_model"


def baseline(arms: Sequence[Arm], label: str | None) -> Arm:
    """The arm of that label; the first unless one is given."""
    found = [arm for arm in arms if label in (None, arm.label)]
    if not found:
        raise unknown("arm", str(label), [arm.label for arm in arms])
    return found[0]


def _without_seed_and_rate(run: Any) -> Any:
    # Rounded, so that equal ratios stay equal at every rate.
    final = {"final": float(f"{run.schedule.final / run.schedule.peak:.6g}")} if hasattr(run.schedule, "final") else {}
    return dataclasses.replace(
        run,
        name="",
        train=dataclasses.replace(run.train, seed=0),
        data=dataclasses.replace(run.data, seed=0),
        schedule=dataclasses.replace(run.schedule, peak=1.0, **final),
    )


def _arm(run: Any, rows: list[dict[str, Any]]) -> Arm:
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        by_rate.setdefault(row["learning_rate"], []).append(row)
    ended = [([row for row in found if _ended(row)], len(found)) for found in by_rate.values()]

    def rank(pair: tuple[list[dict[str, Any]], int]) -> tuple[int, int, float]:
        """Rates at which seeds diverged come last, and those with fewer seeds: a survivor is no mean."""
        found, tried = pair
        return tried - len(found), -len(found), sum(row["loss"] for row in found) / len(found)

    best = min((pair for pair in ended if pair[0]), key=rank, default=([], 0))[0]
    return Arm(_label([row["name"] for row in rows]), run, tuple(rows), tuple(best))


def _distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each rate and pair of seeds: the same run under two names is one run."""
    found = {(row["learning_rate"], row["seed"], row["data_seed"]): row for row in reversed(rows)}
    return list(reversed(found.values()))


def _named(arms: list[Arm]) -> list[Arm]:
    """With labels that differ: a number after those that do not."""
    labels = [arm.label for arm in arms]
    return [
        dataclasses.replace(arm, label=f"{arm.label} ({labels[: i + 1].count(arm.label)})")
        if labels.count(arm.label) > 1
        else arm
        for i, arm in enumerate(arms)
    ]


def _ended(row: dict[str, Any]) -> bool:
    return row["status"] == "done" and row.get("loss") is not None and math.isfinite(row["loss"])


def _label(names: list[str]) -> str:
    """The parts that all its names share, without that of the seed."""
    parts = [without_seed(name).split("/") for name in names]
    shared = [part for part in parts[0] if all(part in other for other in parts)] or parts[0]
    return "/".join(shared) or names[0]


def without_seed(name: str) -> str:
    """The name of a run without the part that names its seed: what replicates share."""
    return "/".join(part for part in name.split("/") if not re.fullmatch(r"seed\d+", part))
