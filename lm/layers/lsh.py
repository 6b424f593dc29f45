"""Attention of shared queries and keys to what hashes alike, in time and memory linear in the length but for a sort."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UsageError, check_choice, check_positive
from lm.layers.local import HIDDEN, check_window, fitted, in_chunks, products, visible, weighted, window

MASKINGS = ("buckets", "chunks")
_SELF = (
    -1e5
)  # The score of a token with itself (Kitaev et al. 2020, appendix A): all that it has where nothing else is.
_LENGTH_EPS = 1e-6  # Of trax's and transformers' normalisation of keys.


@dataclasses.dataclass(frozen=True)
class LSH:
    """Attention by locality-sensitive hashing in `rounds` (Kitaev et al. 2020, 2001.04451, section 2).

    Tokens are sorted by bucket and cut into chunks of `chunk`; each chunk sees itself, `before` chunks before and
    `after` behind it. `buckets` are even numbers; two hash by two rotations each, and None takes two buckets a chunk, a
    power of two. `masking`: "buckets" is the paper's (appendix A), a token attends to those in its own bucket, and to
    one that it meets in several rounds as if in one; "chunks" is transformers', to all that lie in its window.
    """

    rounds: int = 1
    chunk: int = 64
    before: int = 1
    after: int = 0
    buckets: tuple[int, ...] | None = None
    masking: str = "buckets"
    dropout: float = 0.0

    def __post_init__(self):
        check_window(self)
        check_positive(rounds=self.rounds)
        check_choice("masking", self.masking, MASKINGS)
        if self.buckets is not None and (not self.buckets or any(n < 2 or n % 2 for n in self.buckets)):
            raise UsageError(f"buckets={self.buckets} must hold even numbers, one for each factor, such as (64,)")

    def factors(self, length: int, max_len: int) -> tuple[int, ...]:
        """The buckets of a sequence of `length`, in factors; where not set, as transformers chooses them.

        Twice as many as chunks, down to a power of two, and in two factors above a bound that follows `max_len`.
        """
        if self.buckets is not None:
            return self.buckets
        power = (2 * (length // self.chunk)).bit_length() - 1
        bound = 2 * max(math.isqrt(max_len // self.chunk), self.chunk)
        return (2**power,) if 2**power <= bound else (2 ** (power // 2), 2 ** (power - power // 2))


def draw_rotations(form: LSH, factors: tuple[int, ...], heads: int, head_dim: int, key: jax.Array) -> jax.Array:
    """[H, C, rounds, sum of factors / 2] in float32, normal: one random rotation a head and round."""
    return jax.random.normal(key, (heads, head_dim, form.rounds, sum(factors) // 2))


def hash_buckets(
    factors: tuple[int, ...], x_BLHC: jax.Array, rotations_HCRK: jax.Array, padding_BL: jax.Array | None = None
) -> jax.Array:
    """buckets_BHRL, the smallest integers that hold them: argmax of [xR; -xR] (Andoni et al. 2015, 1509.02897).

    Without a gradient. Padding has a bucket of its own behind all others.
    """
    x = jax.lax.stop_gradient(x_BLHC).astype(jnp.float32)
    rotated = jnp.einsum("blhc,hcrk->bhrlk", x, rotations_HCRK.astype(jnp.float32))
    buckets, first, stride = jnp.zeros(rotated.shape[:-1], jnp.int32), 0, 1
    for factor in factors:
        part = rotated[..., first : first + factor // 2]
        buckets = buckets + stride * jnp.argmax(jnp.concatenate([part, -part], -1), -1)
        first, stride = first + factor // 2, stride * factor
    if padding_BL is not None:
        buckets = jnp.where(padding_BL[:, None, None], stride, buckets)
    return buckets.astype(jnp.int16 if stride < 2**15 else jnp.int32)


def lsh_attention(
    form: LSH,
    qk_BLHC: jax.Array,
    v_BLHC: jax.Array,
    buckets_BHRL: jax.Array,
    *,
    causal: bool,
    documents: tuple[jax.Array, jax.Array] | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """o_BLHC: each round's attention by its softmax normaliser; L is a multiple of the chunk, or within one.

    Keys are the queries, normalised to length 1 (paper, section 2), where the scale of C^-0.5 leaves them. A token
    attends to itself where it sees nothing else. `documents`, (of queries, of keys) [B, L], keeps attention inside
    equal numbers; `key` turns dropout of the weights on. Chunks go round, from one round's last to the next one's
    first, as in transformers; masking="buckets" lets none see across.
    """
    B, L, H, C = qk_BLHC.shape
    R, form = buckets_BHRL.shape[2], fitted(form, L)
    order = jnp.argsort(buckets_BHRL, -1, stable=True)
    inverse = jnp.argsort(order, -1)

    def chunks(x_BHRL):
        return in_chunks(x_BHRL.reshape(B, H, R * L, *x_BHRL.shape[4:]), form.chunk)

    def sorted_chunks(x_BHL):
        return chunks(jnp.take_along_axis(x_BHL[:, :, None], order, 3))

    q, v = (chunks(_permuted(x.transpose(0, 2, 1, 3)[:, :, None], order, inverse)) for x in (qk_BLHC, v_BLHC))
    places = chunks(order)
    key_places = window(form, places)
    seen = visible(places, key_places, causal)
    if documents is not None:
        of_queries, of_keys = (sorted_chunks(x[:, None]) for x in documents)
        seen = seen & (of_queries[..., None] == window(form, of_keys)[..., None, :])
    scores = products(q, window(form, _normalized(q) * C**-0.5))
    if form.masking == "buckets":
        meetings = _meetings(form, buckets_BHRL, inverse // form.chunk, sorted_chunks)
        seen = seen & _in_round(form, R, L // form.chunk) & _same(form, chunks(jnp.sort(buckets_BHRL, -1)))
        scores = scores - jnp.log(meetings)
    scores = jnp.where(places[..., None] == key_places[..., None, :], _SELF, scores)
    o, total = weighted(jnp.where(seen, scores, HIDDEN), window(form, v), form.dropout, key)
    o, total = (_permuted(x.reshape(B, H, R, L, -1), inverse, order) for x in (o, total))
    share = jnp.exp(total - jax.nn.logsumexp(total, 2, keepdims=True))
    if form.masking == "buckets":
        # Near _SELF float32 has steps of 1/128, which transformers leaves in: a lone token's shares are 0.3 % off.
        share = share / jnp.sum(share, 2, keepdims=True)
    return jnp.sum(o * share, 2).astype(v_BLHC.dtype).transpose(0, 2, 1, 3)


def _normalized(x):
    """x with a root mean square of 1."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + _LENGTH_EPS)).astype(x.dtype)


