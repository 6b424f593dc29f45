"""Optimizers: frozen configs that turn a parameter spec into an optax transformation.

What a transformation returns is a direction; the step multiplies it by minus the schedule's learning rate.
Which parameters decay, and which two sides a matrix has, is read from the spec and never from an array's rank.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lm.core import params, tree
from lm.core.errors import UsageError, check_positive
from lm.core.params import Param

STACK_AXES = ("layers", "experts")
DECAYED_ROLES = ("embedding", "matrix", "head", "router")


@dataclasses.dataclass(frozen=True)
class Group:
    """Other settings for some parameters: those of one role, or whose path the regular expression finds."""

    match: str
    learning_rate: float = 1.0  # A multiplier of the schedule.
    weight_decay: float | None = None  # None keeps the optimizer's.

    def selects(self, path: str, p: Param) -> bool:
        return p.role == self.match if self.match in params.ROLES else re.search(self.match, path) is not None


def _of_trained(build: Callable[[Any, Any], optax.GradientTransformation]) -> Callable:
    """`build` for the trainable parameters alone; the others get zeros and have no slots."""

    @functools.wraps(build)
    def whole(self, spec: Any) -> optax.GradientTransformation:
        trained = [path for path, p in tree.flatten(spec).items() if p.trainable]

        def pick(t):
            flat = tree.flatten(t)
            return tree.unflatten({path: flat[path] for path in trained})

        def update(updates, state, weights):
            moved, state = inner.update(pick(updates), state, pick(weights))
            still = tree.flatten(jax.tree.map(jnp.zeros_like, updates))
            return tree.unflatten(still | tree.flatten(moved)), state

        inner = build(self, pick(spec))
        return optax.GradientTransformation(lambda weights: inner.init(pick(weights)), update)

    return whole


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101)."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    moment_dtype: str | None = None
    groups: tuple[Group, ...] = ()

    def __post_init__(self):
        _check(self, b1=self.b1, b2=self.b2)

    @_of_trained
    def build(self, spec: Any) -> optax.GradientTransformation:
        """The transformation for parameters of this spec."""
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moment_dtype)
        return _assemble(self, spec, _with_own_eps(spec, adam))


@dataclasses.dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, with momentum where it is above zero."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    groups: tuple[Group, ...] = ()

    def __post_init__(self):
        _check(self, momentum=self.momentum)

    @_of_trained
    def build(self, spec: Any) -> optax.GradientTransformation:
        """The transformation for parameters of this spec."""
        _check_unscaled(self, spec)
        return _assemble(self, spec, optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity())


@dataclasses.dataclass(frozen=True)
class Lion:
    """The sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675, program 1).

    Learning rates and decay carry over between widths as Adam's do, as those of any update of single entries of a size
    that gradients do not set (Yang and Littwin 2023, 2308.01814); it has no epsilon.
    """

    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 1.0
    clip_norm: float | None = 1.0
    groups: tuple[Group, ...] = ()

    def __post_init__(self):
        _check(self, b1=self.b1, b2=self.b2)

    @_of_trained
    def build(self, spec: Any) -> optax.GradientTransformation:
        """The transformation for parameters of this spec."""
        return _assemble(self, spec, optax.scale_by_lion(self.b1, self.b2))


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Second moments kept as one row and one column a matrix (Shazeer and Stern 2018, arXiv 1804.04235).

    Each matrix of a stack is factored, clipped and scaled on its own; one with a side below 128 is kept whole, as
    all are with `factored=False` (PaLM, 2204.02311, section 5). `momentum` averages the updates.
    """

    decay_rate: float = 0.8
    factored: bool = True
    momentum: float | None = None
    update_clip: float = 1.0
    scale_parameter: bool = True  # Steps relative to each parameter's own root mean square.
    weight_decay: float = 0.0
    clip_norm: float | None = None
    groups: tuple[Group, ...] = ()

    def __post_init__(self):
        _check(self, decay_rate=self.decay_rate, momentum=self.momentum or 0.0)
        check_positive(**{"optimizer.update_clip": self.update_clip})

    @_of_trained
    def build(self, spec: Any) -> optax.GradientTransformation:
        """The transformation for parameters of this spec."""
        _check_unscaled(self, spec)
        core = optax.chain(
            optax.scale_by_factored_rms(factored=self.factored, decay_rate=self.decay_rate),
            optax.clip_by_block_rms(self.update_clip),
            optax.scale_by_param_block_rms() if self.scale_parameter else optax.identity(),
            optax.identity() if self.momentum is None else optax.ema(self.momentum, debias=False),
        )
        return _assemble(self, spec, _per_matrix(spec, core))


