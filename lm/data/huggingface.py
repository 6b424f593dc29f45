"""Folders of Hugging Face's tokenizer files: what they amount to, as the content of one tokenizer.json.

Read are tokenizer.json itself; vocab.json with merges.txt; vocab.txt; and SentencePiece's spiece.model,
sentencepiece.bpe.model or tokenizer.model. The text functions are those of the classes of transformers 5.24, which
differ from SentencePiece's own in rare characters and do not all keep the text: T5, ALBERT and XLNet have no bytes to
spell unknown characters with, BERT's vocabularies have no spaces.
"""

import json
import pathlib
import re
from typing import Any

from lm.core.errors import UsageError
from lm.data.special import OF_BERT, OF_ROBERTA, add_special, name_of
from lm.data.spiece import FAMILIES, Build

SENTENCE_PIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_CONFIGS = ("tokenizer_config.json", "config.json", "special_tokens_map.json")


def is_folder(folder: pathlib.Path) -> bool:
    """Whether the folder is Hugging Face's rather than a run's or a corpus's."""
    config = _read(folder / "config.json")
    return (folder / "tokenizer_config.json").exists() or "model_type" in config or "architectures" in config


def found(folder: pathlib.Path) -> pathlib.Path | None:
    """The file of the folder that holds its tokenizer, or None: the first of those named above."""
    for name in ("tokenizer.json", "vocab.txt", *SENTENCE_PIECE):
        if (folder / name).exists():
            return folder / name
    both = (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
    return folder / "vocab.json" if both else None


def tokenizer_json(folder: pathlib.Path) -> bytes:
    """The content of the folder's tokenizer.json, made from its other files where there is none.

    Raises UsageError for a class whose text functions are not known here, which lists those that are.
    """
    file = found(folder)
    if file is None:
        raise UsageError(
            f"{folder} holds no tokenizer: no tokenizer.json, vocab.json and merges.txt, vocab.txt, or "
            f"{', '.join(SENTENCE_PIECE)}"
        )
    if file.name == "tokenizer.json":
        return file.read_bytes()
    try:
        import tokenizers  # noqa: F401  # What follows builds on it.
    except ImportError:
        raise UsageError(f"{file} needs the package tokenizers: pip install -e '.[hf]'") from None
    settings: dict[str, Any] = {}
    for name in reversed(_CONFIGS):
        settings |= _read(folder / name)
    family = re.sub("(tokenizer)?(fast)?$", "", re.sub("[^a-z0-9]", "", _family(settings)))
    kinds = {"vocab.json": _MERGES, "vocab.txt": _WORDS}.get(file.name, FAMILIES)
    build = kinds.get(family, kinds.get("") if file.name in SENTENCE_PIECE else None)
    if build is None:
        known = ", ".join(sorted(filter(None, kinds)))
        raise UsageError(
            f"{file} is of class {_family(settings)!r}, whose text functions are not known (only those of "
            f"{known}): save it with transformers, which writes a tokenizer.json"
        )
    tokenizer, names = build(file, settings)
    add_special(tokenizer, settings, names)
    return tokenizer.to_str().encode()


def _family(settings):
    return str(settings.get("tokenizer_class") or settings.get("model_type") or "").lower()


def _gpt2(file, settings):
    return _byte_level(file, settings, dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"))


def _roberta(file, settings):
    return _byte_level(file, settings, OF_ROBERTA)


def _byte_level(file, settings, names):
    """GPT-2's and RoBERTa's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(file), str(file.with_name("merges.txt"))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, names


def _gpt1(file, settings):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    names = {"unk_token": "<unk>"}
    model = models.BPE.from_file(
        str(file), str(file.with_name("merges.txt")), end_of_word_suffix="</w>", unk_token=name_of(settings, names)
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer, names


def _bert(file, settings):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocab = {line: i for i, line in enumerate(lines)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=name_of(settings, OF_BERT)))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer, OF_BERT


def _read(file) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise UsageError(f"{file} is damaged: {error}") from None
    return data if isinstance(data, dict) else {}


_MERGES: dict[str, Build] = {"": _gpt2, "gpt2": _gpt2, "roberta": _roberta, "bart": _roberta, "openaigpt": _gpt1}
_WORDS: dict[str, Build] = {"": _bert, "bert": _bert, "distilbert": _bert, "electra": _bert}
