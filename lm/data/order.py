"""Where the i-th example starts, in closed form: nothing is stored, and any example is as near as the first."""

import math

import numpy as np

from lm.core.errors import UsageError

_ROUNDS = 6
_ROUND_KEY = np.uint64(0xD1342543DE82EF95)  # An odd number from Steele and Vigna 2021: rounds get keys far apart.


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """The images of `index` under a permutation of range(size), one for each `key`; int64.

    A Feistel network over the pairs (l, r) of an a x b rectangle just above `size` (additions in place of
    xor), walked again where it leaves the range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    a = max(1, math.isqrt(size - 1) + 1)
    b = -(-size // a)
    index = np.array(index, np.int64)
    key = np.broadcast_to(np.asarray(key, np.uint64), index.shape)
    outside = np.ones(index.shape, bool)
    while outside.any():
        index[outside] = _feistel(index[outside], a, b, key[outside])
        outside = index >= size
    return index


def shuffled(index: np.ndarray, tokens: int, length: int, window: int, seed: int) -> np.ndarray:
    """Starts of windows, int64: each epoch a new permutation of strides of `length`, from a new offset.

    An epoch has `shuffled_examples`; its offset is below `length` where the split is long enough.
    """
    examples = shuffled_examples(tokens, length, window)
    epoch, place = np.divmod(np.asarray(index, np.int64), examples)
    key = mix(epoch.astype(np.uint64) + mix(np.array([seed], np.uint64)))
    slack = min(length, tokens - window - (examples - 1) * length + 1)
    offset = (mix(key) % np.uint64(slack)).astype(np.int64)
    return permute(place, examples, key) * length + offset


def shuffled_examples(tokens: int, length: int, window: int) -> int:
    """The examples of one epoch."""
    return max(1, (tokens - window) // length)


def lanes(index: np.ndarray, tokens: int, length: int, window: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts int64, resets bool): the text in `count` parts, row r of a step continuing row r of the one before.

    Every lane starts over together, with `resets` true, after `lane_steps`.
    """
    steps = lane_steps(tokens, length, window, count)
    step, lane = np.divmod(np.asarray(index, np.int64), count)
    place = step % steps
    return (lane * steps + place) * length, place == 0


def lane_steps(tokens: int, length: int, window: int, count: int) -> int:
    """The steps of one epoch; raises UsageError where a lane would be shorter than one."""
    steps = (tokens - (window - length)) // (count * length)
    if steps < 1:
        raise UsageError(
            f"{tokens} tokens are too few for {count} lanes of {length}: lower train.batch_size or train.seq_len"
        )
    return steps


def sequential_examples(tokens: int, length: int, window: int) -> int:
    """The examples of `length` that cover the text once: a window's first `window - length` tokens are context."""
    return max(1, -(-(tokens - (window - length)) // length))


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 arrays that scatters neighbours: SplitMix64's step (Steele, Lea and Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(index: np.ndarray, a: int, b: int, key: np.ndarray) -> np.ndarray:
    rows, columns = np.uint64(a), np.uint64(b)
    left, right = np.divmod(index.astype(np.uint64), columns)
    for _ in range(_ROUNDS // 2):
        left = (left + mix(right + key) % rows) % rows
        right = (right + mix(left ^ key) % columns) % columns
        key = key + _ROUND_KEY
    return (left * columns + right).astype(np.int64)
