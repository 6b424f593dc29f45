"""lm corpus --source=SRC [--tokenizer=FILE|KIND[:VOCAB_SIZE]] --out=DIR      or      lm corpus --verify --out=DIR

SRC: text:PATH  lines:PATH  jsonl:PATH[#FIELD]  tfds:NAME[/CONFIG][:SPLIT]  python  synthetic:markov
PATH takes globs, .gz and .zst. A corpus that is there already, with the same settings, is kept as it is.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags

from lm.core.errors import UsageError
from lm.main.flags import required, value

if TYPE_CHECKING:
    from lm.data.corpus import Corpus, Progress


def define(values: flags.FlagValues) -> None:
    """Registers the verb's flags."""
    flags.DEFINE_string("source", None, "the text to tokenise", flag_values=values)
    flags.DEFINE_string("tokenizer", "bpe:8192", "a tokenizer's file, or KIND[:VOCAB_SIZE]", flag_values=values)
    flags.DEFINE_string("out", None, "the corpus folder", flag_values=values)
    flags.DEFINE_float(
        "validation",
        None,
        "share held out from the end: of the documents, or of the text where there is one document",
        flag_values=values,
    )
    flags.DEFINE_string("validation_source", None, "a source of its own for validation", flag_values=values)
    flags.DEFINE_bool("verify", False, "check the sha256 of every file of --out instead", flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Builds or verifies a corpus and says what it holds."""
    out = required(values, "out")
    if value(values, "verify"):
        if value(values, "source") is not None:
            raise UsageError("--verify checks a corpus that is there: leave out --source")
        return _verify(out)
    source = required(values, "source")
    from lm.data import corpus

    before = corpus.is_built(out)
    with progress_bar() as progress:
        built = corpus.build(
            source,
            value(values, "tokenizer"),
            out,
            validation=value(values, "validation"),
            validation_source=value(values, "validation_source"),
            progress=progress,
        )
    sys.stdout.write(("There already, with the same settings.\n" if before else "") + summary(built))
    return 0


@contextlib.contextmanager
def progress_bar() -> Iterator["Progress"]:
    """A function for `corpus.build(progress=)`, shown as a bar where standard error is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")

        def update(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total or None)

        yield update


def summary(corpus: "Corpus") -> str:
    """A few lines for a person: what the corpus holds, and where."""
    tokenizer = corpus.manifest["tokenizer"]
    lines = [f"{corpus.folder}: tokenizer {tokenizer['kind']}, {corpus.vocab_size} ids, corpus {corpus.digest}"]
    for name, split in corpus.splits.items():
        lines.append(
            f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.text_bytes:,} bytes, {split.text_bytes / split.tokens:.2f} bytes a token"
        )
    for name, count in corpus.manifest["cleaning"].items():
        lines.append(f"  {name.replace('_', ' ')}: {count:,}")
    return "\n".join(lines) + "\n"


def _verify(out: str) -> int:
    from lm.data import corpus

    with progress_bar() as progress:
        checked = corpus.verify(out, progress)
    sys.stdout.write(f"{out}: all files agree with their sha256 ({checked:,} bytes)\n")
    return 0


if __name__ == "__main__":
    from lm.main import verbs

    verbs.run("corpus")
