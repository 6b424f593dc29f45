"""Our models as Flax modules."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

import lm
from lm.core import params as specs
from lm.core import tree
from tests.models.contract_test import MODELS, L, captures, randomized

FAST = {"gpt2", "bert", "lstm", "xlnet"}
BATCH = {"tokens_BL": np.arange(2 * L, dtype=np.int32).reshape(2, L) % 100}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in MODELS])
def test_a_module_computes_what_the_model_does_from_the_same_tree(name):
    model, module = MODELS[name], lm.interop.linen(MODELS[name])
    params = randomized(model, 0)
    out = module.apply({"params": params}, BATCH, capture=captures(model))
    expected = model.apply(params, BATCH, capture=captures(model))
    jax.tree.map(np.testing.assert_array_equal, out, expected)
    logits = module.apply({"params": params}, BATCH, method="logits")
    np.testing.assert_array_equal(logits, model.logits(model.head(params), expected.hidden_BLD))


@pytest.mark.parametrize("name", MODELS)
def test_init_declares_every_parameter_with_its_axes(name):
    model, module = MODELS[name], lm.interop.linen(MODELS[name])
    boxed = module.init(jax.random.key(0), BATCH)
    found, spec = tree.flatten(nn.unbox(boxed)["params"]), tree.flatten(model.spec())
    assert {path: (x.shape, x.dtype) for path, x in found.items()} == {
        path: (p.shape, np.dtype(p.dtype)) for path, p in spec.items()
    }
    axes = traverse_util.flatten_dict(nn.get_partition_spec(boxed)["params"], sep="/")
    assert {path: tuple(a) for path, a in axes.items()} == {path: p.axes for path, p in spec.items()}
    assert np.isfinite(model.apply(nn.unbox(boxed)["params"], BATCH).hidden_BLD).all()


def test_a_table_of_the_module_counts_its_parameters():
    model = MODELS["gpt2"]
    text = lm.interop.linen(model).tabulate(jax.random.key(0), BATCH, console_kwargs={"width": 200})
    assert f"{specs.count(model.spec()):,}" in text


def test_a_key_turns_dropout_on():
    model = MODELS["gpt2"].__class__(layers=1, width=8, heads=1, vocab_size=128, max_len=L, residual_dropout=0.5)
    module, params = lm.interop.linen(model), randomized(model, 0)
    plain = module.apply({"params": params}, BATCH).hidden_BLD
    dropped = module.apply({"params": params}, BATCH, rngs={"dropout": jax.random.key(1)}).hidden_BLD
    assert not np.allclose(plain, dropped)
