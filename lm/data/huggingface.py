"""Folders of Hugging Face's tokenizer files: what they amount to, as the content of one tokenizer.json.

Read are tokenizer.json itself; vocab.json with merges.txt; vocab.txt; and SentencePiece's spiece.model,
sentencepiece.bpe.model or tokenizer.model. The text functions are those of the classes of transformers 5.24, which
differ from SentencePiece's own in rare characters and do not all keep the text: T5, ALBERT and XLNet have no bytes to
spell unknown characters with, BERT's vocabularies have no spaces.
"""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from lm.core.errors import UsageError

SENTENCE_PIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_CONFIGS = ("tokenizer_config.json", "config.json", "special_tokens_map.json")
_SPACE = "\u2581"
# In the order in which transformers appends those that a vocabulary lacks.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OF_BERT = dict(zip(_NAMES[2:], ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"), strict=True))
_OF_ROBERTA = dict(zip(_NAMES, ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>"), strict=True))
_OF_T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_OF_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


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
    kinds = {"vocab.json": _MERGES, "vocab.txt": _WORDS}.get(file.name, _PIECES)
    build = kinds.get(family, kinds.get("") if file.name in SENTENCE_PIECE else None)
    if build is None:
        known = ", ".join(sorted(filter(None, kinds)))
        raise UsageError(
            f"{file} is of class {_family(settings)!r}, whose text functions are not known (only those of "
            f"{known}): save it with transformers, which writes a tokenizer.json"
        )
    tokenizer, names = build(file, settings)
    _add_special(tokenizer, settings, names)
    return tokenizer.to_str().encode()


def _family(settings):
    return str(settings.get("tokenizer_class") or settings.get("model_type") or "").lower()


def _gpt2(file, settings):
    return _byte_level(file, settings, dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"))


def _roberta(file, settings):
    return _byte_level(file, settings, _OF_ROBERTA)


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
        str(file), str(file.with_name("merges.txt")), end_of_word_suffix="</w>", unk_token=_name(settings, names)
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer, names


def _bert(file, settings):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {line.rstrip("\n"): i for i, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=_name(settings, _OF_BERT)))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer, _OF_BERT


def _t5(file, settings):
    model = _proto(file)
    extra = [f"<extra_id_{i}>" for i in reversed(range(settings.get("extra_ids", 100)))]
    vocab = [(p.piece, p.score) for p in model.pieces] + [(name, 0.0) for name in extra]
    return _unigram(model, vocab, 2, [], "always", extra), _OF_T5


def _albert(file, settings):
    model = _proto(file)
    steps = _quotes() + ([] if settings.get("keep_accents") else _no_accents())
    scheme = "always" if settings.get("add_prefix_space", True) else "never"
    names = _OF_BERT | {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "<unk>", "pad_token": "<pad>"}
    vocab = [(p.piece, p.score) for p in model.pieces]
    return _unigram(model, vocab, 1, steps + _lower(settings, True), scheme), names


def _xlnet(file, settings):
    model = _proto(file)
    names = _OF_ROBERTA | {"sep_token": "<sep>", "cls_token": "<cls>"}
    vocab, steps = [(p.piece, p.score) for p in model.pieces], _quotes() + _no_accents() + _lower(settings, False)
    return _unigram(model, vocab, model.trainer_spec.unk_id, steps, _scheme(settings, True)), names


def _xlm_roberta(file, settings):
    # fairseq's order of the first ids, and one for <mask> after all.
    model = _proto(file)
    first = [_name(settings, _OF_ROBERTA, f"{n}_token") for n in ("bos", "pad", "eos", "unk")]
    last = _name(settings, _OF_ROBERTA, "mask_token")
    vocab = [(n, 0.0) for n in first] + [(p.piece, p.score) for p in model.pieces[3:]] + [(last, 0.0)]
    scheme = "always" if settings.get("add_prefix_space", True) else "never"
    return _unigram(model, vocab, 3, [], scheme), _OF_ROBERTA


def _llama(file, settings):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model = _proto(file)
    vocab = {p.piece: i for i, p in enumerate(model.pieces)}
    merges = [(a, b) for piece in vocab for a, b in _halves(piece) if a in vocab and b in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    prefix = settings.get("add_prefix_space")
    prefix = True if prefix is None else prefix
    scheme = _scheme(settings | {"legacy": settings.get("legacy", False)}, prefix)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if prefix else []))
    _add_controls(tokenizer, model)
    return tokenizer, _OF_LLAMA


def _any_pieces(file, settings):
    """As the model's own settings say."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = _proto(file)
    spec, trainer = model.normalizer_spec, model.trainer_spec
    own = [p.piece for p in model.pieces if p.type == 4]
    if trainer.model_type == 1:
        vocab = [(p.piece, p.score) for p in model.pieces]
        tokenizer = Tokenizer(models.Unigram(vocab, trainer.unk_id, trainer.byte_fallback))
    else:
        tokenizer = Tokenizer(
            models.BPE(
                {p.piece: i for i, p in enumerate(model.pieces)},
                ranked_merges(model),
                unk_token=trainer.unk_piece,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
                ignore_merges=bool(own),
            )
        )
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Replace(Regex(rf"\A{_SPACE}"), _SPACE * 2))
    tokenizer.normalizer = normalizers.Sequence(steps)
    splits: list[Any] = []
    if spec.add_dummy_prefix:
        splits.append(pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=False))
    if own:
        pattern = "|".join(re.escape(piece) for piece in sorted(own, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(back + [decoders.Strip(content=" ", left=1)] * spec.add_dummy_prefix)
    _add_controls(tokenizer, model, user=False)
    ends = (("bos", trainer.bos_id), ("eos", trainer.eos_id), ("unk", trainer.unk_id))
    return tokenizer, {f"{name}_token": getattr(trainer, f"{name}_piece") for name, i in ends if i >= 0}


def proto(content: bytes) -> Any:
    """The message that a SentencePiece model is."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]  # Made at import.


def ranked_merges(model: Any) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE model in the order of their scores, then ids."""
    normal = {p.piece: (-p.score, i) for i, p in enumerate(model.pieces) if p.type == 1}
    merges = [(*rank, a, b) for piece, rank in normal.items() for a, b in _halves(piece) if a in normal and b in normal]
    return [(a, b) for _, _, a, b in sorted(merges)]


def _halves(piece):
    return [(piece[:i], piece[i:]) for i in range(1, len(piece))]


def _unigram(model, vocab, unknown, steps, scheme, special=()):
    """Words apart, each with a space before it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram(vocab, unknown, False))
    if model.normalizer_spec.precompiled_charsmap:
        steps = [*steps, normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    spaces = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
    _add_controls(tokenizer, model)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _quotes():
    from tokenizers import normalizers

    return [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]


def _no_accents():
    from tokenizers import normalizers

    return [normalizers.NFKD(), normalizers.StripAccents()]


def _lower(settings, default):
    from tokenizers import normalizers

    return [normalizers.Lowercase()] if settings.get("do_lower_case", default) else []


def _scheme(settings, prefix):
    if not prefix:
        return "never"
    return "always" if settings.get("legacy", True) else "first"


def _add_controls(tokenizer, model, user=True):
    """Control pieces are special, and pieces that the model's user defined are found before all others."""
    from tokenizers import AddedToken

    kept = [p for p in model.pieces if p.type == 3 or (user and p.type == 4)]
    tokenizer.add_tokens([AddedToken(p.piece, normalized=False, special=p.type == 3) for p in kept])


def _add_special(tokenizer, settings, defaults):
    """The special tokens that the folder or else the class names; those that the vocabulary lacks get the next ids."""
    from tokenizers import AddedToken

    listed = sorted((settings.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    values = [value for _, value in listed]
    named = [settings.get(name, defaults.get(name)) for name in _NAMES]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = settings.get(key) or []
        named += list(extra.values()) if isinstance(extra, dict) else list(extra)
    known = {_content(value) for value in values}
    for value in named:
        if value is not None and _content(value) not in known:
            known.add(_content(value))
            values.append(value if isinstance(value, dict) else {"content": value})
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    for value in values:
        given = {flag: value[flag] for flag in flags if flag in value}
        token = AddedToken(value["content"], special=value.get("special", True), **given)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])


def _name(settings, defaults, name="unk_token"):
    return _content(settings.get(name) or defaults[name])


def _content(value):
    return value["content"] if isinstance(value, dict) else value


def _proto(file):
    from google.protobuf.message import DecodeError

    try:
        return proto(file.read_bytes())
    except DecodeError as error:
        raise UsageError(f"{file} is no SentencePiece model: {error}") from None


def _read(file) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise UsageError(f"{file} is damaged: {error}") from None
    return data if isinstance(data, dict) else {}


_Build = Callable[[pathlib.Path, dict[str, Any]], tuple[Any, dict[str, str]]]
_MERGES: dict[str, _Build] = {"": _gpt2, "gpt2": _gpt2, "roberta": _roberta, "bart": _roberta, "openaigpt": _gpt1}
_WORDS: dict[str, _Build] = {"": _bert, "bert": _bert, "distilbert": _bert, "electra": _bert}
_PIECES: dict[str, _Build] = {
    "": _any_pieces,
    "t5": _t5,
    "mt5": _t5,
    "albert": _albert,
    "xlnet": _xlnet,
    "xlmroberta": _xlm_roberta,
    "llama": _llama,
}
