"""Classes with a head for a task against transformers: the same scores from the same file, and the same file again."""

import jax
import numpy as np
import pytest

import lm
from lm.core import tree
from lm.interop import hf, outputs
from lm.interop.heads import ARCHITECTURES, numbers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

V, B, L, CHOICES = 61, 4, 10, 2
BERT = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}
LLAMA = {name: value for name, value in BERT.items() if name != "max_position_embeddings"} | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": V, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
FALCON = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
SETTINGS = {
    "bert": BERT,
    "roberta": BERT | {"pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {
        "vocab_size": V,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 20,
    },
    "albert": BERT | {"embedding_size": 16},
    "electra": BERT | {"embedding_size": 16},
    "modernbert": BERT | {"num_hidden_layers": 3, "local_attention": 6, "pad_token_id": 0},
    "xlnet": {"vocab_size": V, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "mem_len": None},
    "gpt2": GPT2,
    "openai-gpt": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": LLAMA | {"head_dim": 8},
    "olmo2": LLAMA,
    "gemma3_text": LLAMA | {"head_dim": 8, "sliding_window": 5},
    "gpt_neox": BERT,
    "falcon": FALCON,
}
ODD = {
    "ModernBertForSequenceClassification, mean": {"classifier_pooling": "mean", "norm_bias": True},
    "ModernBertForMultipleChoice, mean": {"classifier_pooling": "mean", "classifier_bias": True},
    "XLNetForSequenceClassification, first": {"summary_type": "first", "summary_activation": "gelu"},
    "ElectraForMultipleChoice, last": {"summary_type": "last", "summary_activation": "tanh"},
    "LlamaForSequenceClassification, tied": {"tie_word_embeddings": True},
    "BertForSequenceClassification, regression": {"num_labels": 1},
}


@pytest.fixture(params=[*ARCHITECTURES, *ODD], scope="module")
def row(request, tmp_path_factory):
    """(class name, module with every parameter drawn anew, our model, our parameters)."""
    name = request.param.partition(",")[0]
    labels = {} if "Question" in name or "Choice" in name else {"id2label": {0: "bad", 1: "so", 2: "good"}}
    odd = ODD.get(request.param, {})
    settings = SETTINGS[ARCHITECTURES[name]] | ({} if "num_labels" in odd else labels) | odd
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    module = cls(cls.config_class(**{"pad_token_id": 0} | settings, attn_implementation="eager")).float().eval()
    with torch.no_grad():
        for path, p in module.named_parameters():
            p.copy_(0.2 * torch.randn_like(p) + (1.0 if "weight" in path and p.ndim == 1 else 0.0))
    folder = tmp_path_factory.mktemp("row")
    module.save_pretrained(folder)
    return name, module, *lm.load(folder)


def make_inputs(name, module, padded):
    """Ids, a mask with padding at the end of one row and the beginning of another, and segments."""
    rng, shape = np.random.default_rng(0), (B, CHOICES, L) if "Choice" in name else (B, L)
    inputs = {"input_ids": rng.integers(3, V, shape), "attention_mask": np.ones(shape, np.int64)}
    if padded:
        inputs["attention_mask"][1, ..., 6:] = inputs["attention_mask"][2, ..., :3] = 0
        inputs["input_ids"][inputs["attention_mask"] == 0] = module.config.pad_token_id
    if getattr(module.config, "type_vocab_size", 0) > 1 or "XLNet" in name:
        inputs["token_type_ids"] = np.broadcast_to(np.arange(L) >= 5, shape).astype(np.int64)
    return inputs


def reference(module, inputs, dtype=torch.float32):
    """{name: float64 array} as `forward` names them."""
    with torch.no_grad():
        out = module.to(dtype)(**{k: torch.tensor(v) for k, v in inputs.items()}, output_hidden_states=True)
    module.float()
    found = {name: out[name] for name in ("logits", "start_logits", "end_logits") if name in out}
    return {n: a.double().numpy() for n, a in (found | {f"h{i}": h for i, h in enumerate(out.hidden_states)}).items()}


@pytest.mark.parametrize("padded", [False, True])
def test_scores_and_hidden_states_agree(row, padded):
    name, module, model, params = row
    inputs = make_inputs(name, module, padded)
    out = lm.interop.forward(model, params, **inputs)
    out.pop("mems", None)
    out |= {f"h{i}": h for i, h in enumerate(out.pop("hidden_states"))}
    expected, exact = reference(module, inputs), reference(module, inputs, torch.float64)
    assert out.keys() == expected.keys()
    seen = inputs["attention_mask"].reshape(-1, L).astype(bool)
    for path, b in expected.items():
        rows = seen if b.shape[:2] == seen.shape else ...
        a, b, c = (x[rows] for x in (out[path], b, exact[path]))
        noise = np.nan_to_num(np.abs(b - c).max())
        assert a.shape == b.shape and np.abs(a - b).max() <= max(10 * noise, 1e-5 * max(1, np.abs(b).max())), path


def test_gradients_agree(row):
    name, module, model, params = row
    inputs = make_inputs(name, module, False)
    for embedding in module.modules():
        if isinstance(embedding, torch.nn.Embedding):
            embedding.padding_idx = None  # torch drops the gradient of that row.
    module.zero_grad()
    out = module(**{k: torch.tensor(v) for k, v in inputs.items()})
    found = {key: out[key] for key in ("logits", "start_logits", "end_logits") if key in out}
    rng = np.random.default_rng(1)
    weights = {key: rng.standard_normal(x.shape).astype(np.float32) for key, x in found.items()}
    sum((x * torch.tensor(weights[key])).sum() for key, x in found.items()).backward()
    kind = outputs.kind_of(model)
    batch = kind.batch(model, inputs)

    def weighted(params):
        ours = kind.outputs(model, params, batch)
        return sum((ours[key] * w).sum() for key, w in weights.items())

    theirs = {path: p.grad.numpy() for path, p in module.named_parameters() if p.grad is not None}
    gradients = dict(hf.named(model, jax.jit(jax.grad(weighted))(params), name))
    largest = max(np.linalg.norm(g) for g in theirs.values())
    assert not {p for p, g in theirs.items() if np.linalg.norm(g) > 1e-6 * largest} - gradients.keys()
    for path, g in gradients.items():
        expected = theirs.get(path, np.zeros_like(g))
        size = max(np.linalg.norm(expected), 1e-3 * largest)
        assert abs(np.linalg.norm(g) - np.linalg.norm(expected)) <= 1e-4 * size, path
        assert np.linalg.norm(g - expected) <= 1e-3 * size, path


def test_what_is_saved_is_the_same_for_both(row, tmp_path):
    name, module, model, params = row
    assert lm.interop.save(tmp_path, model, params, architecture=name) == name
    again, info = getattr(transformers, name).from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.id2label == module.config.id2label
    before = dict(module.named_parameters())
    for path, p in again.named_parameters():
        np.testing.assert_array_equal(p.detach().numpy(), before[path].detach().numpy())
    inputs = make_inputs(name, module, True)
    expected = reference(module, inputs)
    for path, x in reference(again.eval(), inputs).items():
        np.testing.assert_allclose(x, expected[path], rtol=0, atol=1e-6 * np.nanmax(np.abs(expected[path])))
    read, found = lm.load(tmp_path)
    assert numbers(read) == numbers(model)
    ours = tree.flatten(found)
    assert all(np.array_equal(a, ours[path]) for path, a in tree.flatten(params).items())
