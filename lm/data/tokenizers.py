"""Text to ids and back: bytes, characters, words, and lossless SentencePiece pieces.

bpe and unigram give back every text exactly, word its words and line ends, folded those without capitals and
punctuation, and wordpiece what BERT's form keeps (see lm.data.pretrained.train_wordpiece). A tokenizer is one file,
`tokenizer.model` for SentencePiece's two kinds and `tokenizer.json` for the others.
"""

import collections
import hashlib
import io
import json
import os
import random
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from lm.core import files
from lm.core.errors import UsageError, check_choice
from lm.data import clean, huggingface, spiece

KINDS = ("byte", "char", "word", "folded", "bpe", "unigram", "wordpiece")
UNKNOWN, END = "<unk>", "<eos>"
_PIECES_SIZE = 8192  # For bpe, unigram and wordpiece without a size.
_BLOCK_CHARACTERS = 1 << 18  # What SentencePiece gets at once: its memory is some 100 bytes a character.
_SPACE_MARK = "\u2581"  # SentencePiece writes it for a space and cannot tell the two apart.


class Tokenizer(Protocol):
    """What every kind has. `eos_id` ends a document; None where the vocabulary has no such id."""

    kind: str
    file_name: str
    eos_id: int | None

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> np.ndarray:
        """The ids, [tokens] int32; a lone surrogate in `text` counts as U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text; bytes that form no character, and ids outside the vocabulary, become U+FFFD."""
        ...

    def piece(self, index: int) -> str:
        """A readable name of one id."""
        ...

    def special(self, name: str) -> int | None:
        """The id of a special token, such as "[MASK]", where the vocabulary has it under that name or a synonym."""
        return None

    def serialize(self) -> bytes:
        """The content of the tokenizer's file."""
        ...

    @property
    def pieces(self) -> list[str]:
        return [self.piece(i) for i in range(self.vocab_size)]

    @property
    def digest(self) -> str:
        """The sha256 of the tokenizer's file."""
        return hashlib.sha256(self.serialize()).hexdigest()

    def save(self, name: str | os.PathLike) -> str:
        """The path of the file, written into the folder `name` or as the file `name`."""
        name = os.fspath(name)
        if files.path(name).is_dir():
            name = os.path.join(name, self.file_name)
        files.write_bytes(name, self.serialize())
        return name


class Byte(Tokenizer):
    """256 ids, the bytes of UTF-8."""

    kind, file_name, eos_id, vocab_size = "byte", "tokenizer.json", None, 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(_utf8(text), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return _join_bytes(ids, self._table)

    def piece(self, index: int) -> str:
        return f"<0x{index:02X}>"

    def serialize(self) -> bytes:
        return _to_json({"kind": self.kind})

    _table = [bytes([i]) for i in range(256)]


class Char(Tokenizer):
    """The id of a character is its rank among the sorted characters; `<unk>`, if there is one, comes last."""

    kind, file_name, eos_id = "char", "tokenizer.json", None

    def __init__(self, symbols: str, has_unknown: bool = False):
        self.symbols, self.has_unknown = symbols, has_unknown
        codes = np.array([ord(c) for c in symbols], np.int64)
        if len(codes) == 0 or (np.diff(codes) <= 0).any():
            raise UsageError("a char tokenizer needs at least one character, in ascending order and without repeats")
        self._ids = np.full(codes[-1] + 2, len(codes) if has_unknown else -1, np.int32)
        self._ids[codes] = np.arange(len(codes))

    @property
    def vocab_size(self) -> int:
        return len(self.symbols) + self.has_unknown

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(clean.sanitize(text)[0]) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if not self.has_unknown and (ids < 0).any():
            character = text[int(np.argmax(ids < 0))]
            raise UsageError(f"character {character!r} is not in the vocabulary: train kind char with a size for <unk>")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.symbols[i] if 0 <= i < len(self.symbols) else clean.REPLACEMENT for i in _ints(ids))

    def piece(self, index: int) -> str:
        return UNKNOWN if index == len(self.symbols) else self.symbols[index]

    def serialize(self) -> bytes:
        return _to_json({"kind": self.kind, "symbols": self.symbols, "has_unknown": self.has_unknown})


