import dataclasses

import jax
import numpy as np
import pytest

import lm
from lm.core import params as specs
from lm.core import tree
from lm.core.errors import UsageError
from lm.models.electra import PARTS, Electra
from lm.models.encoder import Encoder
from lm.train import meters

SMALL = {"layers": 2, "max_len": 16, "types": 2}
MODEL = Electra(
    Encoder(**SMALL, width=32, heads=4, embed_width=16, outputs=("detect",)),
    Encoder(**SMALL, width=8, heads=2, embed_width=16, outputs=("tokens",)),
    vocab_size=128,
    valid_vocab_size=125,
)
SHARED = {"embed/table", "positions/table", "types/table", "embed_norm/scale", "embed_norm/bias"}
TOKENS = np.random.default_rng(0).integers(0, 125, (3, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    """Initial values plus noise, so that no bias is zero and no scale is one."""
    rng = np.random.default_rng(0)
    flat = tree.flatten(specs.initialize(MODEL.spec(), jax.random.key(0)))
    return tree.unflatten({k: v + 0.1 * rng.standard_normal(v.shape, np.float32) for k, v in flat.items()})


def test_each_parameter_is_of_one_part_or_an_embedding_of_both():
    paths = set(tree.flatten(MODEL.spec()))
    assert {path for path in paths if not path.startswith(PARTS)} == SHARED
    sizes = [specs.count(MODEL.parts[name].spec()) for name in PARTS]
    shared = sum(np.prod(p.shape) for path, p in tree.flatten(MODEL.spec()).items() if path in SHARED)
    assert specs.count(MODEL.spec()) == sum(sizes) - shared


def test_it_is_a_masked_language_model_by_its_generator(params):
    generator, own = MODEL.parts["generator"], MODEL.part_params(params, "generator")
    hidden = MODEL.apply(params, {"tokens_BL": TOKENS}).hidden_BLD
    assert hidden.shape == (3, 12, 8)
    np.testing.assert_array_equal(hidden, generator.apply(own, {"tokens_BL": TOKENS}).hidden_BLD)
    logits = MODEL.logits(MODEL.head(params), hidden)
    assert logits.shape == (3, 12, 128) and logits[..., 125:].max() <= -1e9
    assert MODEL.detect_logits(params, {"tokens_BL": TOKENS}).shape == (3, 12)


def test_floating_point_operations_count_both_parts():
    row = {name: jax.ShapeDtypeStruct((1, n), np.int32) for name, n in (("tokens_BL", 16), ("targets_BP", 3))}
    generator, discriminator = MODEL.parts["generator"], MODEL.parts["discriminator"]
    body = 6 * 16 * specs.count(discriminator.spec(), "matrix") + 3 * 16 * discriminator.attention_flops(16)
    total = meters.flops_per_row(MODEL, MODEL.spec(), row)
    assert total == body + meters.flops_per_row(generator, generator.spec(), row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator": {"embed_width": None}}, r"set generator.embed_width=16"),
        ({"generator": {"max_len": 8}}, r"discriminator.max_len=16 and generator.max_len=8 differ"),
        ({"generator": {"outputs": ("detect",)}}, r"lacks 'tokens'"),
        ({"discriminator": {"outputs": ("tokens",)}}, r"lacks 'detect'"),
    ],
)
def test_parts_that_cannot_share_are_refused(change, message):
    parts = {name: dataclasses.replace(getattr(MODEL, name), **settings) for name, settings in change.items()}
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(MODEL, **parts)


def test_it_is_a_flax_module_by_its_generator(params):
    module = lm.interop.linen(MODEL)
    expected = MODEL.apply(params, {"tokens_BL": TOKENS}).hidden_BLD
    np.testing.assert_array_equal(module.apply({"params": params}, {"tokens_BL": TOKENS}).hidden_BLD, expected)
    assert set(tree.flatten(module.init(jax.random.key(0), {"tokens_BL": TOKENS})["params"])) == set(
        tree.flatten(MODEL.spec())
    )


@pytest.mark.hf
@pytest.mark.parametrize("wanted", [None, "ElectraForPreTraining", "ElectraForMaskedLM"])
def test_each_part_becomes_a_folder_that_transformers_loads(params, tmp_path, wanted):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name = lm.interop.save(tmp_path, MODEL, params, wanted)
    assert name == wanted or (wanted is None and name == "ElectraForPreTraining")
    module, report = getattr(transformers, name).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = module.eval()(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
    batch = {"tokens_BL": TOKENS}
    if name == "ElectraForPreTraining":
        found = MODEL.detect_logits(params, batch)
    else:
        found = MODEL.logits(MODEL.head(params), MODEL.apply(params, batch).hidden_BLD)[..., :125]
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_another_class_is_refused(params, tmp_path):
    with pytest.raises(UsageError, match="BertForMaskedLM"):
        lm.interop.save(tmp_path, MODEL, params, "BertForMaskedLM")
