"""Which ids of a vocabulary are words, which begin one, and which end a sentence."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data.tokenizers import END, UNKNOWN

# How pieces of the kinds of tokenizers show a word's begin, or with "##" its continuation.
_MARKS = ("\u2581", "\u0120", "##")  # SentencePiece, byte-level BPE, WordPiece.
_STOPS, _CLOSING = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f"), " \"')]\u201d\u2019\u300d\u300f"
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def is_word(pieces: Sequence[str]) -> np.ndarray:
    """bool, one for each of a vocabulary's pieces: not those that end a line or stand for unknown words."""
    return ~np.isin(pieces, (UNKNOWN, END))


def word_starts(tokenizer: Any) -> np.ndarray:
    """bool [vocabulary]: whether an id begins a word; the others continue the word before them.

    The mark that the most pieces bear decides, a space counting with the word after it. Without marks, words are runs
    of letters and digits. In either case punctuation stands alone, and so does each ideograph, which no space parts
    from the next. Bytes above 127 are parts of letters.
    """
    pieces = tokenizer.pieces
    if tokenizer.kind in ("word", "folded"):
        return np.ones(len(pieces), bool)
    count, mark = max((sum(piece.startswith(mark) for piece in pieces), mark) for mark in _MARKS)
    if count and mark == "##":
        return np.array([not piece.startswith(mark) for piece in pieces])
    return np.array([bool(count) and piece.startswith(mark) or _stands_alone(piece) for piece in pieces])


def sentence_ends(tokenizer: Any) -> np.ndarray:
    """bool [vocabulary]: the ids whose text ends a sentence or a line, and the one that ends a document."""
    texts = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    ends = np.array(["\n" in text or text.rstrip(_CLOSING).endswith(_STOPS) for text in texts])
    if tokenizer.eos_id is not None:
        ends[tokenizer.eos_id] = True
    return ends


def _stands_alone(piece: str) -> bool:
    if byte := _BYTE.fullmatch(piece):
        code = int(byte[1], 16)
        return code < 128 and not chr(code).isalnum()
    return not piece[:1].isalnum() or "\u4e00" <= piece[0] <= "\u9fff"
