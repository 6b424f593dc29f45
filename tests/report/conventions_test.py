"""Counts of parameters and work, against the formulas of the papers for GPT-2 124M."""

import dataclasses

import pytest

from lm.models.decoder import Decoder
from lm.models.encdec import EncDec
from lm.report import conventions, exponents
from tests.models import contract_test, electra_test, encdec_test, nnlm_test

L, D, H, V, S = 12, 768, 12, 50257, 1024
GPT2 = Decoder(layers=L, heads=H, width=D, vocab_size=V, max_len=S)
TRUNK = 12 * L * D**2


def test_each_convention_gives_its_published_formula():
    """The six with products alone, and Hoffmann's appendix F with the embedding as a product."""
    work = conventions.flops_per_token(GPT2, GPT2.spec(), S)
    assert set(work) == set(exponents.FLOPS)
    assert work["flops_kaplan"] == 6 * TRUNK == 509_607_936
    assert work["flops_kaplan_attention"] == 566_231_040
    assert work["flops_head"] == 741_192_192
    assert work["flops_head_causal"] == 797_815_296
    assert work["flops_head_full"] == 854_438_400
    assert work["flops_deepseek"] == 622_854_144
    assert work["flops_all"] == 972_776_448
    chinchilla = work["flops_chinchilla"]
    assert chinchilla == 1_087_349_760
    appendix_f = 2 * S * V * D + L * (24 * S * D**2 + 4 * S**2 * D + 3 * H * S**2) + 2 * S * V * D
    assert chinchilla == 3 * appendix_f / S


def test_a_tied_table_counts_as_head_and_as_embedding_and_once_in_total():
    tied, untied = GPT2, dataclasses.replace(GPT2, tied=False)
    a, b = (conventions.counts(model, model.spec()) for model in (tied, untied))
    assert a["params_head"] == b["params_head"] == V * D and a["params_embedding"] == (V + S) * D
    assert a["params_trunk"] == b["params_trunk"] == TRUNK
    assert b["params_total"] - a["params_total"] == V * D and a["params_total"] == 124_439_808


EVERY = contract_test.MODELS | {f"{name} (encdec)": m for name, m in encdec_test.MODELS.items()}
EVERY |= {"electra": electra_test.MODEL, "nnlm": nnlm_test.MODEL}


@pytest.mark.parametrize("name", EVERY)
def test_every_model_is_counted(name):
    model = EVERY[name]
    counted = conventions.counts(model, model.spec())
    work = conventions.flops_per_token(model, model.spec(), 16)
    assert counted["params_trunk"] > 0 and counted["params_head"] > 0
    assert work["flops_head"] == 6 * (counted["params_trunk"] + counted["params_head"])
    assert ("flops_head_causal" in work) == (hasattr(model, "heads") and not hasattr(model, "decoder_layers"))


def test_a_model_of_two_stacks_has_the_counts_without_attention():
    model = EncDec(layers=2, width=32, heads=4, vocab_size=128)
    work = conventions.flops_per_token(model, model.spec(), 64)
    assert set(work) == {"flops_kaplan", "flops_head", "flops_all"}
    assert work["flops_head"] == pytest.approx(6 * (2 * 12 + 2 * 16) * 32**2 + 6 * 128 * 32)
