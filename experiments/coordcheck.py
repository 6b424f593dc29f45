"""The coordinate check: after 5 steps at a high learning rate, do activations keep their size as the model grows?

Claim: in muP the mean |activation| of every layer and of the logits goes as width to a power within +-0.15; in the
standard parametrization, the control without which the check would be blind, to one above 0.5. `:depth` checks
CompleteP against the number of layers in the same way. (Yang et al. 2022, 2203.03466, appendix D.1; Dey et al. 2025,
2505.01618.)
Command: lm sweep --experiment=coordcheck --workdir=runs/cc
Hardware and time: 2 CPU cores, 2 minutes; seen: 0.14 and 1.69 (LOG.md).
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from experiments import completep_depth, mup_width
from lm.train.run import Run
from lm.train.schedules import Constant

WIDTHS = (64, 128, 256, 512, 1024)
LAYERS = (2, 4, 8, 16)
# At equal shares of the depth: in CompleteP one layer of many adds less than one of few, and all together as much.
PLACES = ("embeddings", "halfway", "last layer", "logits")
LARGEST, CONTROL = 0.15, 0.5  # |slope| of what must not grow; slope of what must.


def run() -> list[Run]:
    """5 widths, 2 seeds, muP and the standard parametrization."""
    return _runs(mup_width, "width", WIDTHS)


def depth() -> list[Run]:
    """4 depths, 2 seeds, CompleteP and the standard parametrization."""
    return _runs(completep_depth, "layers", LAYERS)


def measure(run: Run, folder: str) -> dict[str, float]:
    """Mean |activation| over the same 16 rows of validation text at each of `PLACES`."""
    import jax
    import jax.numpy as jnp

    import lm
    from lm.data.corpus import Corpus
    from lm.data.stream import Stream

    model, params = lm.load(folder)
    assert run.data.corpus is not None  # A sweep fills it in.
    text = Stream(Corpus(run.data.corpus).split("validation"), run.objective, run.train.seq_len, order="sequential")
    tokens_BL = text.rows(0, 16)["tokens_BL"]

    def sizes(params: Any) -> list[jax.Array]:
        out = model.apply(params, {"tokens_BL": tokens_BL}, capture=("hidden_states",))
        states = out.captured["hidden_states"]
        logits = model.logits(model.head(params), out.hidden_BLD)[..., : model.valid_vocab_size]
        return [jnp.abs(x).mean() for x in (states[0], states[len(states) // 2], states[-1], logits)]

    return dict(zip(PLACES, map(float, jax.jit(sizes)(params)), strict=True))


def verdict(rows: list[dict[str, Any]], folder: pathlib.Path) -> tuple[str, bool]:
    """The sizes, their log-log slopes and whether they are as claimed; a picture in the folder."""
    lost = [row["name"] for row in rows if PLACES[0] not in row]
    if lost:
        return f"FAIL  diverged within 5 steps, and left no activations: {', '.join(lost)}", False
    axis = "width" if len({row["width"] for row in rows}) > 1 else "layers"
    sizes: dict[str, dict[int, np.ndarray]] = {}
    for kind in dict.fromkeys(row["name"].split("/")[0] for row in rows):
        own = [row for row in rows if row["name"].startswith(f"{kind}/")]
        found = {row[axis]: [r for r in own if r[axis] == row[axis]] for row in own}
        # Seeds are averaged as logarithms.
        sizes[kind] = {n: np.exp(np.mean([[np.log(r[p]) for p in PLACES] for r in rs], 0)) for n, rs in found.items()}
    lines, slopes = [], {}
    for kind, by_size in sizes.items():
        lines.append(f"{kind:10} {axis:>6}  " + "".join(f"{place:>13}" for place in PLACES))
        lines += [f"{'':10} {n:6}  " + "".join(f"{x:13.4g}" for x in by_size[n]) for n in by_size]
        slopes[kind] = np.polyfit(np.log(list(by_size)), np.log(list(by_size.values())), 1)[0]
        lines.append(f"{'':10} slope   " + "".join(f"{x:13.2f}" for x in slopes[kind]))
    passed = True
    for kind, found in slopes.items():
        extreme = np.max(found) if kind == "sp" else np.max(np.abs(found))
        good = bool(extreme > CONTROL if kind == "sp" else extreme <= LARGEST)
        wanted = f"above {CONTROL}, or the check is blind" if kind == "sp" else f"at most {LARGEST}"
        lines.append(f"{'PASS' if good else 'FAIL'}  {kind}: largest slope {extreme:.2f}, wanted {wanted}")
        passed &= good
    _plot(sizes, axis, folder / "coordcheck.png")
    return "\n".join(lines), passed


def _runs(module: Any, axis: str, values: tuple[int, ...]) -> list[Run]:
    return [
        dataclasses.replace(
            base,
            name=f"{kind}/{axis}{value}/seed{seed}",
            model=dataclasses.replace(base.model, **{axis: value}),
            schedule=Constant(peak=1e-2),
            optimizer=dataclasses.replace(base.optimizer, clip_norm=None),
            train=dataclasses.replace(base.train, steps=5, seed=seed),
            data=dataclasses.replace(base.data, seed=seed),
            evals=dataclasses.replace(base.evals, max_tokens=2048),
        )
        for base, kind in ((module.run(), module.run().model.parametrization), (module.sp(), "sp"))
        for value in values
        for seed in range(2)
    ]


def _plot(sizes: dict[str, dict[int, np.ndarray]], axis: str, file: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(sizes), figsize=(9, 3.6), sharey=True, squeeze=False)
    for panel, (kind, by_size) in zip(panels[0], sizes.items(), strict=True):
        for i, place in enumerate(PLACES):
            panel.plot(list(by_size), [x[i] for x in by_size.values()], "o-", label=place)
        panel.set(title=kind, xlabel=axis, xscale="log", yscale="log", xticks=list(by_size), xticklabels=list(by_size))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("mean |activation| after 5 steps")
    panels[0][-1].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
