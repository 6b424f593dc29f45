"""lm tokenizer --source=SRC --kind=KIND [--vocab_size=N] --out=FILE

SRC: text:PATH  lines:PATH  jsonl:PATH[#FIELD]  tfds:NAME[/CONFIG][:SPLIT]  python  synthetic:markov
PATH takes globs, .gz and .zst. bpe and unigram give every text back exactly.
"""

import sys

from absl import flags

from lm.main.flags import required, value


def define(values: flags.FlagValues) -> None:
    """Registers the verb's flags."""
    flags.DEFINE_string("source", None, "the text to learn from", flag_values=values)
    flags.DEFINE_string("kind", None, "byte, char, word, bpe or unigram", flag_values=values)
    flags.DEFINE_integer(
        "vocab_size", None, "ids; char and word keep every type without it", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("out", None, "the file to write", flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Trains a tokenizer and writes its file."""
    source, kind, out = (required(values, name) for name in ("source", "kind", "out"))
    from lm.data import sources, tokenizers

    tokenizers.parse(kind)
    tokenizer = tokenizers.train(kind, sources.documents(source), value(values, "vocab_size"))
    path = tokenizer.save(out)
    sys.stdout.write(f"{path}: kind {tokenizer.kind}, {tokenizer.vocab_size} ids, sha256 {tokenizer.digest[:16]}\n")
    return 0


if __name__ == "__main__":
    from lm.main import verbs

    verbs.run("tokenizer")
