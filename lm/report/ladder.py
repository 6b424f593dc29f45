"""Ladders: the runs of a plan, from a base, models and budgets, each with a decayed schedule of its own."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm.core.errors import UsageError
from lm.report import conventions
from lm.report.isoflop import FEWEST_SIZES
from lm.train.counted import is_counted

WARMUP = 0.02  # Of a run's steps, at least one.


def parameters(model: Any) -> float:
    """N, trunk and head, by which the rows of runs count C = 6 N D; the model needs its `vocab_size`."""
    counted = conventions.counts(model, model.spec())
    return counted["params_trunk"] + counted["params_head"]


def isoflop(
    base: Any, models: Mapping[str, Any], budgets: Sequence[float], ratios: tuple[float, float] = (2, 400)
) -> list[Any]:
    """At each budget C the models that see between `ratios` tokens a parameter: "C1e+15/NAME" (Hoffmann et al. 2022).

    Raises UsageError for a budget with fewer models than lm fit --form=isoflop takes.
    """
    runs = []
    for budget in budgets:
        tokens = {name: budget / (6 * parameters(model)) for name, model in models.items()}
        fitting = [name for name in models if ratios[0] <= tokens[name] / parameters(models[name]) <= ratios[1]]
        if len(fitting) < FEWEST_SIZES:
            raise UsageError(
                f"budget {budget:.3g} has {len(fitting)} models within {ratios} tokens a parameter, and needs "
                f"{FEWEST_SIZES}: add sizes, or widen ratios"
            )
        runs += [lasting(base, models[n], tokens[n], f"C{budget:.3g}/{n}") for n in fitting]
    return runs


def tokens_per_parameter(base: Any, models: Mapping[str, Any], ratios: Sequence[float]) -> list[Any]:
    """Every model at every ratio D / N: "NAME/m20"; beyond the optimal ratio that is over-training."""
    return [
        lasting(base, model, ratio * parameters(model), f"{name}/m{ratio:g}")
        for name, model in models.items()
        for ratio in ratios
    ]


def lasting(base: Any, model: Any, tokens: float, name: str) -> Any:
    """`base` with this model for the number of steps nearest to `tokens`, its warm-up a fixed share of them."""
    steps = max(1, round(tokens / (base.train.batch_size * base.train.seq_len)))
    return dataclasses.replace(
        base,
        name=name,
        model=model,
        train=dataclasses.replace(base.train, steps=steps),
        schedule=dataclasses.replace(base.schedule, warmup_steps=max(1, math.ceil(WARMUP * steps))),
    )


def models(base: Any, settings: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """`base` with each set of settings of its model, by the name of the set: the arms of an ablation."""
    return [
        dataclasses.replace(base, name=name, model=dataclasses.replace(base.model, **changed))
        for name, changed in settings.items()
    ]


def learning_rates(runs: Iterable[Any], peaks: Sequence[float]) -> list[Any]:
    """Every run at every peak: "NAME/lr0.001"; a schedule that ends above zero keeps the ratio of the two."""
    return [_at_peak(run, peak) for run in runs for peak in peaks]


def batch_sizes(runs: Iterable[Any], sizes: Sequence[int]) -> list[Any]:
    """Every run at every batch size in sequences, over the same tokens: "NAME/b16"."""
    out = []
    for run in runs:
        tokens = run.train.steps * run.train.batch_size * run.train.seq_len
        for size in sizes:
            resized = dataclasses.replace(run, train=dataclasses.replace(run.train, batch_size=size))
            out.append(lasting(resized, run.model, tokens, f"{run.name}/b{size}"))
    return out


def seeds(runs: Iterable[Any], count: int) -> list[Any]:
    """Every run with `count` seeds of weights and data: "NAME/seed0"."""
    return [
        dataclasses.replace(
            run,
            name=f"{run.name}/seed{seed}",
            train=dataclasses.replace(run.train, seed=seed),
            data=dataclasses.replace(run.data, seed=seed),
        )
        for run in runs
        for seed in range(count)
    ]


def plan(runs: Iterable[Any]) -> list[dict[str, Any]]:
    """A row a run, before anything is trained: N, D, D / N, steps, and the work under each convention.

    Of a counted model it is the name alone: how many n-grams there are is known once they are counted.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        if is_counted(run.model):
            rows.append({"name": run.name})
            continue
        n, tokens = parameters(run.model), run.train.steps * run.train.batch_size * run.train.seq_len
        work = conventions.flops_per_token(run.model, run.model.spec(), run.train.seq_len)
        sizes = {"name": run.name, "N": n, "D": tokens, "D/N": tokens / n, "steps": run.train.steps}
        rows.append(sizes | {name: per_token * tokens for name, per_token in work.items()})
    return rows


def _at_peak(run: Any, peak: float) -> Any:
    final = {"final": run.schedule.final * peak / run.schedule.peak} if hasattr(run.schedule, "final") else {}
    schedule = dataclasses.replace(run.schedule, peak=peak, **final)
    return dataclasses.replace(run, name=f"{run.name}/lr{peak:g}", schedule=schedule)
