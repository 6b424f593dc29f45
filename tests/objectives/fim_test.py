import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.objectives.causal import Causal
from lm.objectives.fim import FillInTheMiddle

PRE, SUF, MID, EOT = 100, 101, 102, 103
ROW = {"tokens": np.arange(40, dtype=np.int32), "documents": np.repeat([0, -1], [30, 10]).astype(np.int32)}


def corrupt(seed, row=ROW, **settings):
    return FillInTheMiddle(ids=(PRE, SUF, MID, EOT), **settings).corrupt(np.random.default_rng(seed), row)


def text(row):
    return [*row["tokens_BL"].tolist(), int(row["targets_BL"][-1])]


def parts(tokens):
    pre, suf, mid, end = (tokens.index(x) for x in (PRE, SUF, MID, EOT))
    return tokens[pre + 1 : suf], tokens[suf + 1 : mid], tokens[mid + 1 : end]


@pytest.mark.parametrize("seed", range(10))
def test_prefix_middle_and_suffix_make_the_text_again(seed):
    prefix, suffix, middle = parts(text(corrupt(seed, rate=1.0, spm=0.0)))
    assert prefix + middle + suffix == list(range(30))
    nothing, suffix, rest = parts(text(corrupt(seed, rate=1.0, spm=1.0)))
    assert nothing == [] and rest + suffix == list(range(30))


def test_padding_weighs_nothing_and_rows_keep_their_length():
    row = corrupt(0, rate=1.0)
    assert (
        len(row["tokens_BL"]) == 39 and row["weights_BL"].sum() == 33
    )  # 30 tokens and 4 marks, the first not a target.


def test_the_middle_alone_is_predicted_where_asked_for():
    row = corrupt(1, rate=1.0, spm=0.0, predicted="middle")
    _, _, middle = parts(text(row))
    assert row["targets_BL"][row["weights_BL"] > 0].tolist() == [*middle, EOT]


def test_rate_zero_is_causal_and_the_rate_is_met():
    causal = Causal().corrupt(np.random.default_rng(0), ROW)
    for name, array in corrupt(0, rate=0.0).items():
        np.testing.assert_array_equal(array, causal[name])
    share = np.mean([PRE in corrupt(s, rate=0.3)["tokens_BL"] for s in range(500)])
    assert abs(share - 0.3) < 0.08


def test_documents_are_reordered_each_by_itself():
    documents = np.repeat([0, 1], 20).astype(np.int32)
    tokens = text(corrupt(3, ROW | {"documents": documents}, rate=1.0, spm=0.0))
    first = tokens[: tokens.index(EOT)]
    assert sorted(t for t in first if t < 100) == list(range(20))


def test_rates_outside_zero_to_one_are_refused():
    with pytest.raises(UsageError, match=r"rate=1.5"):
        FillInTheMiddle(rate=1.5)
