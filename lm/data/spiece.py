"""SentencePiece models of others, as the classes of transformers read them.

Each function gives (tokenizer, {special token's field: the class's name for it}) of a model file and the folder's
settings.
"""

import pathlib
import re
from collections.abc import Callable
from typing import Any

from lm.core.errors import UsageError
from lm.data.special import OF_BERT, OF_LLAMA, OF_ROBERTA, OF_T5, name_of

SPACE = "\u2581"  # Stands for a space.
Build = Callable[[pathlib.Path, dict[str, Any]], tuple[Any, dict[str, str]]]


def _t5(file, settings):
    model = _model(file)
    extra = [f"<extra_id_{i}>" for i in reversed(range(settings.get("extra_ids", 100)))]
    vocab = [(p.piece, p.score) for p in model.pieces] + [(name, 0.0) for name in extra]
    return _unigram(model, vocab, 2, [], "always", extra), OF_T5


def _albert(file, settings):
    model = _model(file)
    steps = _quotes() + ([] if settings.get("keep_accents") else _no_accents())
    scheme = "always" if settings.get("add_prefix_space", True) else "never"
    names = OF_BERT | {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "<unk>", "pad_token": "<pad>"}
    vocab = [(p.piece, p.score) for p in model.pieces]
    return _unigram(model, vocab, 1, steps + _lower(settings, True), scheme), names


def _xlnet(file, settings):
    model = _model(file)
    names = OF_ROBERTA | {"sep_token": "<sep>", "cls_token": "<cls>"}
    vocab, steps = [(p.piece, p.score) for p in model.pieces], _quotes() + _no_accents() + _lower(settings, False)
    return _unigram(model, vocab, model.trainer_spec.unk_id, steps, _scheme(settings, True)), names


def _xlm_roberta(file, settings):
    # fairseq's order of the first ids, and one for <mask> after all.
    model = _model(file)
    first = [name_of(settings, OF_ROBERTA, f"{n}_token") for n in ("bos", "pad", "eos", "unk")]
    last = name_of(settings, OF_ROBERTA, "mask_token")
    vocab = [(n, 0.0) for n in first] + [(p.piece, p.score) for p in model.pieces[3:]] + [(last, 0.0)]
    scheme = "always" if settings.get("add_prefix_space", True) else "never"
    return _unigram(model, vocab, 3, [], scheme), OF_ROBERTA


def _llama(file, settings):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model = _model(file)
    vocab = {p.piece: i for i, p in enumerate(model.pieces)}
    merges = [(a, b) for piece in vocab for a, b in _halves(piece) if a in vocab and b in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    prefix = settings.get("add_prefix_space")
    prefix = True if prefix is None else prefix
    scheme = _scheme(settings | {"legacy": settings.get("legacy", False)}, prefix)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if prefix else []))
    _add_controls(tokenizer, model)
    return tokenizer, OF_LLAMA


def _any_pieces(file, settings):
    """As the model's own settings say."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = _model(file)
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
        steps.append(normalizers.Replace(" ", SPACE))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2))
    tokenizer.normalizer = normalizers.Sequence(steps)
    splits: list[Any] = []
    if spec.add_dummy_prefix:
        splits.append(pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=False))
    if own:
        pattern = "|".join(re.escape(piece) for piece in sorted(own, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
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
    spaces = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
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


def _model(file):
    from google.protobuf.message import DecodeError

    try:
        return proto(file.read_bytes())
    except DecodeError as error:
        raise UsageError(f"{file} is no SentencePiece model: {error}") from None


FAMILIES: dict[str, Build] = {
    "": _any_pieces,
    "t5": _t5,
    "mt5": _t5,
    "albert": _albert,
    "xlnet": _xlnet,
    "xlmroberta": _xlm_roberta,
    "llama": _llama,
}
