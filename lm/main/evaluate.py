"""Loss, perplexity and bits per byte of a checkpoint on a corpus's split or on a source of text; or a suite's figures.

lm evaluate --checkpoint=runs/shk_run --corpus=runs/shk
lm evaluate --checkpoint=runs/quickstart --source=text:README.md
lm evaluate --checkpoint=runs/w2v --suite=similarity:EN-WS-353-ALL.txt      or analogies:questions-words.txt
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import flags

from lm.core.errors import UsageError
from lm.main.flags import required, value


def define(values: flags.FlagValues) -> None:
    """Registers the flags of `lm evaluate`."""
    flags.DEFINE_string("checkpoint", None, "a run folder, a step, or a Hugging Face folder", flag_values=values)
    flags.DEFINE_string("corpus", None, "a corpus folder, made with the checkpoint's tokenizer", flag_values=values)
    flags.DEFINE_string("split", "validation", "the split of the corpus", flag_values=values)
    flags.DEFINE_string("source", None, "text to tokenise and score, such as text:FILE", flag_values=values)
    flags.DEFINE_string("suite", None, "similarity:FILE or analogies:FILE, of word vectors", flag_values=values)
    flags.DEFINE_integer("batch_size", 16, "sequences at once", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seq_len", None, "tokens a sequence; unset takes the run's", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("max_tokens", None, "stop after this many", lower_bound=1, flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Prints one figure a line, `name: value`; returns the exit code."""
    checkpoint = required(values, "checkpoint")
    if value(values, "suite") is not None:
        return _suite(checkpoint, value(values, "suite"))
    if (value(values, "corpus") is None) == (value(values, "source") is None):
        raise UsageError("give one of --corpus=DIR and --source=SRC")

    from lm.interop.load import load, load_run, load_tokenizer
    from lm.main import corpora, devices
    from lm.parallel.mesh import Mesh
    from lm.train.counted import is_counted
    from lm.train.run import Evals

    run, tokenizer = load_run(checkpoint), load_tokenizer(checkpoint)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise UsageError(
            f"{checkpoint} has a tokenizer of {tokenizer.vocab_size} ids and a model of {run.model.vocab_size}: "
            "they do not belong together"
        )
    if run.objective is None:
        raise UsageError(f"{checkpoint} is no model of text by itself: it has no objective to be scored by")
    if "vectors" in run.objective.needs:
        raise UsageError(f"{checkpoint} gives text no probability: score its vectors with --suite=similarity:FILE")
    batch_size, max_tokens = value(values, "batch_size"), value(values, "max_tokens")
    counted = is_counted(run.model)
    if not counted:
        devices.start(batch_size)
    with _split(values, tokenizer) as split:
        mesh = None if counted else Mesh().build()
        model, params = load(checkpoint, mesh)
        evals = Evals(batch_size=batch_size, seq_len=value(values, "seq_len"), max_tokens=max_tokens)
        score = corpora.scorer(model, run.objective, split, mesh, batch_size, evals, run.train.seq_len)
        figures = score(params)
        loss = figures.pop("val_loss")
        print(f"loss: {loss:.6f}")
        print(f"perplexity: {math.exp(min(loss, 700)):.4f}")
        for name, figure in figures.items():
            print(f"{name.removeprefix('val_')}: {figure:.6f}")
        print(f"tokens: {min(split.tokens, max_tokens or split.tokens)}")
    return 0


def _suite(checkpoint: str, name: str) -> int:
    """Prints the figures of a suite of word vectors, `name: value`."""
    from lm.evals import word_vectors
    from lm.interop.load import load, load_run, load_tokenizer

    run = load_run(checkpoint)
    if run.objective is None or "vectors" not in run.objective.needs:
        raise UsageError(f"--suite={name} scores word vectors, which {checkpoint} is none of: train word2vec_brown")
    vectors = word_vectors.Vectors(*load(checkpoint), load_tokenizer(checkpoint).pieces, run.objective.ngrams)
    for figure, number in word_vectors.suite(name, vectors).items():
        print(f"{figure}: {number:.4f}" if isinstance(number, float) else f"{figure}: {number}")
    return 0


@contextlib.contextmanager
def _split(values: flags.FlagValues, tokenizer: Any) -> Iterator[Any]:
    """The tokens to score: a split of the corpus, or the source in a corpus that lasts as long as this."""
    from lm.data import corpus as corpora

    if value(values, "corpus") is None:
        with tempfile.TemporaryDirectory() as folder:
            built = corpora.build(value(values, "source"), tokenizer, os.path.join(folder, "corpus"), validation=0.0)
            yield built.split("train")
        return
    opened = corpora.Corpus(value(values, "corpus"))
    if opened.tokenizer_digest != tokenizer.digest:
        raise UsageError(
            f"corpus {value(values, 'corpus')} was made with another tokenizer than the checkpoint's: "
            "pass its text as --source, or build it with --tokenizer=RUN_FOLDER/tokenizer.*"
        )
    yield opened.split(value(values, "split"))


if __name__ == "__main__":
    from lm.main.verbs import run as run_verb

    run_verb("evaluate")
