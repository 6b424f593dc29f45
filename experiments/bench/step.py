"""Step time beside a peer's, in one interleaved run.

  python -m experiments.bench.step --peer=nanogpt --peer_path=CHECKOUT --shape=C1 --dtype=float32
  python -m experiments.bench.step --peer=torch_lstm --shape=PTB
  python -m experiments.bench.step --peer=nanogpt --peer_path=CHECKOUT --shape=GPT2 --dtype=bfloat16 --platform=cuda

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
    "C1": {"layers": 4, "heads": 4, "width": 128, "seq_len": 64, "batch_size": 12, "vocab_size": 65},
    "C2": {"layers": 6, "heads": 6, "width": 384, "seq_len": 256, "batch_size": 8, "vocab_size": 65},
    "GPT2": {"layers": 12, "heads": 12, "width": 768, "seq_len": 1024, "batch_size": 32, "vocab_size": 50_304},
    "PTB": {"layers": 2, "width": 200, "seq_len": 35, "batch_size": 20, "vocab_size": 10_000},
}

_PEER = flags.DEFINE_enum("peer", "nanogpt", ["nanogpt", "torch_lstm"], "the peer")
_PEER_PATH = flags.DEFINE_string("peer_path", None, "a checkout of the peer, where it has one")
_SHAPE = flags.DEFINE_enum("shape", "C1", list(SHAPES), "the shape of model and batch")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of products; the peer's is autocast")
_PLATFORM = flags.DEFINE_enum("platform", "cpu", ["cpu", "cuda"], "where both sides run")
_BLOCKS = flags.DEFINE_integer("blocks", 7, "turns of each side", lower_bound=1)
_BLOCK_S = flags.DEFINE_float("block_s", 3.0, "seconds a turn, about")
_COMPILE = flags.DEFINE_boolean("compile", False, "also time the peer under torch.compile")


def ours(shape: dict[str, int], dtype: str, tokens: np.ndarray, peer: str) -> Callable[[], float]:
    """A function that trains one step, waits for it, and returns the loss before it."""
    import jax

    from experiments import lstm_ptb, shakespeare_char
    from lm.core import keys
    from lm.main import devices
    from lm.main.train import parameters
    from lm.parallel import rules
    from lm.parallel.mesh import under
    from lm.train import loop

    model = {k: shape[k] for k in ("layers", "width", "vocab_size")} | {"valid_vocab_size": shape["vocab_size"]}
    if peer == "nanogpt":
        base = shakespeare_char.run()
        model |= {"heads": shape["heads"], "max_len": shape["seq_len"]}
    else:
        base = lstm_ptb.run()
    run = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, dtype=dtype, **model),
        train=dataclasses.replace(base.train, batch_size=shape["batch_size"], seq_len=shape["seq_len"]),
    )
    devices.start(shape["batch_size"], parameters(run.model), shape["seq_len"])
    mesh = run.mesh.build()
    _, new, train_step = loop.prepare(run, mesh)
    state, train_step = new(jax.random.key(0)), under(mesh, train_step)
    rows = [run.objective.corrupt(None, {"tokens": row, "documents": np.zeros_like(row)}) for row in tokens]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    if run.data.order == "lanes":
        batch["resets_B"] = np.zeros(len(rows), bool)
    batch = jax.device_put(batch, rules.batch_sharding(mesh))

    key = keys.run_key(0)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, batch, np.float32(1e-3), key)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def nanogpt(
    shape: dict[str, int], dtype: str, tokens: np.ndarray, platform: str, path: str, variant: str
) -> Callable[[], float]:
    """The same for nanoGPT's own model.py; variants: eager, fused (AdamW), compile (with fused AdamW)."""
    import torch

    spec = importlib.util.spec_from_file_location("nanogpt_model", pathlib.Path(path) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    config = module.GPTConfig(
        block_size=shape["seq_len"],
        vocab_size=shape["vocab_size"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_embd=shape["width"],
        dropout=0.0,
        bias=False,
    )
    model = module.GPT(config).to(platform)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    if variant != "eager":
        optimizer = torch.optim.AdamW(optimizer.param_groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    forward = torch.compile(model) if variant == "compile" else model
    x, y = (torch.from_numpy(np.ascontiguousarray(t, np.int64)).to(platform) for t in (tokens[:, :-1], tokens[:, 1:]))
    autocast = torch.autocast(platform, torch.bfloat16, enabled=dtype == "bfloat16")

    def step() -> float:
        with autocast:
            _, loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def torch_lstm(shape: dict[str, int], dtype: str, tokens: np.ndarray, platform: str) -> Callable[[], float]:
    """The same for torch's LSTM, trained as in pytorch/examples: tied table, dropout, clipping and SGD."""
    import torch

    torch.manual_seed(0)
    width = shape["width"]
    table = torch.nn.Embedding(shape["vocab_size"], width, device=platform)
    torch.nn.init.uniform_(table.weight, -0.1, 0.1)
    cells = torch.nn.LSTM(width, width, shape["layers"], dropout=0.2, device=platform)
    bias = torch.nn.Parameter(torch.zeros(shape["vocab_size"], device=platform))
    parameters = [*table.parameters(), *cells.parameters(), bias]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    x, y = (torch.from_numpy(np.ascontiguousarray(t.T, np.int64)).to(platform) for t in (tokens[:, :-1], tokens[:, 1:]))
    state = tuple(torch.zeros(shape["layers"], shape["batch_size"], width, device=platform) for _ in range(2))
    autocast = torch.autocast(platform, torch.bfloat16, enabled=dtype == "bfloat16")

    def step() -> float:
        nonlocal state
        with autocast:
            hidden, after = cells(torch.nn.functional.dropout(table(x), 0.2), state)
            logits = torch.nn.functional.linear(torch.nn.functional.dropout(hidden, 0.2), table.weight, bias)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.25)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state = tuple(s.detach() for s in after)
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
    if (_PEER.value == "nanogpt") != (_PEER_PATH.value is not None):
        raise app.UsageError(f"--peer={_PEER.value}: nanogpt, and no other peer, needs a --peer_path")
    os.environ["JAX_PLATFORMS"] = _PLATFORM.value  # Of the processes that are spawned.
    if (_PEER.value == "torch_lstm") != (_SHAPE.value == "PTB"):
        raise app.UsageError(f"--shape={_SHAPE.value} is none of --peer={_PEER.value}")
    shape, dtype = SHAPES[_SHAPE.value], _DTYPE.value
    size = shape["batch_size"], shape["seq_len"] + 1
    tokens = np.random.default_rng(0).integers(0, shape["vocab_size"], size).astype(np.int32)
    sides = {"ours": (ours, (shape, dtype, tokens, _PEER.value))}
    if _PEER.value == "nanogpt":
        variants = ["eager", "fused"] + ["compile"] * _COMPILE.value
        sides |= {
            f"nanogpt {v}": (nanogpt, (shape, dtype, tokens, _PLATFORM.value, _PEER_PATH.value, v)) for v in variants
        }
    else:
        sides["torch_lstm"] = (torch_lstm, (shape, dtype, tokens, _PLATFORM.value))
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
