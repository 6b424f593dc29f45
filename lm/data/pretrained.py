"""Tokenizers of others: a tokenizer.json of Hugging Face's, run by their library."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lm.core.errors import UsageError
from lm.data.tokenizers import Tokenizer

_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[SEP]")
_SYNONYMS = {  # Of RoBERTa, BART and XLNet for the names of BERT, and the other way round.
    "<pad>": ("[PAD]",),
    "[MASK]": ("<mask>",),
    "[CLS]": ("<cls>", "<s>"),
    "[SEP]": ("<sep>", "</s>"),
}


class Pretrained(Tokenizer):
    """The text functions of a tokenizer.json; whether text comes back whole is up to it.

    `eos_id` is that of the first token in the file that commonly ends a text.
    """

    kind, file_name = "pretrained", "tokenizer.json"

    def __init__(self, content: bytes):
        try:
            import tokenizers
        except ImportError:
            raise UsageError("a tokenizer.json needs the package tokenizers: pip install -e '.[hf]'") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # The library raises bare Exceptions.
            raise UsageError(f"this is no tokenizer.json that can be read: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._content = content
        ids = (self._tokenizer.token_to_id(token) for token in _ENDS)
        self.eos_id = next((i for i in ids if i is not None), None)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: some files leave gaps."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Without the special tokens that the file may put around a text."""
        found = self._tokenizer.encode_batch([_utf8(text) for text in texts], add_special_tokens=False)
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


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
