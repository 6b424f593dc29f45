"""Our tokenizers in the form of Hugging Face: a tokenizer.json that gives the same ids, and the text back.

In all text but this: what spells a special token ("</s>") becomes that token there, and plain text here. And unigram
cuts a text in two ways whose scores are equal to single precision now in one way, now in the other: of 4.3 million
tokens of Python's library and some poems, 9,000 pieces, about 150 lay otherwise. The text came back all the same.
"""

from collections.abc import Sequence
from typing import Any

from lm.core.errors import UsageError
from lm.data.pretrained import Pretrained
from lm.data.spiece import SPACE, proto, ranked_merges
from lm.data.tokenizers import END, UNKNOWN, Byte, Char, Pieces, Tokenizer, Word

_FIELDS = {
    "<pad>": "pad_token",
    "<s>": "bos_token",
    "</s>": "eos_token",
    "[MASK]": "mask_token",
    "[CLS]": "cls_token",
    "[SEP]": "sep_token",
}


def tokenizer_json(tokenizer: Tokenizer, extra: Sequence[str] = ()) -> bytes:
    """The content of the tokenizer.json, with `extra` special tokens at the ids after the tokenizer's.

    That of a `Pretrained` is its own. Raises UsageError where the package tokenizers is missing.
    """
    if isinstance(tokenizer, Pretrained):
        return tokenizer.serialize()
    try:
        import tokenizers
    except ImportError:
        raise UsageError("a tokenizer.json needs the package tokenizers: pip install -e '.[hf]'") from None
    made = {Byte: _byte, Char: _char, Word: _word, Pieces: _pieces}[type(tokenizer)](tokenizer)
    made.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in extra])
    return made.to_str().encode()


def tokenizer_config(tokenizer: Tokenizer, extra: Sequence[str] = ()) -> dict[str, Any]:
    """What tokenizer_config.json says beside it: the class that takes tokenizer.json as it is, and what is special."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.eos_id is not None:
        config["eos_token"] = tokenizer.piece(tokenizer.eos_id)
    return config | {_FIELDS[name]: name for name in extra if name in _FIELDS}


def _byte(tokenizer):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE({letter: byte for byte, letter in _byte_letters().items()}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _char(tokenizer):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {piece: i for i, piece in enumerate(tokenizer.pieces)}
    made = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made


def _word(tokenizer):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(tokenizer.words)}, unk_token=UNKNOWN))
    # Python takes four separators for white space that the library does not.
    spaces = normalizers.Replace(Regex("[\x1c-\x1f]"), " ")
    made.normalizer = normalizers.Sequence([spaces, normalizers.Replace("\n", f" {END} ")])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The decoder of WordPiece is the one that puts spaces between tokens.
    joined = [decoders.WordPiece(prefix="\x1c", cleanup=False), decoders.Fuse()]
    made.decoder = decoders.Sequence([*joined, decoders.Replace(Regex(f" ?{END} ?"), "\n")])
    return made


def _pieces(tokenizer):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    model = proto(tokenizer.serialize())
    for piece in model.pieces:
        # With spaces as they are, SentencePiece's sign for one is a character like any other, and spelled in bytes.
        piece.piece = piece.piece.replace(SPACE, " ")
    apart = ["\n"]
    if tokenizer.kind == "unigram":
        made = Tokenizer(models.Unigram([(p.piece, p.score) for p in model.pieces], model.trainer_spec.unk_id, True))
        apart.append("<(?=0x[0-9A-F]{2}>)")  # Else text that spells a byte's piece would be that byte.
    else:
        vocab = {p.piece: i for i, p in enumerate(model.pieces)}
        unknown = model.trainer_spec.unk_piece
        made = Tokenizer(models.BPE(vocab, ranked_merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(apart)), "isolated")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(p.piece, normalized=False, special=True) for p in model.pieces if p.type == 3])
    return made


def _byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in byte-level vocabularies (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
