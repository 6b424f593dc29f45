"""Every class against transformers: the same numbers from the same file, and the same file from the same numbers."""

import json

import jax
import numpy as np
import pytest

import lm
from lm.core import tree
from lm.core.errors import UsageError
from lm.generate.sample import generate
from lm.interop import hf
from lm.interop.decoders import numbers
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf
from transformers.core_model_loading import revert_weight_conversion  # noqa: E402

V, L = 61, 12  # A vocabulary that is a multiple of nothing.
GPT2 = {"vocab_size": V, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NEOX = LLAMA | {"num_key_value_heads": None}
FALCON = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
QWEN3_MOE = LLAMA | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GEMMA = LLAMA | {
    "num_hidden_layers": 4,
    "head_dim": 12,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
ROWS = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2_odd": (
        "GPT2LMHeadModel",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 40, "tie_word_embeddings": False},
    ),
    "gpt2_unscaled": ("GPT2LMHeadModel", GPT2 | {"scale_attn_weights": False, "activation_function": "relu"}),
    "gpt1": ("OpenAIGPTLMHeadModel", GPT2),
    "llama": ("LlamaForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama_one_kv_head": ("LlamaForCausalLM", LLAMA | {"num_key_value_heads": 1, "head_dim": 12, "rms_norm_eps": 1e-5}),
    "llama_tied_llama3": (
        "LlamaForCausalLM",
        LLAMA | {"tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e4}},
    ),
    "llama_linear": (
        "LlamaForCausalLM",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama_yarn": ("LlamaForCausalLM", LLAMA | {"rope_parameters": YARN | {"rope_type": "yarn"}}),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 5}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 16}),
    "qwen3_windows": (
        "Qwen3ForCausalLM",
        LLAMA | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "olmo2": ("Olmo2ForCausalLM", LLAMA),
    "cohere": ("CohereForCausalLM", LLAMA | {"num_key_value_heads": 1, "logit_scale": 32**-0.5}),
    "gemma3": ("Gemma3ForCausalLM", GEMMA),
    "gemma3_odd": (
        "Gemma3ForCausalLM",
        GEMMA
        | {"final_logit_softcapping": 3.0, "rope_parameters": GEMMA_ROPE}
        | {"num_key_value_heads": 1, "attention_bias": True},
    ),
    "mixtral": ("MixtralForCausalLM", LLAMA | {"num_local_experts": 4}),
    "mixtral_odd": (
        "MixtralForCausalLM",
        LLAMA
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "num_key_value_heads": 1}
        | {"sliding_window": 5, "head_dim": 12},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", QWEN3_MOE | {"norm_topk_prob": True}),
    "qwen3_moe_odd": (
        "Qwen3MoeForCausalLM",
        QWEN3_MOE
        | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
        | {"num_experts_per_tok": 3, "head_dim": 12, "use_sliding_window": True, "sliding_window": 5},
    ),
    "neox": ("GPTNeoXForCausalLM", NEOX),
    "neox_serial": ("GPTNeoXForCausalLM", NEOX | {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "falcon_7b": ("FalconForCausalLM", FALCON | {"multi_query": True}),
    "falcon_40b": (
        "FalconForCausalLM",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "ffn_hidden_size": 48},
    ),
}


def random_module(name, settings):
    """A module with every parameter drawn anew, norms around one."""
    cls = getattr(transformers, name)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    module = cls(cls.config_class(**settings | special | eager)).float().eval()
    with torch.no_grad():
        for path, p in module.named_parameters():
            scale = "weight" in path and p.ndim == 1
            p.copy_(0.2 * torch.randn_like(p) + (1.0 if scale else 0.0))
    return module


@pytest.fixture(params=ROWS, scope="module")
def row(request, tmp_path_factory):
    """(class name, module, its folder, our model, our parameters)."""
    name, settings = ROWS[request.param]
    module = random_module(name, {k: v for k, v in settings.items() if v is not None})
    folder = tmp_path_factory.mktemp(request.param)
    module.save_pretrained(folder)
    return name, module, folder, *lm.load(folder)


def make_inputs():
    """Ids of three rows, and a mask with padding at the end of one and the beginning of another."""
    ids = np.random.default_rng(0).integers(3, V, (3, L))
    mask = np.ones((3, L), np.int64)
    mask[1, 8:] = mask[2, :3] = 0
    return ids, mask


def reference(module, ids, mask=None, dtype=torch.float32):
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        out = module.to(dtype)(torch.tensor(ids), attention_mask=mask, output_hidden_states=True, use_cache=False)
    module.float()
    return [out.logits.double().numpy(), *(h.double().numpy() for h in out.hidden_states)]


@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_hidden_states_agree(row, padded):
    _, module, _, model, params = row
    ids, mask = make_inputs()
    given = {"attention_mask": mask} if padded else {}
    seen = mask.astype(bool) if padded else np.ones_like(mask, bool)
    out = lm.interop.forward(model, params, input_ids=ids, **given)
    expected = reference(module, ids, mask if padded else None)
    exact = reference(module, ids, mask if padded else None, torch.float64)
    ours = [out["logits"], *out["hidden_states"]]
    assert len(ours) == len(expected)
    for a, b, c in zip(ours, expected, exact, strict=True):
        noise = np.nan_to_num(np.abs(b - c)[seen].max())  # Rows that see nothing are NaN there in float64.
        assert np.abs(a - b)[seen].max() <= max(10 * noise, 1e-5 * max(1, np.abs(b[seen]).max()))


def test_loss_and_gradients_agree(row):
    name, module, _, model, params = row
    ids, _ = make_inputs()
    module.zero_grad()
    expected = module(torch.tensor(ids), labels=torch.tensor(ids), use_cache=False).loss
    expected.backward()
    batch = {"tokens_BL": ids[:, :-1], "targets_BL": ids[:, 1:], "weights_BL": np.ones((3, L - 1), np.float32)}

    def loss(params):
        total, weight, _ = Causal().loss(model, params, batch)["loss"]
        return total / weight

    ours, gradients = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(ours, expected.item(), rtol=1e-5)
    theirs = {path: p.grad for path, p in module.named_parameters() if p.grad is not None}
    theirs = {path: g.numpy() for path, g in revert_weight_conversion(module, theirs).items()}  # As in the file.
    found = dict(hf.named(model, gradients, name))
    assert found.keys() == theirs.keys()
    largest = max(np.linalg.norm(g) for g in theirs.values())
    for path, g in found.items():
        # Key biases shift all scores of a query alike: their gradient is rounding noise around zero.
        bound = 1e-4 * max(np.linalg.norm(theirs[path]), 1e-3 * largest)
        assert np.linalg.norm(g - theirs[path]) <= bound, path


def test_greedy_generation_agrees(row):
    _, module, _, model, params = row
    ids = make_inputs()[0][:1, :5]
    expected = module.generate(
        torch.tensor(ids), attention_mask=torch.ones(1, 5), max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    ours = generate(model, params, [ids[0]], 8, temperature=0)[0]
    # Ends of text are forbidden there, and not here: compare as far as they are not wanted.
    theirs = expected[0, 5:].numpy()
    wanted = np.flatnonzero(ours == 2)
    stop = wanted[0] if len(wanted) else 8
    assert stop > 0 and ours[:stop].tolist() == theirs[:stop].tolist()


def test_what_is_saved_is_the_same_for_both(row, tmp_path):
    name, module, folder, model, params = row
    made = lm.interop.save(tmp_path, model, params, shard_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [made]
    again, info = getattr(transformers, made).from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, _ = make_inputs()
    for a, b in zip(reference(again.eval(), ids), reference(module, ids), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    for path, p in again.named_parameters():
        np.testing.assert_array_equal(p.detach().numpy(), dict(module.named_parameters())[path].detach().numpy())
    ours = tree.flatten(lm.load(tmp_path)[1])
    assert all(np.array_equal(a, ours[path]) for path, a in tree.flatten(params).items())


def test_the_class_that_was_asked_for_is_written(row, tmp_path):
    name, _, _, model, params = row
    assert lm.interop.save(tmp_path, model, params, architecture=name) == name
    assert numbers(hf.load(tmp_path)[0]) == numbers(model)


def test_a_model_that_no_class_computes_is_refused(tmp_path):
    odd = Decoder(layers=1, width=8, heads=1, vocab_size=V, positions="none")
    with pytest.raises(UsageError, match="no class of Hugging Face's"):
        lm.interop.save(tmp_path / "odd", odd, {})
    assert not (tmp_path / "odd").exists()
