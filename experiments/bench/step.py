"""Step time beside a peer's, in one interleaved run.

  python -m experiments.bench.step --peer=nanogpt --peer_path=CHECKOUT --shape=C1 --dtype=float32

Each side is a process of its own; they take turns, block by block, on the same token ids. The last line is JSON:
`ratio` is our tokens a second over those of the peer's best variant, by the median of the blocks' medians.
"""

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags

SHAPES = {
    "C1": {"layers": 4, "heads": 4, "width": 128, "seq_len": 64, "batch_size": 12},
    "C2": {"layers": 6, "heads": 6, "width": 384, "seq_len": 256, "batch_size": 8},
}
VOCAB = 65

_PEER = flags.DEFINE_enum("peer", "nanogpt", ["nanogpt"], "the peer")
_PEER_PATH = flags.DEFINE_string("peer_path", None, "a checkout of the peer", required=True)
_SHAPE = flags.DEFINE_enum("shape", "C1", list(SHAPES), "the shape of model and batch")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of products; the peer's is autocast")
_BLOCKS = flags.DEFINE_integer("blocks", 7, "turns of each side", lower_bound=1)
_BLOCK_S = flags.DEFINE_float("block_s", 3.0, "seconds a turn, about")
_COMPILE = flags.DEFINE_boolean("compile", False, "also time the peer under torch.compile")


def ours(shape: dict[str, int], dtype: str, tokens: np.ndarray) -> Callable[[], float]:
    """A function that trains one step, waits for it, and returns the loss before it."""
    import jax

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from experiments import shakespeare_char
    from lm.core import keys
    from lm.main import devices
    from lm.parallel import rules
    from lm.parallel.mesh import under
    from lm.train import loop

    devices.start(shape["batch_size"])
    base = shakespeare_char.run()
    model = {k: shape[k] for k in ("layers", "heads", "width")} | {"max_len": shape["seq_len"], "dtype": dtype}
    run = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, vocab_size=VOCAB, valid_vocab_size=VOCAB, **model),
        train=dataclasses.replace(base.train, batch_size=shape["batch_size"], seq_len=shape["seq_len"]),
    )
    mesh = run.mesh.build()
    _, new, train_step = loop.prepare(run, mesh)
    state, train_step = new(jax.random.key(0)), under(mesh, train_step)
    rows = [run.objective.corrupt(None, {"tokens": row, "documents": np.zeros_like(row)}) for row in tokens]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    batch = jax.device_put(batch, rules.batch_sharding(mesh))

    key = keys.run_key(0)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, batch, np.float32(1e-3), key)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def nanogpt(shape: dict[str, int], dtype: str, tokens: np.ndarray, path: str, variant: str) -> Callable[[], float]:
    """The same for nanoGPT's own model.py; variants: eager, fused (AdamW), compile (with fused AdamW)."""
    import torch

    spec = importlib.util.spec_from_file_location("nanogpt_model", pathlib.Path(path) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    config = module.GPTConfig(
        block_size=shape["seq_len"],
        vocab_size=VOCAB,
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_embd=shape["width"],
        dropout=0.0,
        bias=False,
    )
    model = module.GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    if variant != "eager":
        optimizer = torch.optim.AdamW(optimizer.param_groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    forward = torch.compile(model) if variant == "compile" else model
    x, y = (torch.from_numpy(np.ascontiguousarray(t, np.int64)) for t in (tokens[:, :-1], tokens[:, 1:]))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")

    def step() -> float:
        with autocast:
            _, loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _worker(make: Callable[..., Callable[[], float]], arguments: tuple, pipe: Any) -> None:
    """Answers each number of steps with (wall seconds, CPU seconds) of every step, and the last loss."""
    step = make(*arguments)
    for _ in range(20):
        step()
    pipe.send("ready")
    while count := pipe.recv():
        times, loss = [], 0.0
        for _ in range(count):
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step()
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
        pipe.send((times, loss))


def main(argv: list[str]) -> None:
    """Prints one line a side, and the JSON line."""
    shape, dtype = SHAPES[_SHAPE.value], _DTYPE.value
    tokens = np.random.default_rng(0).integers(0, VOCAB, (shape["batch_size"], shape["seq_len"] + 1)).astype(np.int32)
    variants = ["eager", "fused"] + ["compile"] * _COMPILE.value
    sides = {"ours": (ours, (shape, dtype, tokens))}
    sides |= {f"{_PEER.value} {v}": (nanogpt, (shape, dtype, tokens, _PEER_PATH.value, v)) for v in variants}
    context = multiprocessing.get_context("spawn")
    pipes, medians = {}, {name: [] for name in sides}
    for name, (make, arguments) in sides.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=_worker, args=(make, arguments, theirs), daemon=True).start()
        pipes[name].recv()
    count = dict.fromkeys(sides, 3)
    for block in range(_BLOCKS.value + 1):
        for name, pipe in pipes.items():
            pipe.send(count[name])
            times, loss = pipe.recv()
            wall, cpu = (statistics.median(t) for t in zip(*times, strict=True))
            count[name] = max(3, round(_BLOCK_S.value / wall))
            if block:  # The first turn only says how many steps fill a block.
                medians[name].append((wall, cpu, loss))
    for pipe in pipes.values():
        pipe.send(0)
    result = {"shape": _SHAPE.value, "dtype": dtype, "load": os.getloadavg()[0]}
    for name, rows in medians.items():
        wall, cpu, loss = (statistics.median(column) for column in zip(*rows, strict=True))
        result[name] = {
            "ms": round(wall * 1e3, 2),
            "min_ms": round(min(rows)[0] * 1e3, 2),
            "cpu_ms": round(cpu * 1e3, 1),
        }
        print(f"{name:>16}: {wall * 1e3:8.2f} ms a step, {cpu * 1e3:8.1f} ms of CPU, loss {loss:.3f}")
    best = min(result[name]["ms"] for name in sides if name != "ours")
    print(json.dumps(result | {"ratio": round(best / result["ours"]["ms"], 3)}))


if __name__ == "__main__":
    app.run(main)
