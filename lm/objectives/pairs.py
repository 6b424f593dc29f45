"""Tell whether two segments belong together in this order."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UsageError, check_choice
from lm.objectives.mlm import MaskedLM, pick

KINDS = ("nsp", "sop")
_TRIES = 8  # Draws of another document until one is as long as the continuation it stands in for.


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Two segments of a document, in half of the rows not as they were, and masked language modelling beside.

    "nsp": the second segment is from anywhere in another document (next-sentence prediction; BERT, 1810.04805,
    section 3.1). "sop": the two change places (sentence-order prediction; ALBERT, 1909.11942, section 3.1). A fair
    coin decides; class 0 is the text as it was. The two losses are means of their own, added. A share `short` of rows
    is cut to a random length (0.1 in both papers' code). A row is [CLS] A [SEP] B [SEP], A and B adjoining sentences of
    the longest document in the window, or words where it has fewer than two sentences. B from another document has as
    much room, so that length tells nothing.
    """

    kind: str = "nsp"
    mlm: MaskedLM | None = MaskedLM()
    short: float = 0.0
    ids: tuple[int, ...] | None = None  # Of extra_ids; with vocab_size, the tokenizer's, filled in by resolve.
    vocab_size: int | None = None

    extra_ids = MaskedLM.extra_ids
    scores_text = False

    def __post_init__(self):
        check_choice("kind", self.kind, KINDS)
        if not 0 <= self.short <= 1:
            raise UsageError(f"short={self.short} must be from 0 to 1")

    @property
    def needs(self) -> tuple[str, ...]:
        """Of a model, see lm.train.run.resolve."""
        return ("pair", "masked") if self.mlm else ("pair",)

    @property
    def least_documents(self) -> int:
        """The documents that a split must have."""
        return 2 if self.kind == "nsp" else 1

    def window(self, seq_len: int) -> int:
        """The raw tokens behind a row of `seq_len`: [CLS] and two [SEP] take three places."""
        if seq_len < 5:
            raise UsageError(f"seq_len={seq_len} must be at least 5: [CLS], two [SEP] and a token before each")
        return seq_len - 3

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """tokens, types, documents [L] (-1 at padding), the pair's class and weight, and what `mlm` adds.

        A row whose documents end after one token has no pair: it is [CLS] alone, and weighs nothing.
        """
        assert self.ids is not None  # Filled in by lm.train.run.resolve.
        _, cls, sep = self.ids
        segments, changed = self._segments(rng, row)
        length, real = len(row["tokens"]) + 3, 1
        tokens, types = np.zeros(length, np.int32), np.zeros(length, np.int32)
        noise, begins = np.zeros((length, 4)), np.ones(length, bool)
        tokens[0] = cls
        for number, (place, text) in enumerate(segments):
            part, end = slice(real, real + len(text)), real + len(text)
            tokens[part], tokens[end], types[real : end + 1] = text, sep, number
            if self.mlm:
                noise[part] = self.mlm.noise(rng, row, place - row["start"], len(text))
                begins[part] = self.mlm.begins(row, text)
                begins[real] = True
            real = end + 1
        batch: dict[str, Any] = {
            "tokens_BL": tokens,
            "types_BL": types,
            "documents_BL": np.where(np.arange(length) < real, 0, -1).astype(np.int32),
            "pairs_B": np.int32(changed),
            "weights_B": np.float32(bool(segments)),
        }
        return batch | self._mlm().mask(tokens, real, begins, noise, length - 3) if self.mlm else batch

    def loss(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
    ) -> dict[str, tuple[jax.Array, jax.Array, float]]:
        """{name: (sum over hidden tokens or over pairs, their number, coefficient)}."""
        out = model.apply(params, batch, key=key)
        logits_B2 = model.pair_logits(params, out.hidden_BLD)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits_B2), batch["pairs_B"][:, None], 1)[:, 0]
        right, weights = jnp.argmax(logits_B2, -1) == batch["pairs_B"], batch["weights_B"]
        terms = {
            "pair_loss" if self.mlm else "loss": (jnp.sum(nll * weights), weights.sum(), 1.0),
            "pair_accuracy": (jnp.sum(right * weights), weights.sum(), 0.0),
        }
        if self.mlm:
            terms |= self._mlm().terms(model, params, pick(out.hidden_BLD, batch), batch)
        return terms | out.aux

    def _mlm(self):
        assert self.mlm is not None
        return dataclasses.replace(self.mlm, ids=self.ids, vocab_size=self.vocab_size)

    def _segments(self, rng, row):
        """([(place in the split, tokens) of A, of B], whether they are not as they were); [] without two segments."""
        split, (first, text) = row["split"], _longest(row)
        if rng.random() < self.short and len(text) > 2:
            text = text[: rng.integers(2, len(text))]
        if len(text) < 2:
            return [], False
        breaks = _breaks(split, first, text)
        begin, cut, end = breaks[0], int(rng.choice(breaks[1:-1])), breaks[-1]
        segments = [(first + begin, text[begin:cut]), (first + cut, text[cut:end])]
        if rng.random() < 0.5:
            return segments, False
        if self.kind == "sop":
            return segments[::-1], True
        other = _elsewhere(rng, split, first + cut, len(text) - cut)
        return ([segments[0], other], True) if len(other[1]) else ([], False)


def _longest(row):
    """(place in the split, tokens) of the longest document in the window."""
    documents = np.asarray(row["documents"])
    counts = np.bincount(documents[documents >= 0], minlength=1)
    if not counts.any():
        return row["start"], np.zeros(0, np.int32)
    first = int(np.argmax(documents == counts.argmax()))
    place = row["start"] + first
    length = min(counts.max(), _body(row["split"], place)[1] - place)
    return place, np.asarray(row["tokens"], np.int32)[first : first + length]


def _elsewhere(rng, split, place, room):
    """(place, tokens) of whole sentences from another document than that at `place`, as many as `room` tokens hold.

    They are the end of that document if the `room` tokens at `place` are the end of theirs, and never its begin.
    """
    first, end = split.bounds(place)
    is_end = place + room == _body(split, place)[1]
    best = (0, np.zeros(0, np.int32))
    for _ in range(_TRIES):
        # Uniform over the tokens of all other documents.
        other = int(rng.integers(split.tokens - (end - first)))
        start, stop = _body(split, other + (end - first) * (other >= first))
        last = max(start + 1, stop - room)
        found = last if is_end else int(rng.integers(start + 1, last, endpoint=True))
        if found >= stop:
            continue
        text = split.window(found, min(2 * room, stop - found))
        breaks = np.array(_breaks(split, found, text))
        low = breaks[0]
        high = breaks[breaks <= low + room][-1]
        if high - low > len(best[1]):
            best = found + low, text[low:high]
        if 2 * len(best[1]) >= room:
            break
    return best


def _breaks(split, place, text):
    """Where in a text sentences begin and end, ascending, or where words do if those are fewer than three.

    An end of the text counts where the document at `place` begins or ends there, and with words in any case.
    """
    first, end = _body(split, place)
    inside = (np.flatnonzero(split.sentence_ends[text[:-1]]) + 1).tolist()
    found = [0] * (place == first) + inside + [len(text)] * (place + len(text) == end)
    if len(found) >= 3:
        return found
    words = (np.flatnonzero(split.word_starts[text[1:]]) + 1).tolist() or list(range(1, len(text)))
    return [0, *words, len(text)]


def _body(split, position):
    """(first, end) of the document at `position` without the id that ends it, which would tell the order."""
    first, end = split.bounds(position)
    return first, end - int(split.eos_id is not None and split.window(end - 1, 1)[0] == split.eos_id)
