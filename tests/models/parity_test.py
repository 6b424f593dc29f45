"""The decoder against transformers' own classes, with every tensor random."""

import numpy as np
import pytest

from lm.core import tree
from lm.layers.block import Layer
from lm.models.decoder import Decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, D, H, C, N, L = 64, 32, 4, 8, 2, 12
LLAMA = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": N,
    "num_attention_heads": H,
    "attn_implementation": "eager",
}
OURS = {
    "layers": N,
    "width": D,
    "heads": H,
    "vocab_size": V,
    "mlp_width": 48,
    "positions": "rotary",
    "norm_bias": False,
    "activation": "silu",
    "gated": True,
    "attention_bias": False,
    "mlp_bias": False,
}
NAMES = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
}
LLAMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def randomized(hf):
    """The module in float32 with every parameter drawn anew, norms around one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.copy_(0.2 * torch.randn_like(p) + (1.0 if "norm" in name and "weight" in name else 0.0))
    return hf.eval()


def weights(hf):
    return {name: p.detach().numpy() for name, p in hf.named_parameters()}


def agree(model, params, hf):
    """Logits equal, and hidden states before the last norm too."""
    flat, spec = tree.flatten(params), tree.flatten(model.spec())
    assert {k: v.shape for k, v in flat.items()} == {k: p.shape for k, p in spec.items()}
    tokens = np.random.default_rng(0).integers(0, V, (2, L))
    with torch.no_grad():
        expected = hf(torch.tensor(tokens), output_hidden_states=True)
    out = model.apply(params, {"tokens_BL": tokens}, capture=("hidden_states",))
    logits = model.logits(model.head(params), out.hidden_BLD)
    scale = float(np.abs(expected.logits.numpy()).max())
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-5 * max(scale, 1), rtol=0)
    for ours, theirs in zip(out.captured["hidden_states"][:-1], expected.hidden_states, strict=False):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5 * float(theirs.abs().max()), rtol=0)


def from_llama(model, hf, norms):
    """Our tree from a module with Llama's names: kernels [out, in] are transposed and split into heads."""
    w = weights(hf)

    def leaf(path, p):
        if path == "embed/table":
            return w["model.embed_tokens.weight"]
        if path == "final_norm/scale":
            return w["model.norm.weight"]
        if path == "head/table":
            return w["lm_head.weight"]
        _, _, rest = path.split("/", 2)
        name, kind = rest.rsplit("/", 1)
        name = (NAMES | norms)[name]
        layers = [w[f"model.layers.{i}.{name}.{'bias' if kind == 'bias' else 'weight'}"] for i in range(N)]
        return np.stack([x.T if kind == "kernel" else x for x in layers]).reshape(p.shape)

    return tree.unflatten({path: leaf(path, p) for path, p in tree.flatten(model.spec()).items()})


def test_gpt2():
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=L, n_embd=D, n_layer=N, n_head=H, attn_implementation="eager"
    )
    hf = randomized(transformers.GPT2LMHeadModel(config))
    model = Decoder(layers=N, width=D, heads=H, vocab_size=V, max_len=L, activation="gelu_tanh")
    w = weights(hf)

    def stacked(name):
        return np.stack([w[f"transformer.h.{i}.{name}"] for i in range(N)])

    def norm(name):
        return {"scale": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    def plain(name):
        return {"kernel": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    fused = plain("attn.c_attn")
    qkv = [
        {
            "kernel": fused["kernel"].reshape(N, D, 3, H, C)[:, :, i],
            "bias": fused["bias"].reshape(N, 3, H, C)[:, i],
        }
        for i in range(3)
    ]
    out = plain("attn.c_proj")
    out["kernel"] = out["kernel"].reshape(N, H, C, D)
    layer = {
        "attention": dict(zip("qkv", qkv, strict=True)) | {"o": out},
        "mlp": {"up": plain("mlp.c_fc"), "down": plain("mlp.c_proj")},
        "attention_norm": norm("ln_1"),
        "mlp_norm": norm("ln_2"),
    }
    params = {
        "embed": {"table": w["transformer.wte.weight"]},
        "positions": {"table": w["transformer.wpe.weight"]},
        "group0": {"layer0": layer},
        "final_norm": {"scale": w["transformer.ln_f.weight"], "bias": w["transformer.ln_f.bias"]},
    }
    agree(model, params, hf)


def test_llama_with_grouped_heads():
    config = transformers.LlamaConfig(
        **LLAMA, num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=True
    )
    hf = randomized(transformers.LlamaForCausalLM(config))
    model = Decoder(**OURS | {"norm": "rmsnorm", "tied": False, "kv_heads": 2, "attention_bias": True})
    agree(model, from_llama(model, hf, LLAMA_NORMS), hf)


def test_qwen3_with_free_head_width_and_head_norms():
    config = transformers.Qwen3Config(
        **LLAMA, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=False
    )
    hf = randomized(transformers.Qwen3ForCausalLM(config))
    settings = {"norm": "rmsnorm", "tied": False, "kv_heads": 2, "head_dim": 16, "qk_norm": "head", "norm_eps": 1e-6}
    model = Decoder(**OURS | settings)
    agree(model, from_llama(model, hf, LLAMA_NORMS), hf)


def test_olmo2_with_norms_after_the_sublayers():
    config = transformers.Olmo2Config(**LLAMA, rms_norm_eps=1e-5, tie_word_embeddings=False)
    hf = randomized(transformers.Olmo2ForCausalLM(config))
    settings = {"norm": "rmsnorm", "tied": False, "qk_norm": "projection", "norm_place": "output"}
    model = Decoder(**OURS | settings)
    norms = {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
    agree(model, from_llama(model, hf, norms), hf)


def test_cohere_as_palms_block():
    config = transformers.CohereConfig(**LLAMA, num_key_value_heads=1, rope_theta=5e5, logit_scale=D**-0.5)
    hf = randomized(transformers.CohereForCausalLM(config))
    settings = {
        "kv_heads": 1,
        "block": "parallel",
        "rope_style": "interleaved",
        "logit_scale": D**-0.5,
        "rope_base": 5e5,
    }
    model = Decoder(**OURS | settings)
    agree(model, from_llama(model, hf, {"attention_norm": "input_layernorm"}), hf)


def test_mistral_with_a_window():
    config = transformers.MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=4, tie_word_embeddings=False)
    hf = randomized(transformers.MistralForCausalLM(config))
    settings = {"norm": "rmsnorm", "norm_eps": 1e-6, "tied": False, "kv_heads": 2, "pattern": (Layer(window=4),)}
    model = Decoder(**OURS | settings)
    agree(model, from_llama(model, hf, LLAMA_NORMS), hf)
