"""Reformer's classes against transformers: rotations given and drawn, padding, and the same file again."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import lm
from lm.core import tree
from lm.core.errors import UsageError
from lm.interop import hf, outputs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.hf

V, B = 61, 3
OWN = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "attention_head_size": 6,
    "feed_forward_size": 48,
    "attn_layers": ["local", "lsh", "lsh"],
    "lsh_attn_chunk_length": 4,
    "local_attn_chunk_length": 8,
    "num_hashes": 3,
    "num_buckets": 6,
    "max_position_embeddings": 64,
    "axial_pos_shape": [4, 16],
    "axial_pos_embds_dim": [12, 20],
    "hash_seed": 5,
}
TABLE = OWN | {"axial_pos_embds": False}
ROWS = {
    "causal": ("ReformerModelWithLMHead", OWN),
    "causal_table": ("ReformerModelWithLMHead", TABLE | {"num_buckets": [4, 6], "chunk_size_feed_forward": 1}),
    "unset_buckets": ("ReformerModelWithLMHead", TABLE | {"num_buckets": None, "lsh_num_chunks_before": 2}),
    "lsh": ("ReformerModelWithLMHead", TABLE | {"attn_layers": ["lsh"] * 2, "num_hashes": 1, "hidden_act": "gelu"}),
    "local": ("ReformerModelWithLMHead", OWN | {"attn_layers": ["local"] * 2}),
    "masked": ("ReformerForMaskedLM", OWN | {"lsh_num_chunks_after": 1, "local_num_chunks_after": 1}),
    "masked_table": ("ReformerForMaskedLM", TABLE | {"local_num_chunks_before": 0}),
}


@pytest.fixture(params=ROWS, scope="module")
def row(request, tmp_path_factory):
    """(module with every parameter drawn anew, its folder, our model, our parameters)."""
    name, settings = ROWS[request.param]
    torch.manual_seed(0)
    causal = name == "ReformerModelWithLMHead"
    module = getattr(transformers, name)(transformers.ReformerConfig(**settings, is_decoder=causal)).float().eval()
    with torch.no_grad():
        for path, p in module.named_parameters():
            p.copy_(0.2 * torch.randn_like(p) + (1.0 if path.endswith("norm.weight") else 0.0))
        module.lm_head.bias.copy_(module.lm_head.decoder.bias)
    folder = tmp_path_factory.mktemp(request.param)
    module.save_pretrained(folder)
    return module, folder, *lm.load(folder)


def make_inputs(length, masked):
    """Ids, and where masked padding at the end of one row and the beginning of another."""
    inputs = {"input_ids": np.random.default_rng(length).integers(1, V, (B, length))}
    if masked:
        inputs["attention_mask"] = np.ones((B, length), np.int64)
        inputs["attention_mask"][1, length * 2 // 3 :] = inputs["attention_mask"][2, : length // 4] = 0
    return inputs


def reference(module, inputs):
    """transformers' outputs; buckets that its config does not set are chosen by the length, and then kept."""
    for part in module.modules():
        if hasattr(part, "num_hashes"):
            part.num_buckets = module.config.num_buckets if part.num_chunks_before == 1 else None
    return module(**{k: torch.tensor(v) for k, v in inputs.items()}, use_cache=False, output_hidden_states=True)


def assert_same(out, expected, inputs):
    length = inputs["input_ids"].shape[1]
    real = inputs.get("attention_mask", np.ones((B, length))) > 0
    theirs = [expected.logits, *(h[:, :length] for h in expected.hidden_states)]
    for ours, other in zip([out["logits"], *out["hidden_states"]], theirs, strict=True):
        a, b = ours[real], other.detach().numpy()[real]
        assert np.abs(a - b).max() <= 1e-5 * max(1, np.abs(b).max())


# Within a chunk of both kinds, of one of them, and several; with and without the padding that makes chunks whole.
@pytest.mark.parametrize("length", [3, 6, 8, 16, 37, 48])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_agree_with_rotations_drawn_from_the_seed(row, length, masked):
    module, _, model, params = row
    inputs = make_inputs(length, masked)
    assert_same(lm.interop.forward(model, params, **inputs), reference(module, inputs), inputs)


