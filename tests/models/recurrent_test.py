"""Recurrent models: words that are spelled, and where dropout is."""

import dataclasses

import jax
import numpy as np
import pytest

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.layers.char_cnn import CharCNN
from lm.models.recurrent import Recurrent

CNN = CharCNN(width=4, filters=((1, 4), (2, 4)), max_characters=6)
MODEL = Recurrent(layers=2, width=8, characters=CNN, vocab_size=8, valid_vocab_size=5)


def test_words_of_one_spelling_or_one_that_is_cut_to_it_have_one_vector():
    params = specs.initialize(MODEL.spec(), jax.random.key(0))
    params = MODEL.with_pieces(params, ["cat", "dog", "catty", "catting", "cat"])
    hidden = MODEL.apply(params, {"tokens_BL": np.arange(5)[:, None]}).hidden_BLD
    np.testing.assert_array_equal(hidden[0], hidden[4])
    np.testing.assert_array_equal(hidden[2], hidden[3])  # Of both "catt" is left.
    assert np.abs(hidden[0] - hidden[1]).max() > 0


def test_a_model_of_looked_up_words_needs_no_pieces():
    params = {"embed": {"table": np.zeros(1)}}
    assert Recurrent().with_pieces(params, list("ab")) is params


@pytest.mark.parametrize("settings", [{"hidden": 8}, {"tied": True}, {"word_dropout": 0.1}], ids=str)
def test_settings_of_a_table_have_no_effect_on_spelled_words(settings):
    with pytest.raises(UsageError, match=f"{next(iter(settings))}=.* has no effect with characters"):
        Recurrent(characters=CNN, **settings)


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("characters", [None, CNN], ids=["looked_up", "spelled"])
def test_dropout_is_where_its_name_says(locked, characters):
    plain = Recurrent(layers=1, width=8, vocab_size=8, characters=characters)
    params = plain.with_pieces(specs.initialize(plain.spec(), jax.random.key(0)), ["cat", "dog"] * 4)
    batch = {"tokens_BL": np.arange(24).reshape(2, 12) % 8}

    def hidden(**rates):
        model = dataclasses.replace(plain, locked=locked, **rates)
        return np.asarray(model.apply(params, batch, key=jax.random.key(1)).hidden_BLD)

    expected = np.asarray(plain.apply(params, batch).hidden_BLD)
    head = hidden(dropout=0.5)
    np.testing.assert_allclose(head[head != 0], 2 * expected[head != 0], rtol=1e-6)
    assert 0.2 < (head == 0).mean() < 0.8 and ((head == 0) == (head == 0)[:, :1]).all() == locked
    inputs = hidden(embed_dropout=0.5)
    assert (inputs != 0).all() and np.abs(inputs - expected).max() > 1e-4
