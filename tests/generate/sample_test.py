import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.generate.sample import filter_logits, generate
from lm.models.decoder import Decoder
from lm.models.encdec import EncDec
from lm.models.encoder import Encoder

LIMIT, VALID = 12, 20
MODEL = Decoder(layers=1, width=16, heads=2, vocab_size=32, valid_vocab_size=VALID, max_len=LIMIT, init_std=0.7)
PROMPTS = [np.array([1, 2, 3]), np.array([4]), np.array([5, 6, 7, 8, 9])]


@pytest.fixture(scope="module")
def params():
    return specs.initialize(MODEL.spec(), jax.random.key(0))


def assert_greedy(params, prompt, row):
    """Each id of the row is the likeliest after the at most LIMIT tokens before it, by one full pass a token."""
    ids = [*prompt, *row]
    ends = range(len(prompt), len(ids))
    contexts = np.zeros((len(row), LIMIT), np.int32)
    for context, end in zip(contexts, ends, strict=True):
        context[: min(end, LIMIT)] = ids[max(0, end - LIMIT) : end]
    hidden = MODEL.apply(params, {"tokens_BL": contexts}).hidden_BLD
    last = hidden[np.arange(len(row)), np.minimum(ends, LIMIT) - 1]
    np.testing.assert_array_equal(np.argmax(MODEL.logits(MODEL.head(params), last), -1), row)


def test_greedy_equals_full_passes_also_beyond_the_context_limit(params):
    generated = generate(MODEL, params, PROMPTS, 14, temperature=0)
    for prompt, row in zip(PROMPTS, generated, strict=True):
        assert len(row) == 14
        assert_greedy(params, prompt, row)


def test_a_prompt_longer_than_the_limit_is_cropped_to_its_end(params):
    prompt = np.arange(20) % VALID
    assert_greedy(params, prompt, generate(MODEL, params, [prompt], 3, temperature=0)[0])


def test_a_row_depends_on_the_seed_and_not_on_its_neighbours(params):
    together = generate(MODEL, params, PROMPTS, 6, seed=3)
    np.testing.assert_array_equal(generate(MODEL, params, PROMPTS[:1], 6, seed=3)[0], together[0])
    np.testing.assert_array_equal(generate(MODEL, params, PROMPTS, 6, seed=3), together)
    assert not np.array_equal(generate(MODEL, params, PROMPTS, 6, seed=4), together)
    same_prompt = generate(MODEL, params, PROMPTS[:1] * 2, 6, seed=3)
    assert same_prompt[0].tolist() != same_prompt[1].tolist()


def test_no_token_beyond_the_vocabulary_is_drawn_and_eos_ends_a_row(params):
    rows = generate(MODEL, params, PROMPTS, 7, temperature=3.0)
    assert max(row.max() for row in rows) < VALID
    eos = int(rows[0][2])
    cut = generate(MODEL, params, PROMPTS, 7, temperature=3.0, eos_id=eos)[0]
    assert cut.tolist() == rows[0][: rows[0].tolist().index(eos) + 1].tolist()


def test_draws_follow_the_tempered_distribution():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    bias = Decoder(layers=1, width=4, heads=1, vocab_size=4, positions="none", tied=False, norm_bias=True)
    params = specs.initialize(bias.spec(), jax.random.key(0))
    params["final_norm"] = {"scale": jnp.zeros(4), "bias": jnp.array([1.0, 0, 0, 0])}
    params["head"]["table"] = jnp.zeros((4, 4)).at[:, 0].set(logits)
    draws = np.concatenate(generate(bias, params, [np.array([0])] * 2000, 2, temperature=0.5))
    expected = np.exp(2 * logits) / np.exp(2 * logits).sum()
    # 4,000 draws: five standard errors of a share are below 0.04.
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / len(draws), expected, atol=0.04)


def test_filters_keep_the_likeliest_and_the_fewest_that_hold_the_share():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))

    def kept(*filters):
        return (np.asarray(filter_logits(logits, *filters))[0] > -1e9).nonzero()[0].tolist()

    assert kept(2, None) == [1, 3] and kept(None, 0.65) == [1, 3] and kept(None, 0.75) == [1, 2, 3]
    assert kept(None, 0.01) == [1] and kept(None, 1.0) == [0, 1, 2, 3]
    # Top-p is taken of what top-k left: 0.4 / 0.7 is already more than half.
    assert kept(2, 0.55) == [1]


@pytest.mark.parametrize(
    "setting", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=lambda s: next(iter(s))
)
def test_impossible_settings_are_refused_by_name(setting, params):
    with pytest.raises(UsageError, match=next(iter(setting))):
        generate(MODEL, params, PROMPTS, 1, **setting)


def test_an_empty_prompt_is_refused(params):
    with pytest.raises(UsageError, match="no tokens"):
        generate(MODEL, params, [np.array([], np.int32)], 1)


def test_without_a_context_limit_the_cache_serves_all(params):
    model = dataclasses.replace(MODEL, positions="rotary", max_len=None)
    no_table = {k: v for k, v in params.items() if k != "positions"}
    assert len(generate(model, no_table, PROMPTS, 15)[2]) == 15


@pytest.mark.parametrize(
    "positions",
    [pytest.param({"positions": "learned", "max_len": 6}, marks=pytest.mark.slow), {"positions": "sinusoidal"}],
    ids=str,
)
def test_an_encoder_decoder_reads_the_prompts_and_continues_its_start(positions):
    model = EncDec(layers=2, width=16, heads=2, vocab_size=32, start_id=3, init_std=0.7, **positions)
    params, apply = specs.initialize(model.spec(), jax.random.key(0)), jax.jit(model.apply)
    for start in (None, [3, 7]):
        rows = generate(model, params, PROMPTS, 8, temperature=0, start=start)
        for prompt, row in zip(PROMPTS, rows, strict=True):
            ids = np.array([*(start or [3]), *row])
            first, reach = len(ids) - len(row), min(model.max_len or len(ids), len(ids) - 1)
            # Beyond the positions there are, the last of them slide along.
            for last in range(reach, len(ids)):
                batch = {"source_tokens_BS": prompt[None], "tokens_BL": ids[None, last - reach : last]}
                found = np.argmax(model.logits(model.head(params), apply(params, batch).hidden_BLD[0]), -1)
                begin = first if last == reach else last
                np.testing.assert_array_equal(found[begin - last - 1 :], ids[begin : last + 1])
    with pytest.raises(UsageError, match="start"):
        generate(MODEL, params, PROMPTS, 1, start=[1])


def test_a_model_that_sees_both_ways_continues_nothing():
    encoder = Encoder(layers=1, width=8, heads=1, vocab_size=16)
    with pytest.raises(UsageError, match="Encoder continues no text"):
        generate(encoder, {}, [[1]], 3)
