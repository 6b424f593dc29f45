"""The one training loop: batches in, a finished or saved run out."""

import contextlib
import dataclasses
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm.core import keys, tree
from lm.core.errors import UsageError
from lm.objectives import carry as carries
from lm.parallel import hosts, options, rules
from lm.train import meters, offload, step
from lm.train.checkpoint import Checkpoints
from lm.train.ledger import Ledger
from lm.train.lock import RunLock
from lm.train.metrics import Metrics
from lm.train.progress import Display
from lm.train.run import Run
from lm.train.schedules import Plateau
from lm.train.step import State
from lm.train.stragglers import Stragglers
from lm.train.times import Times
from lm.train.watchdog import Watchdog

DONE, RESTART, SUSPICIOUS_RESULT = 0, 75, 17
AGREE_EVERY = 8  # Steps between the questions of several processes whether one was told to stop.


@dataclasses.dataclass
class Parts:
    """What the loop is given; it composes nothing itself."""

    batches: Iterator[dict[str, jax.Array]]
    checkpoints: Checkpoints
    ledger: Ledger
    metrics: Metrics
    display: Display
    lock: RunLock
    times: Times
    folder: str
    meta: dict[str, Any]  # Saved beside each state; val_losses are those that a schedule has followed.
    validate: Callable[[Any], Mapping[str, float]] | None = None  # Weights to figures of one row.
    sample: Callable[[Any, int], None] | None = None  # Weights and step to a file in samples/.
    profile: tuple[int, int] | None = None  # The first and last step of a trace.


def prepare(run: Run, mesh: jax.sharding.Mesh) -> tuple[State, Callable[[jax.Array], State], Callable]:
    """(the abstract state with its shardings, a function from a key to a new one, the jitted step).

    Runs of one process that differ in schedule, seeds and length alone get the same, compiled once.
    """
    train = run.train
    settings = train.accumulate, train.ema_decay, train.poison, train.noise_scale, train.offload_optimizer
    lanes = train.batch_size if run.data.order == "lanes" else None
    return _programs(run.model, run.objective, run.optimizer, mesh, *settings, lanes)


@functools.lru_cache(maxsize=4)
def _programs(
    model: Any,
    objective: Any,
    optimizer: Any,
    mesh: jax.sharding.Mesh,
    accumulate: int,
    ema_decay: float | None,
    poison: tuple[int, int] | None,
    noise_scale: bool,
    offload_optimizer: bool,
    lanes: int | None,
) -> tuple[State, Callable[[jax.Array], State], Callable]:
    spec = model.spec()
    transformation = optimizer.build(spec)

    carry_spec = None if lanes is None else carries.carry_spec(model, objective, lanes)

    def new(key: jax.Array) -> State:
        return step.initialize(spec, transformation, key, ema_decay is not None, carry_spec)

    abstract = jax.eval_shape(new, jax.random.key(0))
    places = step.shardings(spec, abstract, mesh, offload_optimizer, carry_spec)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
    update = None
    if offload_optimizer:
        update = offload.streamed(optimizer, spec, places.optimizer, mesh.shape["stage"])
    pure = step.make_step(
        model,
        objective,
        transformation,
        accumulate=accumulate,
        ema_decay=ema_decay,
        poison=poison,
        noise_scale=noise_scale,
        update=update,
        carry_spec=carry_spec,
    )
    whole, rows = NamedSharding(mesh, PartitionSpec()), rules.batch_sharding(mesh)
    jitted = jax.jit(
        pure,
        donate_argnums=0,
        in_shardings=(places, rows, whole, whole),
        out_shardings=(places, whole),
        compiler_options=options.of_mesh(mesh),
    )
    return abstract, jax.jit(new, out_shardings=places), jitted


def learning_rates(run: Run) -> np.ndarray:
    """The schedule's rate at each step, float32 [steps], before what evaluations make of it."""
    steps = run.train.steps
    return np.asarray(jnp.broadcast_to(run.schedule.build(steps)(jnp.arange(steps)), steps), np.float32)


def evaluated_weights(state: State) -> Any:
    """The average of the weights where the run keeps one, else the weights."""
    return state.params if state.ema is None else state.ema


