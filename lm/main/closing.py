"""What `lm train` says before and after: sizes, samples, baselines, and where things are."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lm.core import files, params
from lm.evals import baselines
from lm.generate.sample import continues_text, generate
from lm.parallel import hosts
from lm.train import metrics

SAMPLES = "samples"
_PROMPT_TOKENS = 8


def opening(run: Any, corpus: Any, mesh: jax.sharding.Mesh, first: int) -> str:
    """The lines before the first step: how large everything is, and where the run begins."""
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    split = corpus.splits["train"]
    tokens = run.train.steps * run.train.batch_size * run.train.seq_len
    begin = f"continuing after step {first}" if first else "a new run"
    return (
        f"{params.count(run.model.spec()):,} parameters on {mesh.size} {mesh.devices.flat[0].device_kind} ({axes}); "
        f"{begin}\n"
        f"{split.tokens:,} training tokens of {split.text_bytes / split.tokens:.2f} bytes; "
        f"{tokens:,} will be seen, {tokens / split.tokens:.2f} epochs"
    )


def sampler(run: Any, corpus: Any, workdir: str) -> Callable[[Any, int], None] | None:
    """A function of (weights, step) that writes the prompt with one continuation to samples/<step>.txt."""
    if not run.evals.sample_tokens:
        return None
    tokenizer = corpus.tokenizer()
    prompt = corpus.split("train").window(0, _PROMPT_TOKENS)
    if run.evals.prompt is not None:
        prompt = tokenizer.encode(run.evals.prompt)

    def sample(weights: Any, step: int) -> None:
        ids = generate(run.model, weights, [prompt], run.evals.sample_tokens, temperature=0.8, seed=run.train.seed)[0]
        if hosts.is_main():
            folder = files.path(workdir) / SAMPLES
            folder.mkdir(parents=True, exist_ok=True)
            files.write_bytes(folder / f"{step}.txt", tokenizer.decode([*prompt, *ids]).encode())

    return sample


def report(run: Any, corpus: Any, workdir: str, code: int, seconds: float, say: Callable[[str], None]) -> None:
    """The lines after the last step: the table of bits per byte, a sample, and where things are."""
    picture = metrics.plot(workdir)
    if code == 0:
        if run.evals.baselines and "validation" in corpus.splits:
            say(_comparison(corpus, _last(workdir, "val_bits_per_byte")))
        text = _newest_sample(workdir)
        if text:
            say(f"\na sample:\n{text}\n")
    say(f"{seconds / 60:.1f} minutes; loss curve: {picture}; run folder: {workdir}")
    if code == 0:
        say(next_lines(run, workdir))


def already_done(run: Any, workdir: str, say: Callable[[str], None]) -> int:
    """Says that nothing is left to do, what came out, and what to try."""
    if not (files.path(workdir) / metrics.PICTURE).exists():
        metrics.plot(workdir)  # A kill came between the last checkpoint and the report.
    bits, loss = _last(workdir, "val_bits_per_byte"), _last(workdir, "val_loss")
    found = f"; validation loss {loss:.4f}, {bits:.4f} bits per byte" if bits is not None and loss is not None else ""
    say(f"{workdir} is done: all {run.train.steps} steps{found}")
    say(next_lines(run, workdir))
    say(f"  lm train ... --set=train.steps={2 * run.train.steps}    in a new --workdir, to train for longer")
    return 0


def next_lines(run: Any, workdir: str) -> str:
    """What can be done with a finished run."""
    lines = [f"  lm evaluate --checkpoint={workdir} --source=text:FILE"]
    if continues_text(run.model):
        lines.insert(0, f"  lm generate --checkpoint={workdir} --prompt='...' --tokens=100")
    return "\n".join(["next:", *lines])


def _comparison(corpus: Any, ours: float | None) -> str:
    """The model's bits per byte beside those of counting and compressing, on the same held-out bytes."""
    tokenizer = corpus.tokenizer()
    train, held_out = (corpus.splits[name].window(0, corpus.splits[name].tokens) for name in ("train", "validation"))
    seen, new = (tokenizer.decode(ids).encode() for ids in (train, held_out))
    counts = np.bincount(train, minlength=tokenizer.vocab_size)
    size = corpus.splits["validation"].text_bytes
    rows = {
        f"tokens by frequency ({tokenizer.kind})": baselines.unigram_bits(counts, held_out) / size,
        "xz -9e of the held-out text": baselines.xz_bits(new) / size,
        "byte 5-gram (Witten-Bell)": baselines.byte_ngram_bits(seen, new) / size,
    }
    if ours is not None:
        rows["this model"] = ours
    width = max(map(len, rows))
    lines = [f"  {name:<{width}}  {bits:.3f}" for name, bits in sorted(rows.items(), key=lambda row: -row[1])]
    return "\n".join(["\nbits per byte of the held-out text:", *lines])


def _last(workdir: str, name: str) -> float | None:
    values = [row[name] for row in metrics.read(workdir) if row.get(name) is not None]
    return values[-1] if values else None


def _newest_sample(workdir: str) -> str:
    found = sorted((files.path(workdir) / SAMPLES).glob("*.txt"), key=lambda f: int(f.stem))
    return found[-1].read_text() if found else ""
