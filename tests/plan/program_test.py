"""What is compiled without a corpus and without hardware: every published recipe has its batch and its size."""

import importlib

import pytest

from lm.core import params
from lm.main import plan as verb
from lm.plan import program

# Millions of parameters, as published or as in the recipe's docstring.
PUBLISHED = {
    "gpt2_124m": 124,
    "gpt2_xl": 1558,
    "llama_1b": 1236,
    "llama_8b": 8030,
    "llama_70b": 70554,
    "llama_405b": 405853,
    "palm_8b": 8632,
    "bert_base": 110,
    "roberta_base": 125,
    "albert_base": 12,
    "electra_small": 14,
    "xlnet_base": 117,
    "t5_base": 223,
    "t5_3b": 2852,
    "bart_base": 140,
    "transformer_base": 63,
    "switch_base": 3706,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_planned_at_its_published_size(name):
    run = verb.with_vocabulary(importlib.import_module(f"experiments.{name}").run(), None)
    assert params.count(run.model.spec()) / 1e6 == pytest.approx(PUBLISHED[name], abs=1, rel=1e-3)
    batch = program.batch_shapes(run)
    assert {x.shape[0] for x in batch.values()} == {run.train.batch_size}
    assert any(k.startswith("weights") for k in batch)