def fit(run: Run, state: State, train_step: Callable, mesh: jax.sharding.Mesh, parts: Parts) -> tuple[State, int]:
    """Trains from `state` to the last step; returns the state and an exit code.

    DONE at the end; RESTART after SIGTERM or Ctrl-C, saved; SUSPICIOUS_RESULT after `train.max_skipped` steps
    in a row without finite numbers, with what is known about them in the ledger.
    """
    clock = _Clock(run, mesh)
    log = _Log(run, parts, clock)
    steps, first, times = run.train.steps, int(state.step) + 1, parts.times
    rates, key = learning_rates(run), keys.run_key(run.train.seed)
    lowered = _lowered(run, parts)
    if lowered < 1:
        parts.display.say(
            f"the learning rate is {lowered:g} of its peak, after {len(parts.meta['val_losses'])} evaluations"
        )
    parts.display.say(f"MFU counts 6 x matmul parameters and causal attention, {clock.convention}")
    watchdog = Watchdog(run.train.watchdog_s, parts.folder, parts.ledger, RESTART)
    stragglers = Stragglers(run.train.log_every, parts.ledger, parts.display.say)
    with _stop_signals() as stop, parts.display, _Trace(parts, watchdog) as trace, watchdog:
        for done in range(first, steps + 1):
            trace.before(done)
            batch = stragglers.next(parts.batches)
            times.move("data", stragglers.waited_s)
            times.enter("step")
            clock.see(batch)
            state, metrics = train_step(state, batch, rates[done - 1] * lowered, key)
            trace.after(done, state)
            log.take(done, metrics)
            watchdog.step(done)
            stragglers.step(done)
            with times.within("checkpoint"):
                parts.checkpoints.check()
            parts.display.advance(done)
            follows = isinstance(run.schedule, Plateau) and done % run.schedule.every_steps == 0
            evaluates = follows or done == steps or done % run.train.eval_every == 0
            stopping = done < steps and _agreed(stop.is_set() or parts.lock.lost, done)
            saves = done == steps or stopping or done % run.train.save_every == 0
            if evaluates or saves:
                log.flush()
            if log.skipped >= run.train.max_skipped:
                log.flush()
                with watchdog.paused(), times.within("other"):
                    _report_skips(run, state, parts, log.skipped)
                return state, SUSPICIOUS_RESULT
            if evaluates:
                with clock.paused(state), watchdog.paused(), times.within("evaluate"):
                    val_loss = _evaluate(parts, state, done)
            if follows:
                followed = hosts.broadcast(val_loss if math.isfinite(val_loss) else None)  # As JSON has it.
                parts.meta["val_losses"] = [*parts.meta["val_losses"], followed]
                before, lowered = lowered, _lowered(run, parts)
                if lowered < before and done < steps:
                    parts.display.say(f"step {done}  gained too little: the learning rate is {lowered:g} of its peak")
            if saves:
                if hosts.broadcast(parts.lock.lost):
                    raise UsageError("another process took the run folder over (--steal): stopped without saving")
                with clock.paused(state), watchdog.paused(), times.within("checkpoint"):
                    parts.checkpoints.save(done, state, parts.meta)
            if saves or done == first:
                times.write("time", step=done)
            if stopping:
                with watchdog.paused(), times.within("checkpoint"):
                    parts.checkpoints.wait()
                parts.display.say(f"saved step {done}; the same command continues from there")
                return state, RESTART
        with watchdog.paused(), times.within("checkpoint"):
            parts.checkpoints.wait()
    return state, DONE


def _agreed(wants_to_stop: bool, done: int) -> bool:
    """Whether any process wants to stop; several ask one another every few steps, because asking waits for all."""
    if jax.process_count() == 1:
        return wants_to_stop
    return done % AGREE_EVERY == 0 and hosts.any_process(wants_to_stop)