@dataclasses.dataclass(frozen=True)
class Lamb:
    """Adam, with each matrix's step, decay included, as long as the matrix (You et al. 2019, arXiv 1904.00962).

    Each layer of a stack is a matrix of its own. Vectors step as Adam has it, as in the authors' code.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    groups: tuple[Group, ...] = ()

    def __post_init__(self):
        _check(self, b1=self.b1, b2=self.b2)

    @_of_trained
    def build(self, spec: Any) -> optax.GradientTransformation:
        """The transformation for parameters of this spec."""
        _check_unscaled(self, spec)
        return _assemble(self, spec, optax.scale_by_adam(self.b1, self.b2, self.eps), _as_long_as_weights(spec))


@dataclasses.dataclass(frozen=True)
class Muon:
    """Orthogonalised momentum for matrices, Adam for all else (Jordan et al. 2024).

    Matrices' updates get the root mean square of Adam's, 0.2 (Liu et al. 2025, arXiv 2502.16982, eq. 4), so
    that one schedule serves both parts.
    """

    momentum: float = 0.95
    newton_schulz_steps: int = 5
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    groups: tuple[Group, ...] = ()

    def __post_init__(self):
        _check(self, momentum=self.momentum, b1=self.b1, b2=self.b2)

    @_of_trained
    def build(self, spec: Any) -> optax.GradientTransformation:
        """The transformation for parameters of this spec."""
        _check_unscaled(self, spec)
        labels = params.map_spec(lambda p: "muon" if p.role == "matrix" else "adam", spec)
        matrices = params.map_spec(lambda p: _muon_sides(p) if p.role == "matrix" else optax.MaskedNode(), spec)
        scales = params.map_spec(lambda p: _muon_scale(p) if p.role == "matrix" else 1.0, spec)
        muon = contrib.scale_by_muon(
            ns_steps=self.newton_schulz_steps, beta=self.momentum, weight_dimension_numbers=matrices
        )
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return _assemble(
            self, spec, optax.chain(optax.partition({"muon": muon, "adam": adam}, labels), _scaled(scales))
        )


@dataclasses.dataclass(frozen=True)
class Maximization:
    """The M-step of expectation-maximisation, for objectives whose gradient is minus the expected counts per token.

    Weights are logarithms of counts, which the model normalises. At a learning rate of 1 step t (from 0) mixes them
    with those of its batch, of which it takes the share (t + 1)^-power: with power 0 (Baum et al. 1970) all of it,
    above 1/2 and up to 1 the running mean of stepwise EM (Cappe and Moulines 2009, 0712.4273; Liang and Klein 2009,
    whose t + 2 would keep some of the random start). Another rate moves the logarithms by so much of that: below 2
    over-relaxation (Salakhutdinov and Roweis 2003). `prior` is added to a table's counts, spread evenly over it, as a
    share of their sum: the maximum a posteriori under a Dirichlet prior.
    """

    power: float = 0.0
    prior: float = 0.0

    gradient = "counts"  # What it needs of an objective, see lm.train.run.resolve.
    weight_decay, clip_norm = 0.0, None  # Asked of every optimizer: it has neither.

    def __post_init__(self):
        if self.power and not 0.5 < self.power <= 1:
            raise UsageError(f"optimizer.power={self.power} must be above 0.5 and at most 1; 0 keeps no old counts")
        if self.prior < 0:
            raise UsageError(f"optimizer.prior={self.prior} must not be negative")

    @_of_trained
    def build(self, spec: Any) -> optax.GradientTransformation:
        """The transformation for parameters of this spec."""
        least = jnp.finfo(jnp.float32).tiny  # A count of nothing, whose logarithm stays finite.

        def update(gradients, step, weights):
            share = (step + 1.0) ** -self.power

            def direction(gradient, weight):
                counts = -gradient - self.prior * jnp.mean(gradient)
                mixed = (1 - share) * jnp.exp(weight) + share * counts
                return weight - jnp.log(jnp.maximum(mixed, least))

            return jax.tree.map(direction, gradients, weights), step + 1

        return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)


def _check(optimizer: Any, **decays: float) -> None:
    for name, value in decays.items():
        if not 0 <= value < 1:
            raise UsageError(f"optimizer.{name}={value} must be at least 0 and below 1")
    if optimizer.clip_norm is not None:
        check_positive(**{"optimizer.clip_norm": optimizer.clip_norm})


def _check_unscaled(optimizer: Any, spec: Any) -> None:
    if any((p.rate, p.decay, p.eps) != (1, 1, 1) for p in tree.flatten(spec).values()):
        raise UsageError(
            f"optimizer={type(optimizer).__name__} has no multipliers for a model's parametrization: "
            "use AdamW or Lion, or model.parametrization=sp"
        )


def _assemble(
    config: Any, spec: Any, core: optax.GradientTransformation, last: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """Clipping, the core, decoupled decay by role, `last`, and the multipliers of spec and groups, in that order."""
    flat = tree.flatten(spec)
    decay = {path: config.weight_decay if p.role in DECAYED_ROLES else 0.0 for path, p in flat.items()}
    rate = {path: p.rate for path, p in flat.items()}
    for group in config.groups:
        selected = [path for path, p in flat.items() if group.selects(path, p)]
        if not selected:
            raise UsageError(f"optimizer group {group.match!r} selects no parameter; paths are {', '.join(flat)}")
        for path in selected:
            rate[path] *= group.learning_rate
            decay[path] = decay[path] if group.weight_decay is None else group.weight_decay
    decay = {path: coefficient * flat[path].decay for path, coefficient in decay.items()}
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        core,
        _decayed(tree.unflatten(decay)) if any(decay.values()) else optax.identity(),
        last or optax.identity(),
        _scaled(tree.unflatten(rate)),
    )


def _decayed(coefficients: Any) -> optax.GradientTransformation:
    def add(updates, weights):
        return jax.tree.map(lambda c, u, w: u + c * w if c else u, coefficients, updates, weights)

    return optax.stateless(add)


def _with_own_eps(spec: Any, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """`adam` with its epsilon times each parameter's: the same step as of a gradient divided by that."""
    scaled = _scaled(params.map_spec(lambda p: 1 / p.eps, spec))

    def update(updates, state, weights):
        return adam.update(scaled.update(updates, optax.EmptyState(), weights)[0], state, weights)

    return optax.GradientTransformation(adam.init, update)


