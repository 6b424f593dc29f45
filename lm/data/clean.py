"""Pure functions from bytes and strings of any origin to text that every tokenizer takes."""

import re
import string
from collections.abc import Iterator

REPLACEMENT = "\ufffd"
_SURROGATES = re.compile("[\ud800-\udfff]")
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]+")


def decode(data: bytes) -> tuple[str, int]:
    """The text of UTF-8 bytes, and how many malformed sequences in it became U+FFFD."""
    text = data.decode("utf-8", "replace")
    return text, text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())


def sanitize(text: str) -> tuple[str, int]:
    """`text` with each lone surrogate, which UTF-8 cannot hold, as U+FFFD; and their number."""
    return (text, 0) if text.isascii() else _SURROGATES.subn(REPLACEMENT, text)


def fold(text: str) -> str:
    """`text` in lower case, with a blank for each run of ASCII punctuation."""
    return _PUNCTUATION.sub(" ", text).lower()


def utf8_cut(data: bytes | bytearray, limit: int) -> int:
    """The largest position up to `limit` (> 3) that divides no character of UTF-8 `data`."""
    cut = min(limit, len(data))
    for back in range(4):
        # Continuation bytes are 10xxxxxx; where four in a row are malformed anyway, any cut will do.
        if cut == len(data) or data[cut - back] & 0xC0 != 0x80:
            return cut - back
    return cut


def blocks(text: str, limit: int) -> Iterator[str]:
    """`text` in order as parts of at most `limit` characters.

    Parts end after a newline, else before a space, else anywhere: our tokenizers join neither of the
    first two to what follows, so that the parts encode as the whole does.
    """
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1
        if end <= start:
            end = text.rfind(" ", start + 1, start + limit)
        if end <= start:
            end = start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