class Word(Tokenizer):
    """Whitespace-separated words; each newline is the id `<eos>`, as on Penn Treebank.

    Kind "folded" has those of the text without capitals and punctuation, see lm.data.clean.fold.
    """

    file_name = "tokenizer.json"

    def __init__(self, words: Sequence[str], kind: str = "word"):
        self.words, self.kind = list(words), kind
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words) or END not in self._ids:
            raise UsageError(f"a word tokenizer needs distinct words, {END} among them")
        self.eos_id = self._ids[END]
        self._unknown = self._ids.get(UNKNOWN, -1)

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(clean.sanitize(text)[0]) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        words = _words(text, self.kind)
        ids = np.fromiter((self._ids.get(word, self._unknown) for word in words), np.int32, len(words))
        if self._unknown < 0 and (ids < 0).any():
            word = words[int(np.argmax(ids < 0))]
            raise UsageError(f"word {word!r} is not in the vocabulary: train kind {self.kind} with a size for <unk>")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        words = (self.words[i] if 0 <= i < len(self.words) else clean.REPLACEMENT for i in _ints(ids))
        return re.sub(" ?\n ?", "\n", " ".join("\n" if word == END else word for word in words))

    def piece(self, index: int) -> str:
        return self.words[index]

    def special(self, name: str) -> int | None:
        """Of "</s>", which is `<eos>` here."""
        return self.eos_id if name == "</s>" else None

    def serialize(self) -> bytes:
        return _to_json({"kind": self.kind, "words": self.words})


class Pieces(Tokenizer):
    """A SentencePiece model, kind bpe or unigram, without loss: what has no piece is spelled in bytes."""

    file_name = "tokenizer.model"

    def __init__(self, model: bytes):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as error:
            raise UsageError(f"this is no SentencePiece model: {error}") from None
        self._content = model
        self._table = [self._bytes(i) for i in range(self.vocab_size)]
        if not self._table or not self._model.is_byte(self._model.piece_to_id("<0x00>")):
            raise UsageError("this SentencePiece model has no byte fallback, so that it would lose text")
        self._mark_ids = np.array([self._model.piece_to_id(f"<0x{b:02X}>") for b in _SPACE_MARK.encode()], np.int32)
        eos = self._model.eos_id()
        self.eos_id = eos if eos >= 0 else None
        self.kind = _model_kind(model)

    @property
    def vocab_size(self) -> int:
        return self._model.get_piece_size()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # One flat list over all blocks lets SentencePiece's own threads share long documents too.
        flat: list[str | None] = []
        counts: list[int] = []
        for text in texts:
            before = len(flat)
            for i, part in enumerate(clean.sanitize(text)[0].split(_SPACE_MARK)):
                flat += [None] * (i > 0) + list(clean.blocks(part, _BLOCK_CHARACTERS))
            counts.append(len(flat) - before)
        encoded = iter(self._model.encode([b for b in flat if b is not None], num_threads=os.cpu_count() or 1))
        arrays = [self._mark_ids if b is None else np.array(next(encoded), np.int32) for b in flat]
        ends = np.cumsum(counts)
        empty = np.zeros(0, np.int32)
        return [np.concatenate([empty, *arrays[end - n : end]]) for n, end in zip(counts, ends, strict=True)]

    def decode(self, ids: Iterable[int]) -> str:
        return _join_bytes(ids, self._table)

    def piece(self, index: int) -> str:
        return self._model.id_to_piece(index)

    def special(self, name: str) -> int | None:
        """Of the control pieces, which no text becomes: "</s>"."""
        index = self._model.piece_to_id(name)
        return index if self._model.is_control(index) and self.piece(index) == name else None

    def serialize(self) -> bytes:
        return self._content

    def __reduce__(self) -> tuple[Any, ...]:
        return Pieces, (self._content,)

    def _bytes(self, index: int) -> bytes:
        piece = self._model.id_to_piece(index)
        if self._model.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_control(index):
            return b""
        return piece.replace(_SPACE_MARK, " ").encode()


def parse(text: str) -> tuple[str, int | None]:
    """(kind, size) of "KIND[:VOCAB_SIZE]"; raises UsageError for an unknown kind or no number."""
    kind, colon, size = text.partition(":")
    check_choice("kind of tokenizer", kind, KINDS)
    if colon and not (size.isdecimal() and int(size) > 0):
        raise UsageError(f"tokenizer {text!r}: the size after the colon must be a whole number above 0")
    return kind, int(size) if colon else None


def train(
    kind: str,
    documents: Iterable[str],
    vocab_size: int | None = None,
    *,
    seed: int = 0,
    sample_characters: int = 16_000_000,
    lowercase: bool = False,
) -> Tokenizer:
    """A tokenizer of `vocab_size` ids, which is the same for the same arguments.

    char, word and folded without a size keep every type; with one, the most frequent and `<unk>`. bpe, unigram and
    wordpiece (8,192 without a size) learn from a random sample of at most `sample_characters`. `lowercase` is
    wordpiece's alone.
    """
    check_choice("kind of tokenizer", kind, KINDS)
    if lowercase and kind != "wordpiece":
        raise UsageError(f"lowercase=True has no effect on kind {kind}, which keeps the text: leave it out")
    if kind == "byte":
        if vocab_size not in (None, 256):
            raise UsageError(f"kind byte has 256 ids, not vocab_size={vocab_size}: leave the size out")
        return Byte()
    if kind == "char":
        return _train_char(documents, vocab_size)
    if kind in ("word", "folded"):
        return _train_word(documents, vocab_size, kind)
    sample, size = _sample(documents, sample_characters, seed), vocab_size or _PIECES_SIZE
    if kind == "wordpiece":
        from lm.data import pretrained

        return pretrained.train_wordpiece(sample, size, lowercase)
    return _train_pieces(kind, sample, size)


