"""Configs with experts: both spellings, and what no class or no setting of ours expresses."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

import lm
from lm.core import params as specs
from lm.core.errors import UsageError
from lm.interop import mixtral, qwen3_moe
from lm.interop.fields import Fields
from lm.layers.block import Layer
from lm.layers.moe import Experts
from lm.models.decoder import Decoder

BOTH = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 61,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
}
OLD = {"num_experts": 5, "rope_theta": 1e6, "max_window_layers": 4, "use_sliding_window": False, "sliding_window": 4}
NEW = {"num_local_experts": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "sliding_window": None}
MIXED = {"moe_intermediate_size": 24, "mlp_only_layers": [1], "decoder_sparse_step": 2}


def read(family, config):
    fields = Fields(BOTH | config, "the config")
    model = family.read(fields, next(iter(family.ARCHITECTURES)))
    fields.finish()
    return model


def test_old_and_new_spellings_are_the_same_model():
    assert read(qwen3_moe, OLD | MIXED) == read(qwen3_moe, NEW | MIXED)
    old = {"num_local_experts": 5, "rope_theta": 1e6, "sliding_window": None}
    assert read(mixtral, old) == read(mixtral, NEW) == read(mixtral, {"num_local_experts": 5})


def test_layers_are_dense_where_the_step_or_the_list_says_so():
    routed = Experts(5, 2, mlp_width=24, normalize=False, balance=0.02)
    every_second = read(qwen3_moe, NEW | MIXED | {"mlp_only_layers": [3]})
    assert [layer.experts for layer in every_second.stack.layers] == [None, routed, None, None]


def test_a_single_choice_that_keeps_its_weight_is_read():
    assert read(qwen3_moe, NEW | {"num_experts_per_tok": 1}).stack.layers[0].experts.chosen == 1


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (qwen3_moe, NEW | {"num_experts": 4}, "num_local_experts=5 and num_experts=4"),
        (mixtral, {}, "num_local_experts=None"),
        (mixtral, NEW | {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        (mixtral, NEW | {"attention_bias": True}, "attention_bias=True"),
        (qwen3_moe, NEW | {"num_experts_per_tok": 6}, "experts.chosen=6 is more"),
        (mixtral, NEW | {"num_experts_per_tok": 1}, "experts.chosen=1 with experts.normalize=True"),
        (qwen3_moe, NEW | {"num_experts_per_tok": 1, "norm_topk_prob": True}, "experts.chosen=1 with"),
        (qwen3_moe, NEW | {"shared_expert_intermediate_size": 6}, "shared_expert_intermediate_size"),
    ],
    ids=str,
)
def test_what_is_not_expressed_is_refused_by_name(family, config, message):
    with pytest.raises(UsageError, match=message):
        read(family, config)


def make_model(**experts):
    settings: dict[str, Any] = {"layers": 3, "width": 32, "heads": 4, "vocab_size": 61, "positions": "rotary"}
    llama: dict[str, Any] = {"norm": "rmsnorm", "norm_bias": False, "attention_bias": False, "mlp_bias": False}
    routed = Layer(experts=Experts(4, 2, **experts))
    return Decoder(**settings, **llama, tied=False, gated=True, activation="silu", pattern=(routed,))


def test_a_model_of_ours_is_saved_as_the_class_that_computes_it(tmp_path):
    """Qwen3-MoE has norms on queries and keys, and may have dense layers; Mixtral has neither."""
    own = make_model(mlp_width=20, router_z=0.001)
    every_second = dataclasses.replace(own, qk_norm="head", pattern=(Layer(), *own.pattern))
    for name, model in {"MixtralForCausalLM": own, "Qwen3MoeForCausalLM": every_second}.items():
        params = specs.initialize(model.spec(), jax.random.key(0))
        assert lm.interop.save(tmp_path / name, model, params) == name
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["num_experts"] == config["num_local_experts"] == 4
        ids = np.arange(12)[None]
        ours, again = (
            lm.interop.forward(m, p, input_ids=ids)["logits"] for m, p in ((model, params), lm.load(tmp_path / name))
        )
        np.testing.assert_allclose(ours, again, atol=1e-6)


@pytest.mark.parametrize("change", [{"capacity_factor": 1.0}, {"normalize": False}], ids=str)
def test_experts_that_no_class_computes_are_refused(tmp_path, change):
    model = make_model(**change)
    with pytest.raises(UsageError, match="no class of Hugging Face's"):
        lm.interop.save(tmp_path / "odd", model, specs.initialize(model.spec(), jax.random.key(0)))
