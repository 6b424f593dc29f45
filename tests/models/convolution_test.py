"""The gated convolutional model: its reach, its cache across documents, its settings."""

import dataclasses

import jax
import numpy as np
import pytest

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.models.convolution import Convolution

B, L, V = 4, 12, 16
MODEL = Convolution(blocks=(((3, 8),), ((1, 4), (2, 4), (1, 8))), width=6, vocab_size=V)
TOKENS = np.random.default_rng(0).integers(0, V, (B, L)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return specs.initialize(MODEL.spec(), jax.random.key(0))


def test_a_prediction_is_made_from_as_many_tokens_as_it_says(params):
    assert MODEL.reach == 4
    base = MODEL.apply(params, {"tokens_BL": TOKENS}).hidden_BLD[:, 9]
    moved = [
        t
        for t in range(L)
        if np.abs(
            MODEL.apply(params, {"tokens_BL": np.where(np.arange(L) == t, (TOKENS + 1) % V, TOKENS)}).hidden_BLD[:, 9]
            - base
        ).max()
    ]
    assert moved == [6, 7, 8, 9]


@pytest.mark.parametrize("cut", [1, 5, 7])
def test_rows_in_two_batches_are_those_in_one_with_documents_and_without(params, cut):
    documents = np.repeat([[0] * 5 + [1] * 4 + [2] * 3], B, 0)
    for batch in ({"tokens_BL": TOKENS}, {"tokens_BL": TOKENS, "documents_BL": documents}):
        whole = MODEL.apply(params, batch).hidden_BLD
        cache = specs.initialize(MODEL.carry_spec(B), jax.random.key(0))
        first = MODEL.apply(params, {k: x[:, :cut] for k, x in batch.items()}, cache=cache)
        if "documents_BL" in batch and cut == 5:  # The second batch begins a document, which its rows cannot know.
            continue
        second = MODEL.apply(params, {k: x[:, cut:] for k, x in batch.items()}, cache=first.cache)
        np.testing.assert_allclose(first.hidden_BLD, whole[:, :cut], atol=1e-5)
        np.testing.assert_allclose(second.hidden_BLD, whole[:, cut:], atol=1e-5)


@pytest.mark.parametrize("blocks", [(), ((),), (((0, 4),),)], ids=str)
def test_blocks_without_layers_are_refused(blocks):
    with pytest.raises(UsageError, match="blocks="):
        dataclasses.replace(MODEL, blocks=blocks)
