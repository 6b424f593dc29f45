"""`lm train` for models that are counted: one pass over the training split, and the figures of the validation split."""

import math
from collections.abc import Callable
from typing import Any

from lm.core import config
from lm.core.errors import UsageError
from lm.main import closing, corpora
from lm.main.corpus import progress_bar
from lm.report import row
from lm.train import checkpoint, counted, folder
from lm.train.metrics import Metrics


def train(
    run: Any, experiment: str, workdir: str, corpus: Any, options: Any, started: Callable[[int], None], times: Any
) -> int:
    """Counts a resolved run's corpus, unless its folder has that already; returns the exit code.

    `started` writes the start at a step to the ledger. Raises UsageError for a folder of other settings or text, and
    for what has no effect on counts: a mixture, or the `options` --init_from and --profile.
    """
    digest = corpora.fingerprint(run, corpus)
    if run.data.mixture:
        raise UsageError("data.mixture has no effect on a model that is counted: build one corpus of all the text")
    for name in ("init_from", "profile"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} has no effect on a model that is counted: leave it out")
    done = checkpoint.Checkpoints(workdir).steps() == [counted.STEP]
    if done:
        _check_same(workdir, run, digest)
    started(counted.STEP if done else 0)
    folder.write_config(workdir, run, experiment)
    folder.keep_tokenizer(workdir, corpus.tokenizer())
    split = corpus.split("train")
    if not done:
        meta = {"run": config.to_json(run), "corpus": digest, "tokenizer": corpus.tokenizer_digest}
        with progress_bar() as progress:
            counted.fit(workdir, run.model, split, meta, progress)
    tables = counted.open_tables(workdir, run.model)
    stored = run.model.counts(tables)
    each = ", ".join(f"{count:,} {n}-grams" for n, count in stored.items())
    print(f"{split.tokens:,} training tokens of {split.text_bytes / split.tokens:.2f} bytes: {each}")
    if not done or row.read(workdir) is None:
        figures = _figures(run, corpus, tables)
        metrics = Metrics(workdir)
        metrics.write(counted.STEP, **figures)
        metrics.close()
        times.write("stop", step=counted.STEP, code=0)
        row.write(workdir, run, corpus, digest, "done", 1, sum(stored.values()))
        if figures:
            print(
                f"validation perplexity {math.exp(min(figures['val_loss'], 700)):.2f}, loss {figures['val_loss']:.4f}"
            )
    print(closing.next_lines(run, workdir))
    return 0


def _figures(run: Any, corpus: Any, tables: Any) -> dict[str, float]:
    score = corpora.validation(run, corpus, None)
    return {} if score is None else score(tables)


def _check_same(workdir: str, run: Any, digest: str) -> None:
    meta = checkpoint.read_meta(workdir, counted.STEP)
    changed = config.diff(config.from_json(meta["run"]), run)
    kept = config.digest(config.from_json(meta["run"])) == config.digest(run)
    if not kept or meta["corpus"] != digest:
        what = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in changed.items() if not kept)
        raise UsageError(
            f"{workdir} holds counts of other {'text' if kept else f'settings ({what})'}: take another --workdir"
        )
