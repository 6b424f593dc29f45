"""A run's step on the chip that is here, beside what `lm plan` says of it.

  python -m experiments.bench.plan --experiment=gpt2_124m --hardware=h200:1 --set=train.batch_size=32 \
      --set=train.accumulate=1

Random tokens; the time is the median of turns of several steps that are waited for together. The last line is JSON.
"""

import json
import statistics
import time

import jax
import numpy as np
from absl import app, flags

from lm.core import keys
from lm.main.flags import load_run
from lm.main.plan import with_vocabulary
from lm.parallel import chips, rules
from lm.parallel.mesh import under
from lm.plan import hardware, program, roofline
from lm.train import loop, meters

_EXPERIMENT = flags.DEFINE_string("experiment", None, "NAME[:VARIANT]", required=True)
_SET = flags.DEFINE_multi_string("set", [], "PATH=VALUE")
_HARDWARE = flags.DEFINE_string("hardware", None, "what is here, such as h200:1", required=True)
_TURNS = flags.DEFINE_integer("turns", 5, "turns", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 5, "steps a turn", lower_bound=1)
_WORDS = "tokens_BL", "targets_BL"


def main(argv: list[str]) -> None:
    """Prints the JSON line."""
    named = hardware.parse(_HARDWARE.value)
    if named.chip is None or named.chip != chips.of_device(jax.devices()[0]) or named.devices != jax.device_count():
        here = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        raise app.UsageError(f"--hardware={_HARDWARE.value} is not what is here, {here}: name its chips, as in h200:1")
    run = with_vocabulary(load_run(_EXPERIMENT.value, _SET.value), None)
    mesh = run.mesh.build()
    planned = program.compile_step(run, mesh)
    line = roofline.roofline(run, named, run.mesh.sizes(mesh.size), program.batch_shapes(run))

    _, new, train_step = loop.prepare(run, mesh)
    state, train_step = new(jax.random.key(0)), under(mesh, train_step)
    rng = np.random.default_rng(0)
    words = run.model.valid_vocab_size or run.model.vocab_size
    batch = {
        name: rng.integers(0, words, x.shape, x.dtype) if name in _WORDS else np.ones(x.shape, x.dtype)
        for name, x in program.batch_shapes(run).items()
    }
    batch = jax.device_put(batch, rules.batch_sharding(mesh))
    key, rate = keys.run_key(0), np.float32(1e-4)
    times = []
    for _ in range(_TURNS.value + 1):
        start = time.perf_counter()
        for _ in range(_STEPS.value):
            state, metrics = train_step(state, batch, rate, key)
        loss = float(jax.block_until_ready(metrics)["loss"])
        times.append((time.perf_counter() - start) / _STEPS.value)
    step_s = statistics.median(times[1:])  # The first turn compiles.
    tokens = run.train.batch_size * run.train.seq_len
    flops = meters.flops_per_row(run.model, run.model.spec(), batch) * run.train.batch_size
    peak, _ = meters.peak_flops(jax.devices())
    used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    result = {
        "device": jax.devices()[0].device_kind,
        "step_ms": {"measured": round(1e3 * step_s, 2), "planned": round(1e3 * line.step_s, 2)},
        "tokens_per_second": {"measured": round(tokens / step_s), "planned": round(line.tokens_per_second)},
        "mfu": {"measured": round(flops / step_s / peak, 4), "planned": round(line.mfu, 4)},
        "memory_gb": {"peak": used and round(used / 1e9, 2), "planned": round(planned.total_bytes / 1e9, 2)},
        "planned_parts_ms": {part: round(1e3 * s, 2) for part, s in line.seconds.items()},
        "loss": round(loss, 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
