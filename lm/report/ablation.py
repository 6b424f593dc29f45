"""The table of an ablation: a row an arm, with what a paper would print of it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm.core import config
from lm.report import compare
from lm.report.arms import Arm, work

Cells = dict[str, Any]
HIDDEN = ("model.vocab_size", "model.valid_vocab_size")  # Follow from the corpus.


def table(arms: Sequence[Arm], base: Arm, margin: float | None = None, compute: Callable | None = None) -> list[Cells]:
    """[{column: value}], numbers unrounded and NaN where there is none; `compute` as in lm.report.compare.gain."""
    found = {arm.label: _against(arm, base, margin) for arm in arms if arm is not base and arm.best and base.best}
    corrected = dict(zip(found, compare.holm([d.p for d in found.values()]), strict=True))
    spent = work(arms)
    return [_row(arm, base, found.get(arm.label), corrected.get(arm.label, math.nan), compute, spent) for arm in arms]


def notes(arms: Sequence[Arm], base: Arm, missing: Sequence[str]) -> list[str]:
    """What a reader must know beside the table, one sentence each."""
    said = [
        f"Loss is validation loss in nats a token at each arm's best learning rate; differences are to {base.label}. "
        f"Intervals are {compare.LEVEL:.0%}; tests are Welch's, or paired where seeds share data order and correlate."
    ]
    seen = compare.detectable(base.losses)
    if math.isfinite(seen):
        said.append(
            f"With {len(base.losses)} seeds and the spread of {base.label}, differences of {seen:.2g} nats are found "
            "in 80 % of cases."
        )
    short = [arm.label for arm in arms if len(arm.losses) < 2]
    if len(short) == len(arms):
        said.append("One seed an arm, so no intervals.")
    elif short:
        said.append(f"Fewer than two seeds, so no interval: {', '.join(short)}.")
    at_edge = [f"{arm.label} ({arm.edge})" for arm in arms if arm.edge in ("lowest", "highest")]
    if at_edge:
        said.append(f"Best learning rate at the edge of those tried, better may lie beyond: {', '.join(at_edge)}.")
    unstable = [arm.label for arm in arms if arm.diverged[0] != "0"]
    if unstable:
        said.append(f"Seeds diverged, and rates at which none did were taken first: {', '.join(unstable)}.")
    undecayed = [row["name"] for arm in arms for row in arm.best if not row["decayed"]]
    if undecayed:
        said.append(f"Learning rate not decayed at the end: {', '.join(undecayed)}.")
    if missing:
        said.append(f"Not ended, and left out: {', '.join(missing)}.")
    return said


def gain_notes(table: Sequence[Cells]) -> list[str]:
    """What stands for the gains in compute that were asked for and that no number can say."""
    without = [c["arm"] for c in table if not math.isnan(c["difference"]) and math.isnan(c["compute gain"])]
    return [f"No compute gain where the loss lies beyond the ladder or the law: {', '.join(without)}."] * bool(without)


def _row(
    arm: Arm, base: Arm, found: compare.Difference | None, p_holm: float, compute: Callable | None, spent: str
) -> Cells:
    first = arm.rows[0]
    cells: Cells = {
        "arm": arm.label,
        "seeds": len(arm.losses),
        "loss": float(np.mean(arm.losses)) if arm.best else math.nan,
        "perplexity": float(np.exp(np.mean(arm.losses))) if arm.best else math.nan,
        "bits per byte": float(np.mean([row.get("bits_per_byte") or math.nan for row in arm.best or arm.rows])),
        "loss interval": compare.interval(arm.losses),
        "difference": found.mean if found else math.nan,
        "difference interval": found.interval if found else compare.UNKNOWN,
        "p": found.p if found else math.nan,
        "p (Holm)": p_holm,
        "test": found.test if found else "",
        "Welch interval": found.welch if found else compare.UNKNOWN,
        "paired interval": found.paired if found else compare.UNKNOWN,
        "correlation": found.correlation if found else math.nan,
        "equivalence p": found.equivalence_p if found else math.nan,
    }
    gain, bounds = (math.nan, compare.UNKNOWN)
    if found and compute is not None:
        gain, bounds = compare.gain(arm.losses, base.losses, compute)
    return cells | {
        "compute gain": gain,
        "gain interval": bounds,
        "parameters": first["N"],
        "tokens": first["D"],
        "FLOPs": first[spent],
        "device-hours": float(np.mean([row["device_hours"] for row in arm.best or arm.rows])),
        "goodput": float(np.mean([row.get("goodput", math.nan) for row in arm.best or arm.rows])),
        "learning rate": arm.rate,
        "rate at edge": arm.edge,
        "diverged": arm.diverged,
        "commit": ", ".join(sorted({str(row["commit"]) for row in arm.rows})),
        "settings": _settings(base, arm),
    }


def _against(arm: Arm, base: Arm, margin: float | None) -> compare.Difference:
    def by_seed(rows):
        return {(row["seed"], row["data_seed"]): row["loss"] for row in rows}

    shapes = {row["params_total"] for row in (*arm.best, *base.best)}
    return compare.difference(by_seed(arm.best), by_seed(base.best), shared=len(shapes) == 1, margin=margin)


def _settings(base: Arm, arm: Arm) -> str:
    """What differs from the baseline; of a model of another kind its own settings."""
    if type(base.run.model) is not type(arm.run.model):
        fields = {f.name: (f.default, getattr(arm.run.model, f.name)) for f in dataclasses.fields(arm.run.model)}
        own = ", ".join(f"{n}={v}" for n, (default, v) in fields.items() if v != default and f"model.{n}" not in HIDDEN)
        return f"{type(arm.run.model).__name__}({own})"
    changed = config.diff(base.run, arm.run)
    shown = {name: f"{new:.6g}" if isinstance(new, float) else str(new) for name, (_, new) in changed.items()}
    return ", ".join(f"{name}={new}" for name, new in shown.items() if name not in HIDDEN)