def test_outputs_agree_with_rotations_that_are_given(row, monkeypatch):
    module, _, model, params = row
    inputs = make_inputs(48, False)
    factors = model.hash_factors(48)
    shape = (model.heads, model.head_size, model.lsh.rounds, max(1, sum(factors) // 2))
    rotations = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.tensor(rotations))
    expected = reference(module, inputs)
    monkeypatch.undo()
    assert_same(lm.interop.forward(model, params, **inputs, lsh_rotations=rotations), expected, inputs)
    drawn = lm.interop.forward(model, params, **inputs)["logits"]
    assert ("lsh" in model.kinds) == bool(np.abs(drawn - expected.logits.detach().numpy()).max() > 1e-3)


def test_gradients_agree_with_transformers_own_backward_pass(row):
    module, folder, model, params = row
    inputs = make_inputs(48, False)
    weights = np.random.default_rng(2).standard_normal((B, 48, V)).astype(np.float32)
    for embedding in module.modules():
        if isinstance(embedding, torch.nn.Embedding):
            embedding.padding_idx = None  # torch drops the gradient of that row.
    module.zero_grad()
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout) or hasattr(part, "dropout"):
            part.dropout = 0.0
    if model.axial is not None:
        inputs = {"input_ids": np.tile(inputs["input_ids"], 2)[:, :64]}  # Its training takes all places.
        weights = np.tile(weights, (1, 2, 1))[:, :64]
    module.train()
    (reference(module, inputs).logits * torch.tensor(weights)).sum().backward()
    module.eval()
    theirs = {path: p.grad.numpy() for path, p in module.named_parameters() if p.grad is not None}
    batch = outputs.kind_of(model).batch(model, inputs)

    def weighted(params):
        return (model.logits(model.head(params), model.apply(params, batch).hidden_BLD) * weights).sum()

    gradients = dict(hf.named(model, jax.jit(jax.grad(weighted))(params), type(module).__name__))
    for path, expected in theirs.items():
        assert np.linalg.norm(gradients[path] - expected) <= 1e-4 * np.linalg.norm(expected), path


def test_what_is_saved_is_the_same_for_both(row, tmp_path):
    module, _, model, params = row
    name = type(module).__name__
    assert lm.interop.save(tmp_path, model, params) == name
    again, info = type(module).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for path, p in again.named_parameters():
        np.testing.assert_array_equal(p.detach().numpy(), dict(module.named_parameters())[path].detach().numpy())
    inputs = make_inputs(37, True)
    np.testing.assert_array_equal(
        reference(again.eval(), inputs).logits.detach().numpy(), reference(module, inputs).logits.detach().numpy()
    )
    ours = tree.flatten(lm.load(tmp_path)[1])
    assert all(np.array_equal(a, ours[path]) for path, a in tree.flatten(params).items())


def test_either_name_of_the_heads_bias_is_read(row, tmp_path):
    module, folder, _, params = row
    arrays = safetensors.load_file(folder / "model.safetensors")
    for kept, left_out in (("lm_head.bias", "lm_head.decoder.bias"), ("lm_head.decoder.bias", "lm_head.bias")):
        rest = {name: array for name, array in arrays.items() if name != left_out}
        safetensors.save_file(rest, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        np.testing.assert_array_equal(lm.load(tmp_path)[1]["head"]["bias"], arrays[kept])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"is_decoder": False}, "is_decoder=False"),
        ({"lsh_num_chunks_after": 1}, "lsh.after=1 looks ahead"),
        ({"attn_layers": ["lsh", "full"]}, "unknown pattern 'full'"),
        ({"max_position_embeddings": 65}, "at least max_len=65 places"),
        ({"num_buckets": 7}, "must hold even numbers"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"sinkhorn": True}, "sinkhorn=True, which may change the numbers"),
    ],
)
def test_settings_that_would_change_numbers_are_refused_by_name(tmp_path, settings, words):
    config = {"architectures": ["ReformerModelWithLMHead"], "model_type": "reformer", "is_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config | OWN | settings))
    with pytest.raises(UsageError, match=words):
        hf.read_model(tmp_path)


def test_the_papers_masking_is_no_class_of_theirs(row, tmp_path):
    _, _, model, params = row
    if "lsh" in model.kinds:
        own = dataclasses.replace(model, lsh=dataclasses.replace(model.lsh, masking="buckets"))
        with pytest.raises(UsageError, match="no class of Hugging Face's"):
            lm.interop.save(tmp_path, own, params)


def test_rotations_of_another_shape_are_refused(row):
    _, _, model, params = row
    if "lsh" in model.kinds:
        with pytest.raises(UsageError, match="lsh_rotations must be"):
            lm.interop.forward(model, params, **make_inputs(48, False), lsh_rotations=np.ones((4, 6, 3, 1)))
