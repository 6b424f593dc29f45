"""lm tokenizer --source=SRC --kind=KIND [--vocab_size=N] --out=FILE

SRC: text:PATH  lines:PATH  jsonl:PATH[#FIELD]  tfds:NAME[/CONFIG][:SPLIT]  python  synthetic:markov
PATH takes globs, .gz and .zst. bpe and unigram give every text back exactly; wordpiece is BERT's, which
loses the spaces, and with --lowercase capitals and accents too.
"""

import sys

from absl import flags

from lm.main.flags import required, value


def define(values: flags.FlagValues) -> None:
    """Registers the verb's flags."""
    flags.DEFINE_string("source", None, "the text to learn from", flag_values=values)
    flags.DEFINE_string("kind", None, "byte, char, word, folded, bpe, unigram or wordpiece", flag_values=values)
    flags.DEFINE_integer(
        "vocab_size", None, "ids; char, word and folded keep every type without it", lower_bound=1, flag_values=values
    )
    flags.DEFINE_bool("lowercase", False, "wordpiece without capitals and accents", flag_values=values)
    flags.DEFINE_string("out", None, "the file to write", flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Trains a tokenizer and writes its file."""
    source, kind, out = (required(values, name) for name in ("source", "kind", "out"))
    from lm.data import sources, tokenizers

    tokenizers.parse(kind)
    size, lowercase = value(values, "vocab_size"), bool(value(values, "lowercase"))
    tokenizer = tokenizers.train(kind, sources.documents(source), size, lowercase=lowercase)
    path = tokenizer.save(out)
    sys.stdout.write(f"{path}: kind {tokenizer.kind}, {tokenizer.vocab_size} ids, sha256 {tokenizer.digest[:16]}\n")
    return 0


if __name__ == "__main__":
    from lm.main import verbs

    verbs.run("tokenizer")