def _as_long_as_weights(spec: Any) -> optax.GradientTransformation:
    def one(p, update, weights):
        if p.role not in DECAYED_ROLES:
            return update
        axes = tuple(i for i, axis in enumerate(p.axes) if axis not in STACK_AXES)
        wanted, found = (jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True)) for x in (weights, update))
        return update * jnp.where((wanted > 0) & (found > 0), wanted / jnp.where(found > 0, found, 1), 1)

    return optax.stateless(lambda updates, weights: params.map_spec(one, spec, updates, weights))


def _scaled(factors: Any) -> optax.GradientTransformation:
    if all(f == 1 for f in jax.tree.leaves(factors)):
        return optax.identity()
    return optax.stateless(lambda updates, _: jax.tree.map(lambda f, u: f * u, factors, updates))


def _sides(p: Param) -> tuple[list[int], list[int], list[int]]:
    """Positions of the stacked, the contracted and the remaining axes; a vector has only the last."""
    stacked = [i for i, axis in enumerate(p.axes) if axis in STACK_AXES]
    rest = [i for i in range(len(p.axes)) if i not in stacked]
    # An embedding contracts nothing, but it is a product with one-hot rows all the same.
    contracted = p.axes[rest[0] : rest[0] + 1] if p.role == "embedding" else p.inputs
    inputs = [i for i in rest if p.axes[i] in contracted]
    return stacked, inputs, [i for i in rest if i not in inputs]


def _muon_sides(p: Param) -> contrib.MuonDimensionNumbers:
    _, inputs, outputs = _sides(p)
    return contrib.MuonDimensionNumbers(tuple(inputs), tuple(outputs))


def _muon_scale(p: Param) -> float:
    _, inputs, outputs = _sides(p)
    return 0.2 * math.sqrt(max(math.prod(p.shape[i] for i in side) for side in (inputs, outputs)))


def _per_matrix(spec: Any, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` applied to each matrix, or vector, of each stacked leaf on its own."""

    def view(p: Param, x: jax.Array) -> jax.Array:
        stacked, inputs, outputs = _sides(p)
        rows, columns = (math.prod(p.shape[i] for i in side) for side in (inputs, outputs))
        matrix = (rows, columns) if inputs else (columns,)
        return jnp.transpose(x, stacked + inputs + outputs).reshape(-1, *matrix)

    def unview(p: Param, x: jax.Array) -> jax.Array:
        order = sum(_sides(p), [])
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return jnp.transpose(x.reshape([p.shape[i] for i in order]), inverse)

    def init(weights):
        return params.map_spec(lambda p, w: jax.vmap(inner.init)(view(p, w)), spec, weights)

    def update(updates, state, weights):
        def one(p, u, s, w):
            new, s = jax.vmap(inner.update)(view(p, u), s, view(p, w))
            return unview(p, new), s

        pairs = params.map_spec(one, spec, updates, state, weights)
        return tuple(params.map_spec(lambda _, pair, i=i: pair[i], spec, pairs) for i in range(2))

    return optax.GradientTransformation(init, update)


Optimizer = AdamW | SGD | Lion | Adafactor | Lamb | Muon | Maximization
