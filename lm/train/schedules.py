"""Learning-rate schedules: frozen configs that turn into optax schedules."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import optax

from lm.core.errors import UsageError, check_positive


@dataclasses.dataclass(frozen=True)
class Constant:
    """`peak` after a linear warm-up from peak / (warmup_steps + 1)."""

    peak: float = 1e-3
    warmup_steps: int = 0

    def __post_init__(self):
        _check(self)

    def build(self, steps: int) -> optax.Schedule:
        """step -> learning rate, for a run of `steps`; a warm-up longer than the run is cut to it."""
        return _warmed_up(self, steps, optax.constant_schedule(self.peak))


@dataclasses.dataclass(frozen=True)
class Linear:
    """Falls in a straight line from `peak` to `final` at the last step, after the warm-up."""

    peak: float = 1e-3
    final: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self):
        _check(self)

    def build(self, steps: int) -> optax.Schedule:
        """step -> learning rate, for a run of `steps`."""
        return _warmed_up(self, steps, optax.linear_schedule(self.peak, self.final, _after_warmup(self, steps)))


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Half a cosine from `peak` to `final` at the last step (Loshchilov and Hutter 2016, arXiv 1608.03983)."""

    peak: float = 1e-3
    final: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self):
        _check(self)

    def build(self, steps: int) -> optax.Schedule:
        """step -> learning rate, for a run of `steps`."""
        decay = optax.cosine_decay_schedule(self.peak, _after_warmup(self, steps), alpha=self.final / self.peak)
        return _warmed_up(self, steps, decay)


@dataclasses.dataclass(frozen=True)
class InverseSqrt:
    """peak * sqrt(warmup_steps / step) after the warm-up (Vaswani et al. 2017, arXiv 1706.03762, section 5.3).

    With `hold` the rate stands at `peak` until then instead of rising (T5, 1910.10683, section 3.1.2; PaLM).
    """

    peak: float = 1e-3
    warmup_steps: int = 4000
    hold: bool = False

    def __post_init__(self):
        _check(self)
        check_positive(warmup_steps=self.warmup_steps)

    def build(self, steps: int) -> optax.Schedule:
        """step -> learning rate, for a run of `steps`; a cut warm-up shortens the timescale with it."""
        warmup = _warmup_steps(self, steps)
        if self.hold:
            return lambda step: self.peak * (jnp.maximum(step, warmup) / warmup) ** -0.5
        return _warmed_up(self, steps, lambda step: self.peak * (1 + jnp.maximum(step, 0) / warmup) ** -0.5)


@dataclasses.dataclass(frozen=True)
class WSD:
    """Warm-up, stable at `peak`, then linear decay to `final` over the last `decay_fraction` of the run.

    Hu et al. 2024 (MiniCPM, arXiv 2404.06395), with the linear decay of Haegele et al. 2024 (arXiv 2405.18392).
    """

    peak: float = 1e-3
    final: float = 0.0
    warmup_steps: int = 0
    decay_fraction: float = 0.2

    def __post_init__(self):
        _check(self)
        if not 0 <= self.decay_fraction <= 1:
            raise UsageError(f"schedule.decay_fraction={self.decay_fraction} must be between 0 and 1")

    def build(self, steps: int) -> optax.Schedule:
        """step -> learning rate, for a run of `steps`."""
        total = _after_warmup(self, steps)
        decay_steps = max(1, round(steps * self.decay_fraction)) if self.decay_fraction else 0
        decay_steps = min(decay_steps, total)
        stable = optax.constant_schedule(self.peak)
        decay = optax.linear_schedule(self.peak, self.final, max(1, decay_steps))
        after = optax.join_schedules([stable, decay], [total - decay_steps]) if decay_steps else stable
        return _warmed_up(self, steps, after)


@dataclasses.dataclass(frozen=True)
class StepDecay:
    """`peak` for `first_steps`, then times `factor` at once and after every `every_steps` more (Zaremba et al. 2014,
    1409.2329: halved after each epoch from the fifth on).
    """

    peak: float = 1.0
    factor: float = 0.5
    first_steps: int = 1000
    every_steps: int = 1000
    warmup_steps: int = 0

    def __post_init__(self):
        _check(self)
        check_positive(**{f"schedule.{name}": getattr(self, name) for name in ("factor", "first_steps", "every_steps")})

    def build(self, steps: int) -> optax.Schedule:
        """step -> learning rate, for a run of any number of steps."""
        decay = optax.exponential_decay(
            self.peak * self.factor, self.every_steps, self.factor, self.first_steps, staircase=True
        )
        return _warmed_up(self, steps, lambda step: jnp.where(step < self.first_steps, self.peak, decay(step)))


@dataclasses.dataclass(frozen=True)
class Plateau:
    """`peak`, after the warm-up, times `factor` after each evaluation that finds perplexity on the validation split
    less than `gain` below that of the one before. It evaluates every `every_steps`; other evaluations do not count.

    The rule of Kim et al. 2016 (1508.06615, "Optimization"), whose code leaves out the first of these comparisons.
    Perplexity is e to val_loss. The losses so far are saved with every checkpoint.
    """

    peak: float = 1.0
    factor: float = 0.5
    gain: float = 1.0
    every_steps: int = 1000
    warmup_steps: int = 0

    def __post_init__(self):
        _check(self)
        check_positive(**{"schedule.every_steps": self.every_steps})
        if not 0 < self.factor < 1:
            raise UsageError(f"schedule.factor={self.factor} must be between 0 and 1")

    def build(self, steps: int) -> optax.Schedule:
        """step -> learning rate of a run whose every evaluation gains enough."""
        return _warmed_up(self, steps, optax.constant_schedule(self.peak))

    def lowered(self, losses: Sequence[float | None]) -> float:
        """What the rate is multiplied by after evaluations with these losses, nats a token; None, one that was not
        finite, gains too little."""
        with np.errstate(over="ignore", invalid="ignore"):  # Of a run that diverges.
            gains = -np.diff(np.exp(np.array(losses, float)))
        return self.factor ** int((~(gains >= self.gain)).sum())


Schedule = Constant | Linear | Cosine | InverseSqrt | WSD | StepDecay | Plateau


def _check(schedule) -> None:
    check_positive(**{"schedule.peak": schedule.peak})
    if schedule.warmup_steps < 0:
        raise UsageError(f"schedule.warmup_steps={schedule.warmup_steps} must not be negative")


def _warmup_steps(schedule, steps: int) -> int:
    return min(schedule.warmup_steps, steps)


def _after_warmup(schedule, steps: int) -> int:
    return max(1, steps - _warmup_steps(schedule, steps))


def _warmed_up(schedule, steps: int, after: optax.Schedule) -> optax.Schedule:
    # The first step already moves, at peak / (warmup + 1), as nanoGPT's does.
    warmup = _warmup_steps(schedule, steps)
    if not warmup:
        return after
    ramp = optax.linear_schedule(schedule.peak / (warmup + 1), schedule.peak, warmup)
    return optax.join_schedules([ramp, after], [warmup])