class _Clock:
    """Tokens a second of training alone: compiling, evaluating and saving are left out."""

    def __init__(self, run: Run, mesh: jax.sharding.Mesh):
        self._model, self._rows, self._tokens = run.model, run.train.batch_size, run.train.seq_len
        self._flops = 0.0
        self._peak, self.convention = meters.peak_flops(list(mesh.devices.flat))
        self._step: int | None = None
        self._since = 0.0

    def see(self, batch: Mapping[str, jax.Array]) -> None:
        """Takes the work of a row from the first batch: all have the same shapes."""
        if not self._flops:
            self._flops = meters.flops_per_row(self._model, self._model.spec(), batch)

    def lap(self, done: int) -> dict[str, float]:
        """The rates since the lap before; nothing the first time, which paid for the compilation."""
        now, last = time.monotonic(), self._step
        rates = {}
        if last is not None and done > last:
            rate = self._rows * (done - last) / (now - self._since)
            rates = {"tokens_per_second": rate * self._tokens, "mfu": rate * self._flops / self._peak}
        self._step, self._since = done, now
        return rates

    @contextlib.contextmanager
    def paused(self, state: State) -> Iterator[None]:
        jax.block_until_ready(state)
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start


class _Log:
    """Rows of metrics, fetched one step late so that the device never waits for Python."""

    def __init__(self, run: Run, parts: Parts, clock: _Clock):
        self._every, self._parts, self._clock = run.train.log_every, parts, clock
        self._waiting: tuple[int, dict[str, jax.Array]] | None = None
        self._noise = meters.NoiseScale()
        self.skipped = 0

    def take(self, done: int, metrics: dict[str, jax.Array]) -> None:
        self.flush()
        self._waiting = done, metrics

    def flush(self) -> None:
        if self._waiting is None:
            return
        (done, metrics), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.skipped = int(values.pop("skipped"))
        self._noise.take(values)
        if self.skipped:
            self._parts.ledger.write("skipped", step=done, in_a_row=self.skipped)
            self._parts.display.say(f"step {done}: loss or gradient is not finite; the update was skipped")
        if done == 1 or done % self._every == 0:
            values |= self._clock.lap(done) | self._noise.lap()
            self._parts.metrics.write(done, **values)
            self._parts.display.log(done, values)


def _lowered(run: Run, parts: Parts) -> np.float32:
    """What the evaluations so far multiply the schedule's rate by."""
    schedule = run.schedule
    return np.float32(schedule.lowered(parts.meta["val_losses"]) if isinstance(schedule, Plateau) else 1.0)


def _evaluate(parts: Parts, state: State, done: int) -> float:
    """Validates and samples; the loss on the validation split, NaN where there is none."""
    weights, val_loss = evaluated_weights(state), math.nan
    if parts.validate is not None:
        row = dict(parts.validate(weights))
        val_loss = row["val_loss"]
        parts.metrics.write(done, **row)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in row.items())
        parts.display.say(f"step {done}  {shown}")
    if parts.sample is not None:
        parts.sample(weights, done)
    return val_loss


def _report_skips(run: Run, state: State, parts: Parts, skipped: int) -> None:
    parts.checkpoints.wait()
    done, end = int(state.step), int(state.examples)
    norms = {path: float(jax.numpy.linalg.norm(x.ravel())) for path, x in tree.flatten(state.params).items()}
    parts.ledger.write(
        "not_finite",
        step=done,
        in_a_row=skipped,
        examples=[end - run.train.batch_size * skipped, end],
        seed=run.train.seed,
        parameter_norms=norms,
    )
    parts.display.say(
        f"stopped at step {done}: {skipped} steps in a row had no finite loss or gradient; the ledger has the "
        "batches and norms. Lower schedule.peak, or see whether the data is damaged."
    )


class _Trace:
    """A profiler trace of the steps that were asked for, or of those of them that this start still runs."""

    def __init__(self, parts: Parts, watchdog: Watchdog):
        self._parts, self._watchdog, self._on = parts, watchdog, False
        self._folder = os.path.join(parts.folder, "profile")
        self._first, self._last = parts.profile or (1, 0)

    def before(self, done: int) -> None:
        if not self._on and self._first <= done <= self._last:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, done: int, state: State) -> None:
        if self._on and done == self._last:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        with self._watchdog.paused(), self._parts.times.within("other"):
            jax.profiler.stop_trace()
        self._on = False
        self._parts.display.say(f"a trace of steps up to {self._last} is in {self._folder}")

    def __enter__(self) -> "_Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            self._stop()


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and the first Ctrl-C set; a second Ctrl-C acts as it would without us.

    Schedulers may send SIGTERM to a process and to its parent, which sends it on: it comes twice, and once counts.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def request(number, frame):
        event.set()
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, request)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
