"""A run's own training step, compiled for devices that need not exist, and what the compiler says of its memory."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core import keys, quiet
from lm.data.stream import Stream
from lm.parallel import rules
from lm.parallel.mesh import under
from lm.train import loop, offload
from lm.train.run import resolve

DOCUMENT_TOKENS = 512  # Of the text that stands in for a corpus: its content decides nothing of a program.
_UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled step: bytes a device by what they hold, seconds that it took, its text where it can be read.

    `memory` has "parameters", "optimizer", "other state" and "batch", which live throughout, "gradients", which are as
    large as the parameters, and "activations and temporaries", the rest of what the step allocates. `host` is what lies
    in the memory of the device's host instead.
    """

    memory: dict[str, float]
    host: dict[str, float]
    donated: bool | None  # Every byte of the state is given to the step; not known of a program that does not fit.
    lower_s: float
    compile_s: float
    text: str | None

    @property
    def total_bytes(self) -> float:
        """At the step's peak."""
        return sum(self.memory.values())


def sized(run: Any, vocab_size: int) -> Any:
    """The run as it would be on a corpus whose tokenizer has `vocab_size` ids."""
    return resolve(run, _Ids(vocab_size))


def batch_shapes(run: Any, mesh: jax.sharding.Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of one global batch, from the run's own objective."""
    stream = Stream(_Blank(run.model.vocab_size), run.objective, run.train.seq_len)  # type: ignore[arg-type]
    row = stream.rows(0, 1)
    place = None if mesh is None else rules.batch_sharding(mesh)
    size = run.train.batch_size
    return {k: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=place) for k, x in row.items()}


def compile_step(run: Any, mesh: jax.sharding.Mesh) -> Program:
    """Lowers and compiles the jitted step of lm.train.loop for the mesh's devices."""
    state, _, step = loop.prepare(run, mesh)
    batch = batch_shapes(run, mesh)
    rate, key = jax.ShapeDtypeStruct((), jnp.float32), jax.eval_shape(lambda: keys.run_key(0))
    lower = under(mesh, step.lower, run.mesh)  # type: ignore[attr-defined]  # It is jitted.
    compiled = compile_timed(lambda: lower(state, batch, rate, key), _bytes((state, batch)))
    held = {name: float(_bytes(part)) for name, part in (("parameters", state.params), ("optimizer", state.optimizer))}
    held["other state"] = float(_bytes(state)) - sum(held.values())
    held["batch"] = float(_bytes(batch))
    # On a CPU, whose memory is that of its host, the compiler says that nothing is there.
    away = [x for x in jax.tree.leaves(state.optimizer) if x.sharding.memory_kind == offload.HOST]
    host = {
        "optimizer": float(_bytes(away)) if compiled.host_given_bytes else 0.0,
        "activations": compiled.host_temporary_bytes,
    }
    held["optimizer"] -= host["optimizer"]
    gradients = min(held["parameters"], compiled.temporary_bytes)
    memory = held | {
        "gradients": gradients,
        "activations and temporaries": compiled.temporary_bytes - gradients,
        "program": compiled.code_bytes,
    }
    # Scalars may be returned beside; the state itself must not be there twice.
    return compiled.program(memory, 0.99 * _bytes((state.params, state.optimizer)), host)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says; where it gave up for want of memory, the temporaries that it at least needs."""

    temporary_bytes: float
    code_bytes: float
    donated_bytes: float | None
    text: str | None
    lower_s: float
    compile_s: float
    host_given_bytes: float = 0.0
    host_temporary_bytes: float = 0.0

    def program(self, memory: dict[str, float], state_bytes: float, host: dict[str, float] | None = None) -> Program:
        donated = None if self.donated_bytes is None else self.donated_bytes >= state_bytes
        host = {name: size for name, size in (host or {}).items() if size}
        return Program(memory, host, donated, self.lower_s, self.compile_s, self.text)


def compile_timed(lower: Callable[[], Any], given_bytes: float) -> Compiled:
    """Lowers and compiles a program to which so many bytes are given, with the seconds that it takes."""
    started = time.monotonic()
    lowered = lower()
    lower_s = time.monotonic() - started
    try:
        with quiet.libraries():  # Its warnings are about memory, of which a plan says more.
            executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # A TPU's compiler makes no program that does not fit. What it calls temporaries counts what is given too: seen
        # of programs that it makes for a chip with more memory.
        needed = re.search(r"HLO temporaries \(([\d.]+)([MGT])\)", str(error))
        if needed is None:
            raise
        temporary_bytes = max(0.0, float(needed[1]) * _UNITS[needed[2]] - given_bytes)
        return Compiled(temporary_bytes, 0.0, None, None, lower_s, time.monotonic() - started - lower_s)
    compile_s = time.monotonic() - started - lower_s
    stats = executable.memory_analysis()
    left = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Compiled(
        float(stats.temp_size_in_bytes + left),
        float(stats.generated_code_size_in_bytes),
        float(stats.alias_size_in_bytes + stats.host_alias_size_in_bytes),
        _text(executable),
        lower_s,
        compile_s,
        float(stats.host_argument_size_in_bytes),
        float(stats.host_temp_size_in_bytes),
    )


def _text(executable: Any) -> str | None:
    try:
        with quiet.libraries():
            return executable.as_text()
    except jax.errors.JaxRuntimeError:  # A libtpu newer than jaxlib writes instructions that this cannot read.
        return None


def _bytes(tree: Any) -> int:
    """Of the leaves' shards on one device."""
    shapes = ((x.sharding.shard_shape(x.shape) if x.sharding else x.shape, x.dtype) for x in jax.tree.leaves(tree))
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes)


@dataclasses.dataclass(frozen=True)
class _Ids:
    """A tokenizer of which only the number of ids is known."""

    vocab_size: int
    eos_id: int | None = None

    def special(self, name: str) -> None:
        return None


class _Blank:
    """A split of endless documents of counting tokens: every objective finds words, sentences and documents in it."""

    name, tokens, documents, eos_id, text_bytes = "train", 2**40, 2**40 // DOCUMENT_TOKENS, None, 2**40

    def __init__(self, vocab_size: int):
        self._ids = min(vocab_size, 32)  # All are below the special tokens of an objective, which come last.
        ids = np.arange(vocab_size)
        self.word_starts, self.sentence_ends = ids % 2 == 0, ids % 16 == 0

    def window(self, start: int, length: int) -> np.ndarray:
        return (np.arange(start, start + length) % self._ids).astype(np.int32)

    def starts(self, start: int, length: int) -> np.ndarray:
        return np.flatnonzero(np.arange(start, start + length) % DOCUMENT_TOKENS == 0)

    def bounds(self, position: int) -> tuple[int, int]:
        first = position // DOCUMENT_TOKENS * DOCUMENT_TOKENS
        return first, first + DOCUMENT_TOKENS
