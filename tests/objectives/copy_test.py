"""The duplication task: a row is a whole document, and its second w alone counts."""

import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.data import corpus, synthetic
from lm.data.stream import Stream
from lm.objectives.copy import Copy

SOURCE = "copy?symbols=5&length=12&total=40"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return corpus.build(f"synthetic:{SOURCE}", "char", folder / "c", validation=0.25)


def test_documents_are_0w0w():
    sample = synthetic.parse(SOURCE).sample()
    assert sample.shape == (40, 12) and set(sample[:, 1:6].ravel()) == {1, 2, 3, 4, 5}
    np.testing.assert_array_equal(sample[:, :6], sample[:, 6:])
    assert not sample[:, 0].any()


def test_each_row_is_a_document_and_each_comes_once_an_epoch(made):
    split = made.split("train")
    rows = Stream(split, Copy(), 12, seed=3).rows(0, split.documents - 1)
    tokens = rows["tokens_BL"]
    np.testing.assert_array_equal(tokens[:, :6], tokens[:, 6:])
    np.testing.assert_array_equal(rows["targets_BL"][:, :-1], tokens[:, 1:])
    assert len({tuple(row) for row in tokens}) == split.documents - 1
    np.testing.assert_array_equal(rows["weights_BL"], [[0] * 6 + [1] * 5 + [0]] * len(tokens))


def test_a_validation_split_is_read_whole_and_padding_weighs_nothing(made):
    split = made.split("validation")
    stream = Stream(split, Copy(), 12, order="sequential")
    rows = stream.rows(0, split.documents + 1)
    assert stream.examples == split.documents and rows["weights_BL"].sum() == 5 * split.documents
    np.testing.assert_array_equal(rows["tokens_BL"][:-1].ravel(), split.window(0, split.tokens))


def test_a_document_of_another_length_is_refused(made):
    with pytest.raises(UsageError, match="a document has 12 tokens, and a row 10"):
        Stream(made.split("train"), Copy(), 10).rows(0, 1)


@pytest.mark.parametrize("query", ["copy?length=7", "copy?symbols=0", "copy?total=0"])
def test_sizes_that_make_no_task_are_refused(query):
    with pytest.raises(UsageError, match="synthetic:copy needs"):
        synthetic.parse(query)