def _same(form, x_BHZQ):
    """[B, H, Z, Q, W]: where a query's value is that of a key in its window."""
    return x_BHZQ[..., None] == window(form, x_BHZQ)[..., None, :]


def _in_round(form, rounds, chunks):
    """[1, 1, Z, 1, W]: which of a window's chunks are neighbours in the same round, not round its end."""
    steps = np.repeat(np.arange(-form.before, form.after + 1), form.chunk)
    place = np.arange(chunks)[:, None] + steps
    return np.tile((place >= 0) & (place < chunks), (rounds, 1))[None, None, :, None]


def _meetings(form, buckets_BHRL, chunk_BHRL, sorted_chunks):
    """[B, H, Z, Q, W] float32, at least 1: in how many rounds query and key share a bucket within a window.

    The paper's N_ij counts equal buckets (eq. 7), whether or not chunks let the two meet; this is the count that makes
    all rounds together one softmax over what is attended to, as in the authors' trax.
    """
    count: jax.Array | int = 0
    for r in range(buckets_BHRL.shape[2]):
        place = sorted_chunks(chunk_BHRL[:, :, r])
        step = window(form, place)[..., None, :] - place[..., None]
        near = (step >= -form.before) & (step <= form.after)
        count = count + (near & _same(form, sorted_chunks(buckets_BHRL[:, :, r])))
    return jnp.maximum(count, 1).astype(jnp.float32)


@jax.custom_vjp
def _permuted(x_BHRLC, order_BHRL, inverse_BHRL):
    """x in another order in each round; where R is 1, the same x in all. Its gradient is a gather too, no scatter."""
    return jnp.take_along_axis(x_BHRLC, order_BHRL[..., None], 3)


def _permuted_forward(x, order, inverse):
    return _permuted(x, order, inverse), (x.shape[2], inverse)


def _permuted_backward(residuals, g):
    rounds, inverse = residuals
    dx = jnp.take_along_axis(g, inverse[..., None], 3)
    return dx if rounds == dx.shape[2] else jnp.sum(dx, 2, keepdims=True), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
