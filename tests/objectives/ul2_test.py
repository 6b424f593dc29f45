import collections

import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.objectives.span import Noise
from lm.objectives.ul2 import DENOISERS, MODES, UL2, Denoiser
from tests.objectives.span_test import restore

PAD, END, MODE, FIRST = 5000, 5001, 5002, 5005
OBJECTIVE = UL2(ids=tuple(range(5000, 5000 + len(UL2().extra_ids))), vocab_size=5000)
WINDOW = OBJECTIVE.window(512)


def corrupt(index, seed=0, real=WINDOW, objective=OBJECTIVE):
    documents = np.where(np.arange(WINDOW) < real, 0, -1)
    row = {"tokens": np.arange(WINDOW, dtype=np.int32), "documents": documents, "index": index}
    return objective.corrupt(np.random.default_rng(seed), row)


def parts(row):
    """(mode, source, target) without padding and ends."""
    source = row["source_tokens_BS"][row["source_documents_BS"] >= 0].tolist()
    target = row["targets_BL"][row["weights_BL"] > 0].tolist()
    assert source.pop() == END and target.pop() == END
    return MODES[source.pop(0) - MODE], source, target


@pytest.mark.parametrize("index", range(7))
def test_each_denoiser_has_its_mode_its_noise_and_gives_back_its_text(index):
    noise = DENOISERS[index].noise
    for seed in range(5):
        mode, source, target = parts(corrupt(index, seed))
        text = restore(source, target, range(FIRST, FIRST + 128))
        assert text == list(range(noise.longest(510))) and mode == DENOISERS[index].mode
        lost, spans = noise.counts(len(text))
        assert lost == round(noise.density * len(text)) and len(target) == lost + spans
        assert [t for t in source if t >= FIRST] == list(range(FIRST, FIRST + spans))
        assert spans == (1 if noise.mean_span is None else round(lost / noise.mean_span))


def test_sequential_denoising_predicts_the_last_quarter():
    mode, source, target = parts(corrupt(2))
    assert mode == "[S]" and source == [*range(509), FIRST] and target == [FIRST, *range(509, 679)]


def test_all_rows_have_one_shape_and_the_longest_target_fills_it():
    rows = [corrupt(i, seed) for i in range(7) for seed in range(5)]
    assert len({tuple((k, v.shape) for k, v in row.items()) for row in rows}) == 1
    assert rows[0]["source_tokens_BS"].shape == (512,)
    assert max(row["weights_BL"].sum() for row in rows) == rows[0]["weights_BL"].size
    assert max((row["source_documents_BS"] >= 0).sum() for row in rows) == 512


def test_shares_are_exact_by_example_index():
    modes = collections.Counter(parts(corrupt(i))[0] for i in range(70))
    assert modes == {"[R]": 20, "[S]": 10, "[X]": 40}
    objective = UL2(denoisers=(Denoiser("[S]", Noise(0.25, None), 3), Denoiser("[R]", Noise(), 1)), ids=OBJECTIVE.ids)
    modes = collections.Counter(parts(corrupt(i, real=100, objective=objective))[0] for i in range(40))
    assert modes == {"[S]": 30, "[R]": 10}


@pytest.mark.parametrize("real", [0, 1, 2, 50])
@pytest.mark.parametrize("index", range(7))
def test_padding_is_never_read_or_predicted(index, real):
    row = corrupt(index, real=real)
    if real == 0:
        assert row["weights_BL"].sum() == 0 and (row["source_documents_BS"] == -1).all()
        return
    _, source, target = parts(row)
    assert restore(source, target, range(FIRST, FIRST + 128)) == list(range(real))


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match=r"sentinels=100 are too few for the 127 spans"):
        UL2(sentinels=100).window(512)
    with pytest.raises(UsageError, match=r"mode"):
        Denoiser("[Q]", Noise())
    with pytest.raises(UsageError, match="denoisers"):
        UL2(denoisers=())
