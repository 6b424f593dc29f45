"""BERT's family against transformers: the same numbers from the same file, and the same file from the same numbers."""

import json

import jax
import numpy as np
import pytest

import lm
from lm.core import tree
from lm.interop import hf
from lm.interop.bert import numbers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

V, L = 61, 12
BERT = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}
DISTIL = {"vocab_size": V, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 20}
ALBERT = BERT | {"embedding_size": 16, "num_hidden_layers": 5, "num_hidden_groups": 2, "inner_group_num": 2}
MODERN = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "local_attention": 6,
    "pad_token_id": 0,
}
MODERN_ODD = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_hidden_layers": 3,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    },
    "norm_bias": True,
    "attention_bias": True,
    "mlp_bias": True,
    "classifier_bias": True,
    "hidden_activation": "silu",
    "classifier_activation": "relu",
    "tie_word_embeddings": False,
}
ROWS = {
    "bert": ("BertForMaskedLM", BERT),
    "bert_odd": ("BertForMaskedLM", BERT | {"hidden_act": "relu", "type_vocab_size": 3, "tie_word_embeddings": False}),
    "bert_pretraining": ("BertForPreTraining", BERT),
    "bert_next_sentence": ("BertForNextSentencePrediction", BERT | {"tie_word_embeddings": False}),
    "roberta": ("RobertaForMaskedLM", BERT | {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "distilbert": ("DistilBertForMaskedLM", DISTIL),
    "albert": ("AlbertForMaskedLM", ALBERT),
    "albert_pretraining": ("AlbertForPreTraining", ALBERT | {"num_hidden_groups": 1, "inner_group_num": 1}),
    "electra": ("ElectraForMaskedLM", BERT | {"embedding_size": 16}),
    "electra_wide": ("ElectraForPreTraining", BERT | {"embedding_size": 32}),
    "electra_discriminator": ("ElectraForPreTraining", BERT | {"embedding_size": 16, "hidden_act": "relu"}),
    "modernbert": ("ModernBertForMaskedLM", MODERN),
    "modernbert_odd": ("ModernBertForMaskedLM", MODERN | MODERN_ODD),
    "modernbert_no_norm_first": ("ModernBertForMaskedLM", MODERN | {"num_hidden_layers": 1, "local_attention": 7}),
}


@pytest.fixture(params=ROWS, scope="module")
def row(request, tmp_path_factory):
    """(class name, module with every parameter drawn anew, its folder, our model, our parameters)."""
    name, settings = ROWS[request.param]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    module = cls(cls.config_class(**settings, attn_implementation="eager")).eval()
    with torch.no_grad():
        for path, p in module.named_parameters():
            p.copy_(0.2 * torch.randn_like(p) + (1.0 if "weight" in path and p.ndim == 1 else 0.0))
    folder = tmp_path_factory.mktemp(request.param)
    module.save_pretrained(folder)
    return name, module, folder, *lm.load(folder)


def make_inputs(module, padded):
    """Ids, a mask with padding at the end of one row and the beginning of another, and segments."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, V, (3, L)), np.ones((3, L), np.int64)
    if padded:
        mask[1, 8:] = mask[2, :3] = 0
        ids[mask == 0] = module.config.pad_token_id or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(module.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = (np.arange(L)[None] >= 7).astype(np.int64).repeat(3, 0)
    return inputs


def reference(module, inputs, dtype=torch.float32):
    """{name: float64 array} as `forward` names them."""
    with torch.no_grad():
        out = module.to(dtype)(**{k: torch.tensor(v) for k, v in inputs.items()}, output_hidden_states=True)
    module.float()
    found = {"logits": out.get("prediction_logits", out.get("logits"))}
    found |= {name: out[name] for name in ("seq_relationship_logits", "sop_logits") if name in out}
    if "Next" in type(module).__name__:
        found = {"logits": out["logits"]}
    found |= {f"hidden_{i}": h for i, h in enumerate(out.hidden_states)}
    return {name: array.double().numpy() for name, array in found.items()}


@pytest.mark.parametrize("padded", [False, True])
def test_outputs_agree(row, padded):
    _, module, _, model, params = row
    inputs = make_inputs(module, padded)
    out = lm.interop.forward(model, params, **inputs)
    out |= {f"hidden_{i}": h for i, h in enumerate(out.pop("hidden_states"))}
    expected, exact = reference(module, inputs), reference(module, inputs, torch.float64)
    assert out.keys() == expected.keys()
    seen = inputs["attention_mask"].astype(bool)
    for name, b in expected.items():
        a, b, c = (x[seen] if x.shape[:2] == (3, L) else x[seen[:, 0]] for x in (out[name], b, exact[name]))
        noise = np.nan_to_num(np.abs(b - c).max())
        assert np.abs(a - b).max() <= max(10 * noise, 1e-5 * max(1, np.abs(b).max())), name


def test_gradients_agree(row):
    name, module, _, model, params = row
    inputs = make_inputs(module, False)
    rng, weights = np.random.default_rng(1), {}
    module.zero_grad()
    for embedding in module.modules():
        if isinstance(embedding, torch.nn.Embedding):
            embedding.padding_idx = None  # torch drops the gradient of that row.
    out = module(**{k: torch.tensor(v) for k, v in inputs.items()})
    found = {"logits": out.get("prediction_logits", out.get("logits"))}
    found |= {k: out[k] for k in ("seq_relationship_logits", "sop_logits") if k in out}
    weights = {k: rng.standard_normal(x.shape).astype(np.float32) for k, x in found.items()}
    sum((x * torch.tensor(weights[k])).sum() for k, x in found.items()).backward()

    from lm.interop import outputs

    batch = {"tokens_BL": inputs["input_ids"]}
    if "token_type_ids" in inputs:
        batch["types_BL"] = inputs["token_type_ids"]

    def weighted(params):
        ours = outputs.KINDS[type(model)].outputs(model, params, batch)
        return sum((ours[k] * w).sum() for k, w in weights.items())

    gradients = dict(hf.named(model, jax.jit(jax.grad(weighted))(params), name))
    theirs = {path: p.grad.numpy() for path, p in module.named_parameters() if p.grad is not None}
    largest = max(np.linalg.norm(g) for g in theirs.values())
    assert not {p for p, g in theirs.items() if np.linalg.norm(g) > 1e-6 * largest} - gradients.keys()
    for path, g in gradients.items():
        if path == "cls.predictions.bias" and not model.tied:
            continue  # No output depends on it: its decoder has a bias of its own.
        expected = theirs.get(path, np.zeros_like(g))
        ours, size = np.linalg.norm(g), max(np.linalg.norm(expected), 1e-3 * largest)
        assert abs(ours - np.linalg.norm(expected)) <= 1e-4 * size, path
        assert np.linalg.norm(g - expected) <= 1e-3 * size, path


def test_what_is_saved_is_the_same_for_both(row, tmp_path):
    name, module, _, model, params = row
    assert lm.interop.save(tmp_path, model, params, architecture=name) == name
    again, info = getattr(transformers, name).from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = dict(module.named_parameters())
    for path, p in again.named_parameters():
        if path == "cls.predictions.bias" and not model.tied:
            continue
        np.testing.assert_array_equal(p.detach().numpy(), before[path].detach().numpy())
    inputs = make_inputs(module, False)
    expected = reference(module, inputs)
    for path, x in reference(again.eval(), inputs).items():
        np.testing.assert_allclose(x, expected[path], rtol=0, atol=1e-6 * np.abs(expected[path]).max())
    read, found = lm.load(tmp_path)
    assert numbers(read) == numbers(model)
    ours = tree.flatten(found)
    assert all(np.array_equal(a, ours[path]) for path, a in tree.flatten(params).items())


def test_both_spellings_of_modernbert_give_the_same_model(tmp_path):
    config = transformers.ModernBertConfig(**MODERN, local_rope_theta=500.0, global_attn_every_n_layers=2)
    transformers.ModernBertForMaskedLM(config).save_pretrained(tmp_path)
    model, params = lm.load(tmp_path)
    windows = [(layer.window, layer.rope_base) for layer in model.stack.layers]
    assert windows == [(None, None), (4, 500.0)] * 2 + [(None, None)] and model.rope_base == 160_000
    assert model.context_limit is None
    lm.interop.save(tmp_path, model, params)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    for names in (("layer_types", "rope_parameters"), ("global_attn_every_n_layers", "global_rope_theta")):
        path.write_text(json.dumps({name: value for name, value in written.items() if name not in names}))
        assert numbers(lm.load(tmp_path)[0]) == numbers(model)
