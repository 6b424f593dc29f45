"""How many tokens a second one core makes into batches, beside Grain over the same files.

    python -m experiments.bench.stream [--seq_len=2048] [--batch_size=16] [--seconds=2] [--rounds=5]

Prints one JSON line: tokens a second of the stream (shuffled rows of the causal objective: tokens, targets,
weights) and of a Grain pipeline that makes the same fields from the same shards (source, shuffle, map, batch,
no threads), and `ratio`, ours over Grain's. Each is the median of interleaved rounds on one core, in seconds of
CPU time, so that a busy machine changes little.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import app, flags

_SEQ_LEN = flags.DEFINE_integer("seq_len", 2048, "tokens a row")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "rows a batch")
_SECONDS = flags.DEFINE_float("seconds", 2.0, "seconds a measurement")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "interleaved measurements of each")


def make_corpus(folder: str, tokens: int = 1 << 25) -> Any:
    """A corpus of `tokens` bytes in about 30,000 documents."""
    from lm.data import corpus

    rng = np.random.default_rng(0)
    path = os.path.join(folder, "text.txt")
    letters = rng.integers(97, 123, tokens, np.uint8)
    letters[rng.integers(0, tokens, tokens // 1024)] = ord("\n")
    letters.tofile(path)
    return corpus.build(f"lines:{path}", "byte", os.path.join(folder, "corpus"), shard_tokens=1 << 23)


def ours(split: Any, objective: Any, seq_len: int, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of our stream."""
    from lm.data.stream import Stream

    stream = Stream(split, objective, seq_len)
    return (stream.rows(start, batch_size) for start in itertools.count(0, batch_size))


def grains(split: Any, objective: Any, seq_len: int, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the same fields, with Grain's own shuffling, mapping and batching."""
    import grain

    class Windows:
        def __len__(self) -> int:
            return (split.tokens - 1) // seq_len

        def __getitem__(self, i: int) -> dict[str, np.ndarray]:
            start = int(i) * seq_len
            documents = np.zeros(seq_len + 1, np.int32)
            documents[split.starts(start, seq_len + 1)] = 1
            return {"tokens": split.window(start, seq_len + 1), "documents": documents.cumsum(dtype=np.int32)}

    data = grain.MapDataset.source(Windows()).seed(0).shuffle().repeat()
    data = data.random_map(lambda row, rng: objective.corrupt(rng, row)).batch(batch_size)
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def measure(batches: Iterator[dict[str, np.ndarray]], seconds: float) -> float:
    """Tokens a second of CPU time, over about so long."""
    tokens, began = 0, time.process_time()
    while (spent := time.process_time() - began) < seconds:
        tokens += next(batches)["tokens_BL"].size
    return tokens / spent


def compare(peers: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of `rounds` interleaved measurements of each peer, after one that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in peers}
    for i in range(rounds + 1):
        for name, one in peers.items():
            value = one()
            if i:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def main(argv: list[str]) -> None:
    """Measures on one core, and prints the JSON line."""
    from lm.objectives.causal import Causal

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    shape = _SEQ_LEN.value, _BATCH_SIZE.value
    with tempfile.TemporaryDirectory() as folder:
        split = make_corpus(folder).split("train")
        objective = Causal()
        batches = {"stream": ours(split, objective, *shape), "grain": grains(split, objective, *shape)}
        peers = {name: lambda it=it: measure(it, _SECONDS.value) for name, it in batches.items()}
        rates = compare(peers, _ROUNDS.value)
    row = {"seq_len": shape[0], "batch_size": shape[1], "stream_tokens_per_second": round(rates["stream"])}
    row |= {"grain_tokens_per_second": round(rates["grain"]), "ratio": round(rates["stream"] / rates["grain"], 2)}
    print(json.dumps(row))


if __name__ == "__main__":
    app.run(main)
