"""Time and memory of one layer's attention over the length: full in blocks, FAVOR+, and hashing, with their gradients.

  python -m experiments.bench.attention --lengths=1024,4096,32768

Causal, one row, float32. Times are medians of turns; memory is what the compiled program has for temporaries.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags

from lm.layers import favor, lsh
from lm.layers.attention import Form, attention

_LENGTHS = flags.DEFINE_list("lengths", ["1024", "2048", "4096", "8192", "16384", "32768"], "tokens of the row")
_HEADS = flags.DEFINE_integer("heads", 4, "heads", lower_bound=1)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "the width of a head", lower_bound=1)
_FEATURES = flags.DEFINE_integer("features", 256, "of FAVOR+", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 4, "of hashing", lower_bound=1)
_MOST_MIB = flags.DEFINE_float("most_mib", 8192, "of temporaries: what takes more is not run", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 3, "of each kind", lower_bound=1)


def kinds() -> dict[str, Callable[..., jax.Array]]:
    """{name: a function of q, k and v [B, L, H, C]}; hashing takes q for k as well."""
    form, hashing = favor.Favor(features=_FEATURES.value), lsh.LSH(rounds=_ROUNDS.value)

    def full(q, k, v):
        return attention(Form(causal=True, kernel="blocks"), q, k, v)

    def favored(q, k, v):
        return favor.attend(form, form.draw(q.shape[-1]), q, k, v, causal=True)[0]

    def hashed(q, k, v):
        length, heads, width = q.shape[1:]
        factors = hashing.factors(length, length)
        rotations = lsh.draw_rotations(hashing, factors, heads, width, jax.random.key(0))
        return lsh.lsh_attention(hashing, q, v, lsh.hash_buckets(factors, q, rotations), causal=True)

    return {"full": full, "favor": favored, "lsh": hashed}


def measured(attend: Callable[..., jax.Array], arrays: tuple[Any, ...]) -> tuple[float, float]:
    """(milliseconds of a loss and its gradients, NaN where it is not run, and MiB of temporaries)."""
    gradients = jax.jit(jax.grad(lambda q, k, v: (attend(q, k, v) ** 2).sum(), (0, 1, 2)))
    compiled = gradients.lower(*arrays).compile()
    mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
    if mib > _MOST_MIB.value:
        return math.nan, mib
    times = []
    for _ in range(_TURNS.value):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times), mib


def main(argv: list[str]) -> None:
    """Prints the table, a row as soon as it is measured."""
    columns = [f"{name}: {unit}" for name in kinds() for unit in ("ms", "MiB")]
    print("length".rjust(8), *(column.rjust(12) for column in columns))
    rng = np.random.default_rng(0)
    for length in map(int, _LENGTHS.value):
        shape = 1, length, _HEADS.value, _HEAD_DIM.value
        arrays = tuple(jax.device_put(rng.standard_normal(shape, np.float32)) for _ in range(3))
        cells = [cell for attend in kinds().values() for cell in measured(attend, arrays)]
        print(f"{length:8}", *(("-" if math.isnan(x) else f"{x:,.0f}").rjust(12) for x in cells), flush=True)


if __name__ == "__main__":
    app.run(main)
