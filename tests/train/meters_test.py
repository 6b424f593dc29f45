"""The work that MFU is a share of: by formula, by counting the products of the program, by counting pairs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core import params as specs
from lm.layers.block import Layer
from lm.layers.moe import Experts
from lm.models.decoder import Decoder
from lm.models.electra import Electra
from lm.models.encdec import EncDec
from lm.models.encoder import Encoder
from lm.models.xlnet import XLNet
from lm.objectives.detect import Detect
from lm.objectives.mlm import MaskedLM
from lm.objectives.permutation import Permutation
from lm.objectives.span import SpanCorruption
from lm.train import meters

GPT2 = Decoder(layers=12, heads=12, width=768, vocab_size=50257, max_len=1024)
TINY = Decoder(layers=3, heads=4, width=32, vocab_size=128, max_len=64, scan=False)
LLAMA = {"positions": "rotary", "max_len": None, "gated": True, "attention_bias": False, "mlp_bias": False}
SMALL = {"layers": 2, "heads": 4, "width": 32, "vocab_size": 128}
MODELS = {
    "tied": TINY,
    "untied, grouped heads": dataclasses.replace(TINY, **LLAMA, kv_heads=2, mlp_width=48, tied=False),
    "one key head, wide heads, parallel": dataclasses.replace(TINY, **LLAMA, kv_heads=1, head_dim=24, block="parallel"),
}


def flops_per_token(model, spec, length):
    row = {name: jax.ShapeDtypeStruct((1, length), jnp.int32) for name in ("tokens_BL", "targets_BL")}
    return meters.flops_per_row(model, spec, row) / length


def test_gpt2_124m_takes_the_published_work():
    """0.80 GFLOP a token at 1024 tokens with the causal half of attention, 0.85 with all of it."""
    matmul, attention = 12 * 12 * 768**2 + 50257 * 768, 12 * 768 * 1024
    flops = flops_per_token(GPT2, GPT2.spec(), 1024)
    assert flops == 6 * matmul + 6 * attention
    assert round(flops / 1e9, 2) == 0.80 and round((flops + 6 * attention) / 1e9, 2) == 0.85


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_counted_as_three_times_the_products_of_a_forward_pass(name):
    model, rows, length = MODELS[name], 2, 64

    def forward(params, tokens):
        return model.logits(model.head(params), model.apply(params, {"tokens_BL": tokens}).hidden_BLD)

    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    plain, batched = meters.product_flops(jax.make_jaxpr(forward)(specs.abstract(model.spec()), tokens).jaxpr)
    # At this length the program multiplies the masked half of attention's pairs too, which the convention leaves out.
    counted = 3 * (plain + batched / 2) / (rows * length)
    assert batched / 2 > 0.05 * plain
    assert flops_per_token(model, model.spec(), length) == pytest.approx(counted, rel=0.02)


FAMILIES = {
    "masked": (Encoder(**SMALL, outputs=("tokens",)), MaskedLM(ids=(120, 121, 122), vocab_size=120)),
    "permutation": (XLNet(**SMALL, scan=False), Permutation(ids=(120, 121))),
    "detection": (
        Electra(
            Encoder(layers=2, width=32, heads=4, max_len=64, outputs=("detect",)),
            Encoder(layers=2, width=16, heads=2, max_len=64, embed_width=32),
            vocab_size=128,
        ),
        Detect(ids=(120, 121, 122), vocab_size=120),
    ),
    "spans": (EncDec(**SMALL, decoder_layers=3), SpanCorruption(ids=tuple(range(20, 122)), vocab_size=20)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_counted_as_three_times_the_products_of_its_loss(name):
    model, objective = FAMILIES[name]
    raw = {"documents": np.zeros(objective.window(64), np.int32), "index": 0, "split": None, "start": 0}
    row = objective.corrupt(np.random.default_rng(0), raw | {"tokens": np.arange(objective.window(64)) % 20})
    batch = {k: jax.ShapeDtypeStruct((32, *np.shape(x)), np.asarray(x).dtype) for k, x in row.items()}
    loss = jax.make_jaxpr(lambda params, batch: objective.loss(model, params, batch))
    counted = sum(meters.product_flops(loss(specs.abstract(model.spec()), batch).jaxpr)) / 32
    if name == "spans":  # Masked pairs of the decoder: multiplied, and not counted.
        counted -= 2 * 3 * 32 * batch["tokens_BL"].shape[1] ** 2
    assert meters.flops_per_row(model, model.spec(), batch) == pytest.approx(3 * counted, rel=0.02)


def test_windows_count_the_pairs_that_they_show():
    length, windows = 512, (64, None, 2000)
    model = dataclasses.replace(TINY, max_len=length, pattern=tuple(Layer(window=w) for w in windows))
    pairs = sum(min(t + 1, w or length) for w in windows for t in range(length))
    # Two products of 2 x 32 operations a pair; the closed form counts half of a token's pair with itself.
    assert model.attention_flops(length) == pytest.approx(4 * 32 * pairs / length, rel=0.01)


def test_of_experts_those_count_that_a_token_passes():
    """Two chosen of eight work as one mlp twice as wide, and their router."""
    narrow = dataclasses.replace(TINY, mlp_bias=False, mlp_width=48)
    routed = dataclasses.replace(narrow, pattern=(Layer(), Layer(experts=Experts(8, 2)), Layer()))
    wide = dataclasses.replace(narrow, pattern=(Layer(), Layer(experts=Experts(1, 1, 96, normalize=False)), Layer()))
    expected = flops_per_token(wide, wide.spec(), 64) + 6 * 32 * (8 - 1)
    assert flops_per_token(routed, routed.spec(), 64) == expected


def test_layers_that_share_their_parameters_count_each_time():
    settings = {"layers": 6, "width": 32, "heads": 4, "vocab_size": 128, "max_len": 64}
    own, shared = Encoder(**settings), Encoder(**settings, shared_groups=2)
    assert specs.count(shared.spec()) < specs.count(own.spec())
    assert flops_per_token(shared, shared.spec(), 64) == flops_per_token(own, own.spec(), 64)


def test_the_peak_of_a_cpu_is_measured_and_said_to_be():
    peak, convention = meters.peak_flops(jax.devices())
    assert 1e9 < peak < 1e14 and "measured" in convention