def load(name: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a file, or of a folder that holds one: a run's, a corpus's or Hugging Face's.

    Raises UsageError where it cannot be read.
    """
    path = files.path(name)
    if path.is_dir():
        own = [path / f for f in (Pieces.file_name, Byte.file_name) if (path / f).exists()]
        if not own or huggingface.is_folder(path):
            return deserialize(huggingface.tokenizer_json(path), str(path))
        path = own[0]
    if not path.exists():
        raise UsageError(f"there is no tokenizer file {path}; or give a kind, one of {', '.join(KINDS)}")
    return deserialize(path.read_bytes(), str(path))


def deserialize(content: bytes, name: str = "the tokenizer") -> Tokenizer:
    """The tokenizer whose file has this content; `name` is for the error."""
    if not content.lstrip().startswith(b"{"):
        return Pieces(content)
    from lm.data import pretrained

    if pretrained.is_pretrained(content):
        return pretrained.Pretrained(content)
    try:
        data = json.loads(content)
        kind = data["kind"]
        if kind == "byte":
            return Byte()
        if kind == "char":
            return Char(data["symbols"], data["has_unknown"])
        if kind in ("word", "folded"):
            return Word(data["words"], kind)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{name} is damaged: {error}") from None
    raise UsageError(f"{name} has kind {kind!r}, which this version does not read")


def _train_char(documents: Iterable[str], size: int | None) -> Char:
    counts: collections.Counter[str] = collections.Counter()
    for text in documents:
        counts.update(clean.sanitize(text)[0])
    kept = counts if size is None else [c for c, _ in _most_common(counts, size - 1)]
    return Char("".join(sorted(kept)), has_unknown=size is not None)


def _train_word(documents: Iterable[str], size: int | None, kind: str) -> Word:
    counts: collections.Counter[str] = collections.Counter()
    for text in documents:
        for block in clean.blocks(clean.sanitize(text)[0], _BLOCK_CHARACTERS):
            counts.update(_words(block, kind))
    special = [END] + [UNKNOWN] * (size is not None or UNKNOWN in counts)
    rest = _most_common({w: n for w, n in counts.items() if w not in special}, size and max(0, size - len(special)))
    return Word(special + [word for word, _ in rest], kind)


def _train_pieces(kind: str, sample: Iterable[str], size: int) -> Pieces:
    import sentencepiece

    # SentencePiece skips lines above 4,192 bytes, and never joins a piece across a newline here.
    lines = (part for text in sample for line in text.split("\n") for part in clean.blocks(line, 1000))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=kind,
            vocab_size=size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=16,  # Unigram's sums are split by it: a fixed number gives the same model on every machine.
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or "the text is empty"
        raise UsageError(f"kind {kind} cannot learn vocab_size={size} from this text: {reason}") from None
    return Pieces(model.getvalue())


def _sample(documents: Iterable[str], limit: int, seed: int) -> list[str]:
    """Blocks of the documents, in order: all of them, or those with the smallest of one random number each."""
    rng = random.Random(seed)
    kept, total, threshold = [], 0, 1.0
    for text in documents:
        for block in clean.blocks(clean.sanitize(text)[0], 1 << 16):
            number = rng.random()
            if number < threshold:
                kept.append((number, block))
                total += len(block)
            while total > limit:
                threshold /= 2
                kept = [pair for pair in kept if pair[0] < threshold]
                total = sum(len(block) for _, block in kept)
    return [block for _, block in kept]


def _model_kind(model: bytes) -> str:
    return {1: "unigram", 2: "bpe"}.get(spiece.proto(model).trainer_spec.model_type, "bpe")


def _words(text: str, kind: str) -> list[str]:
    text = clean.fold(text) if kind == "folded" else text
    return text.replace("\n", f" {END} ").split()


def _most_common(counts: dict[str, int], limit: int | None) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]


def _join_bytes(ids: Iterable[int], table: Sequence[bytes]) -> str:
    lost = clean.REPLACEMENT.encode()
    return b"".join(table[i] if 0 <= i < len(table) else lost for i in _ints(ids)).decode("utf-8", "replace")


def _ints(ids: Iterable[int]) -> list[int]:
    return np.asarray(ids).reshape(-1).tolist() if isinstance(ids, np.ndarray) else [int(i) for i in ids]


def _utf8(text: str) -> bytes:
    return clean.sanitize(text)[0].encode()


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
