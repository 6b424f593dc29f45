"""A run's settings are checked where they are made, and its vocabulary is filled in from the tokenizer."""

import dataclasses

import pytest

from lm.core.errors import UsageError
from lm.layers.block import Layer
from lm.layers.heads import TaskHead
from lm.models.decoder import Decoder
from lm.models.electra import Electra
from lm.models.encdec import EncDec
from lm.models.encoder import Encoder
from lm.models.headed import Headed
from lm.models.xlnet import XLNet
from lm.objectives.causal import Causal
from lm.objectives.denoise import Denoise
from lm.objectives.detect import Detect
from lm.objectives.fim import FillInTheMiddle
from lm.objectives.mlm import MaskedLM
from lm.objectives.pairs import Pairs
from lm.objectives.permutation import Permutation
from lm.objectives.prefix import Prefix
from lm.objectives.span import SpanCorruption
from lm.objectives.ul2 import UL2
from lm.train.run import Evals, Run, Train, resolve


@dataclasses.dataclass(frozen=True)
class Masking:
    """An objective with two ids of its own."""

    ids: tuple[int, ...] | None = None
    vocab_size: int | None = None

    extra_ids = ("[MASK]", "[SEP]")
    needs = ()


TINY = {"layers": 1, "heads": 2, "width": 16}


class Ids:
    """A tokenizer of which only the ids matter."""

    def __init__(self, vocab_size, **special):
        self.vocab_size, self._special = vocab_size, special

    def special(self, name):
        return self._special.get(name.strip("[]").lower())


def make_run(vocab_size=None, objective=None, seq_len=32, **options):
    model = Decoder(layers=1, heads=2, width=16, vocab_size=vocab_size, **options)
    return Run(model, objective or Causal(), train=Train(seq_len=seq_len))


@pytest.mark.parametrize(
    "ids, objective, rows, valid",
    [
        (128, Causal(), 128, 128),
        (129, Causal(), 256, 129),
        (50257, Causal(), 50304, 50257),  # GPT-2's vocabulary, as nanoGPT pads it.
        (127, Masking(), 256, 129),
    ],
)
def test_the_vocabulary_is_padded_to_a_multiple_of_128(ids, objective, rows, valid):
    model = resolve(make_run(objective=objective, positions="rotary"), Ids(ids)).model
    assert (model.vocab_size, model.valid_vocab_size) == (rows, valid)


def test_a_given_vocabulary_is_taken_as_it_is():
    model = resolve(make_run(vocab_size=100, positions="rotary"), Ids(99)).model
    assert (model.vocab_size, model.valid_vocab_size) == (100, 99)


def test_a_given_vocabulary_that_is_too_small_is_refused_with_both_numbers():
    with pytest.raises(UsageError, match=r"model.vocab_size=100 is below the 102 ids .* leave it unset"):
        resolve(make_run(vocab_size=100, objective=Masking(), positions="rotary"), Ids(100))


def test_sequences_longer_than_the_positions_are_refused():
    assert resolve(make_run(max_len=32), Ids(8)).train.seq_len == 32
    with pytest.raises(UsageError, match=r"train.seq_len=33 exceeds .* raise model.max_len=32"):
        resolve(make_run(max_len=32, seq_len=33), Ids(8))
    with pytest.raises(UsageError, match=r"evals.seq_len=64 exceeds .* raise model.max_len=32"):
        resolve(dataclasses.replace(make_run(max_len=32), evals=Evals(seq_len=64)), Ids(8))
    assert resolve(make_run(positions="rotary", seq_len=4096), Ids(8)).train.seq_len == 4096


def test_resolving_twice_changes_nothing():
    once = resolve(make_run(positions="rotary"), Ids(50))
    assert resolve(once, Ids(50)) == once


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"steps": 0}, "train.steps=0"),
        ({"batch_size": 0}, "train.batch_size=0"),
        ({"seq_len": -1}, "train.seq_len=-1"),
        ({"save_every": 0}, "train.save_every=0"),
        ({"max_skipped": 0}, "train.max_skipped=0"),
        ({"batch_size": 8, "accumulate": 3}, "train.accumulate=3 does not divide train.batch_size=8"),
        ({"keep_last": 1}, "train.keep_last=1 must be at least 2"),
        ({"poison": (3,)}, "train.poison=(3,) needs two steps"),
    ],
)
def test_settings_that_cannot_train_are_named(settings, words):
    with pytest.raises(UsageError) as caught:
        Train(**settings)
    assert words in str(caught.value)


def test_an_objective_is_told_its_extra_ids():
    new = resolve(make_run(objective=Masking(), positions="none"), Ids(127))
    assert new.objective == Masking((127, 128), 127) and new.model.valid_vocab_size == 129


@pytest.mark.parametrize(("objective", "start"), [(SpanCorruption(), 100), (UL2(), 100), (Denoise(), 101)])
def test_a_decoder_with_a_source_starts_from_the_objectives_id(objective, start):
    new = resolve(Run(EncDec(**TINY), objective), Ids(100))
    assert new.model.start_id == start and new.model.valid_vocab_size == 100 + len(objective.extra_ids)


def test_special_tokens_that_the_tokenizer_has_are_taken_from_it():
    some = resolve(make_run(objective=Masking(), positions="none"), Ids(127, mask=4))
    assert some.objective == Masking((4, 127), 127) and some.model.valid_vocab_size == 128
    every = resolve(make_run(vocab_size=127, objective=Masking(), positions="none"), Ids(127, mask=4, sep=3))
    assert every.objective == Masking((4, 3), 127) and every.model.vocab_size == 127


MODELS = {
    "decoder": Decoder(**TINY, positions="none"),
    "windows": Decoder(**TINY, positions="none", pattern=(Layer(window=4),)),
    "tokens": Encoder(**TINY),
    "pair": Encoder(**TINY, outputs=("tokens", "pair")),
    "untyped": Encoder(**TINY, outputs=("tokens", "pair"), types=1),
    "electra": Electra(Encoder(**TINY, outputs=("detect",)), Encoder(**TINY)),
    "xlnet": XLNet(**TINY),
    "encdec": EncDec(**TINY),
    "headed": Headed(Encoder(**TINY, outputs=()), TaskHead("tokens", ("a", "b"))),
}
FITS = {
    Causal(): {"decoder", "windows"},
    FillInTheMiddle(): {"decoder", "windows"},
    Prefix(): {"decoder"},
    MaskedLM(): {"tokens", "pair", "untyped"},
    Pairs(): {"pair"},
    Detect(): {"electra"},
    Permutation(): {"xlnet"},
    SpanCorruption(): {"encdec"},
    UL2(): {"encdec"},
    Denoise(): {"encdec"},
}


@pytest.mark.parametrize("objective", FITS, ids=lambda o: type(o).__name__)
def test_an_objective_takes_the_models_that_it_can_train_and_refuses_the_others(objective):
    for name, model in MODELS.items():
        run = Run(model, objective, train=Train(seq_len=32))
        if name in FITS[objective]:
            rows = resolve(run, Ids(50))
            assert rows.model.spec() and rows.model.valid_vocab_size >= 50
        else:
            with pytest.raises(UsageError, match="does not fit model="):
                resolve(run, Ids(50))


def test_a_table_of_the_source_that_is_too_small_is_refused():
    with pytest.raises(UsageError, match=r"source_vocab_size=40 is below the 152 ids"):
        resolve(Run(EncDec(**TINY, source_vocab_size=40), SpanCorruption()), Ids(50))
