"""Tokenizers of others: a tokenizer.json of Hugging Face's, run by their library."""

import collections
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm.core.errors import UsageError
from lm.data import clean
from lm.data.tokenizers import Tokenizer

_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[SEP]")
_SYNONYMS = {  # Of RoBERTa, BART and XLNet for the names of BERT, and the other way round.
    "<pad>": ("[PAD]",),
    "[MASK]": ("<mask>",),
    "[CLS]": ("<cls>", "<s>"),
    "[SEP]": ("<sep>", "</s>"),
}
_PRIVATE = 0xF0000  # Where Unicode's largest private area begins.


class Pretrained(Tokenizer):
    """The text functions of a tokenizer.json; whether text comes back whole is up to it, and often it does not.

    Bits per byte of text that does not come back are too low. `eos_id` is that of the first token in the file that
    commonly ends a text.
    """

    file_name = "tokenizer.json"

    def __init__(self, content: bytes):
        tokenizers = _library("a tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # The library raises bare Exceptions.
            raise UsageError(f"this is no tokenizer.json that can be read: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._content = content
        ids = (self._tokenizer.token_to_id(token) for token in _ENDS)
        self.eos_id = next((i for i in ids if i is not None), None)

    @functools.cached_property
    def kind(self) -> str:  # type: ignore[override]  # The others' is a constant.
        """ "wordpiece", or "pretrained" for all that are not trained here."""
        return "wordpiece" if json.loads(self._content)["model"].get("type") == "WordPiece" else "pretrained"

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: some files leave gaps."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Without the special tokens that the file may put around a text."""
        found = self._tokenizer.encode_batch([clean.sanitize(text)[0] for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def piece(self, index: int) -> str:
        return self._tokenizer.id_to_token(index) or f"<unused {index}>"

    def special(self, name: str) -> int | None:
        ids = (self._tokenizer.token_to_id(token) for token in (name, *_SYNONYMS.get(name, ())))
        return next((i for i in ids if i is not None), None)

    def serialize(self) -> bytes:
        return self._content

    def __reduce__(self) -> tuple[Any, ...]:
        return Pretrained, (self._content,)


def is_pretrained(content: bytes) -> bool:
    """Whether a JSON file is one of Hugging Face's rather than ours."""
    try:
        data = json.loads(content)
    except ValueError:
        return False
    return isinstance(data, dict) and "model" in data and "kind" not in data


def train_wordpiece(documents: Iterable[str], vocab_size: int, lowercase: bool = False) -> Pretrained:
    """BERT's WordPiece (Devlin et al. 2018, 1810.04805; Wu et al. 2016, 1609.08144) in the form of a tokenizer.json.

    Words and punctuation marks are split into pieces, "##" before those that continue a word; the ids begin with [PAD],
    [UNK], [CLS], [SEP], [MASK]. What comes back has single spaces for all whitespace, spaces of its own around marks
    and between Chinese characters, no control characters, and [UNK] for a word with a character outside the
    vocabulary, which has the 1,000 most frequent of the text at most; with `lowercase` no capitals and no accents.
    """
    tokenizers = _library("kind wordpiece")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    texts = (tokenizer.normalizer.normalize_str(document) for document in documents)
    words = collections.Counter(word for text in texts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += _word_pieces(words, vocab_size - len(pieces))
    if len(pieces) != vocab_size:
        raise UsageError(
            f"kind wordpiece cannot learn vocab_size={vocab_size} from this text: it gives {len(pieces)} ids"
        )
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer.model = tokenizers.models.WordPiece(vocab, unk_token="[UNK]")
    tokenizer.add_special_tokens(pieces[:5])
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return Pretrained(tokenizer.to_str().encode())


def _word_pieces(words: Mapping[str, int], size: int) -> list[str]:
    """The characters and the `size` - characters most useful pieces, by joining the most frequent pairs.

    The library's own trainer for this numbers "##" characters in the order of a hash table: other pieces each time.
    Its BPE is the same algorithm with fixed numbers, once characters that continue a word are letters of their own.
    """
    import tokenizers

    counts: collections.Counter[str] = collections.Counter()
    for word, count in words.items():
        counts.update(dict.fromkeys(word, count))
    kept = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:1000])
    letters = {c: (chr(_PRIVATE + 2 * i), chr(_PRIVATE + 2 * i + 1)) for i, c in enumerate(kept)}
    spelled = (
        letters[word[0]][0] + "".join(letters[c][1] for c in word[1:]) if letters.keys() >= set(word) else ""
        for word in sorted(words)
        for _ in range(words[word])
    )
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, min_frequency=2, show_progress=False)
    model.train_from_iterator(spelled, trainer)
    found = sorted(model.get_vocab().items(), key=lambda item: item[1])
    places = [[divmod(ord(letter) - _PRIVATE, 2) for letter in piece] for piece, _ in found]
    return ["##" * place[0][1] + "".join(kept[i] for i, _ in place) for place in places]


def _library(what: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UsageError(f"{what} needs the package tokenizers: pip install -e '.[hf]'") from None
    return tokenizers
