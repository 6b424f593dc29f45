"""Encoder-decoders against transformers: the same numbers from the same file, and the reverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm
from lm.core import tree
from lm.generate.sample import generate
from lm.interop import hf, outputs
from lm.interop.encdecs import numbers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

V, S, L, PAD = 61, 12, 9, 0
T5 = {
    "vocab_size": V,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
# Heads that do not add up to the width, a deeper decoder, and distances beyond the last bucket.
ODD = {"d_kv": 12, "num_decoder_layers": 3, "relative_attention_num_buckets": 10, "relative_attention_max_distance": 7}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SIDES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
BART = SIDES | {"vocab_size": V, "max_position_embeddings": 20}
MARIAN = BART | {"pad_token_id": 60, "decoder_start_token_id": 60, "scale_embedding": True}
FSMT = SIDES | {"src_vocab_size": 53, "tgt_vocab_size": V}
UNEVEN = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 40}
ROWS = {
    "t5": ("T5ForConditionalGeneration", T5),
    "t5_odd": ("T5ForConditionalGeneration", T5 | ODD),
    "t5_1_1": ("T5ForConditionalGeneration", T5 | GATED),
    "mt5": ("MT5ForConditionalGeneration", T5 | GATED),
    "umt5": ("UMT5ForConditionalGeneration", T5 | GATED),
    "umt5_scaled": ("UMT5ForConditionalGeneration", T5 | ODD | {"feed_forward_proj": "gated-silu"}),
    "bart": ("BartForConditionalGeneration", BART),
    "bart_odd": (
        "BartForConditionalGeneration",
        BART | UNEVEN | {"scale_embedding": True, "tie_word_embeddings": False},
    ),
    "marian": ("MarianMTModel", MARIAN | {"activation_function": "swish"}),
    "marian_split": (
        "MarianMTModel",
        MARIAN | UNEVEN | {"vocab_size": 67, "decoder_vocab_size": V, "share_encoder_decoder_embeddings": False},
    ),
    "fsmt": ("FSMTForConditionalGeneration", FSMT),
    "fsmt_tied": ("FSMTForConditionalGeneration", FSMT | UNEVEN | {"src_vocab_size": V, "tie_word_embeddings": True}),
}
# transformers 5.x ties the heads of T5's whole family when it makes them, and keeps them apart when it loads.
UNTIED = ("t5_1_1", "mt5", "umt5", "umt5_scaled")


def random_module(row):
    """A module with every parameter and buffer of the file drawn anew, norms around one."""
    name, settings = ROWS[row]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    module = cls(cls.config_class(**settings, attn_implementation="eager")).float().eval()
    if row in UNTIED:
        module.lm_head.weight = torch.nn.Parameter(torch.zeros_like(module.lm_head.weight))
    if row == "bart_odd":
        # Without a tied head it keeps the two sides' tables apart too, which no file of BART's does.
        module.model.encoder.embed_tokens = module.model.decoder.embed_tokens = module.model.shared
    with torch.no_grad():
        for path, p in module.named_parameters():
            if "embed_positions" not in path or "bart" in row:
                p.copy_(0.2 * torch.randn_like(p) + (1.0 if "weight" in path and p.ndim == 1 else 0.0))
        if hasattr(module, "final_logits_bias"):
            module.final_logits_bias.normal_(std=0.3)
    return module


@pytest.fixture(params=ROWS, scope="module")
def row(request, tmp_path_factory):
    """(class name, module, its folder, our model, our parameters)."""
    module = random_module(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    module.save_pretrained(folder)
    return ROWS[request.param][0], module, folder, *lm.load(folder)


def make_inputs(module, padded):
    """Ids of both sides, and masks with padding at the end of one row and the beginning of another."""
    rng, config = np.random.default_rng(0), module.config
    sizes = getattr(config, "src_vocab_size", config.vocab_size), getattr(config, "decoder_vocab_size", V)
    ids, decoder_ids = (rng.integers(3, n, (3, length)) for n, length in zip(sizes, (S, L), strict=True))
    if not padded:
        return {"input_ids": ids, "decoder_input_ids": decoder_ids}
    mask, decoder_mask = np.ones((3, S), np.int64), np.ones((3, L), np.int64)
    mask[1, 8:] = mask[2, :3] = decoder_mask[1, 6:] = decoder_mask[2, :2] = 0
    for tokens, seen in ((ids, mask), (decoder_ids, decoder_mask)):
        tokens[seen == 0] = config.pad_token_id
    masks = {"attention_mask": mask, "decoder_attention_mask": decoder_mask}
    return {"input_ids": ids, "decoder_input_ids": decoder_ids} | masks


def run(module, inputs):
    """The module's outputs; FSMT hides later tokens only where it makes no cache."""
    tensors = {k: torch.tensor(v) for k, v in inputs.items()}
    return module(**tensors, output_hidden_states=True, use_cache=False)


def head_scale(module):
    """What 5.x multiplies the states of UMT5 by before the head, which was trained, and 4.57 runs, without."""
    at_fault = module.config.model_type == "umt5" and module.config.scale_decoder_outputs
    return module.config.d_model**-0.5 if at_fault else 1.0


def reference(module, inputs, dtype=torch.float32):
    """{name: float64 array}, hidden states one by one."""
    if module.config.model_type == "fsmt":
        dtype = torch.float32  # Its mask overflows in float64.
    with torch.no_grad():
        out = run(module.to(dtype), inputs)
    module.float()
    found = {"logits": out.logits / head_scale(module), "encoder_last_hidden_state": out.encoder_last_hidden_state}
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        found |= {f"{name}_{i}": h for i, h in enumerate(out[name])}
    return {name: array.double().numpy() for name, array in found.items()}


def forward(model, params, inputs):
    out = lm.interop.forward(model, params, **inputs)
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        out |= {f"{name}_{i}": h for i, h in enumerate(out.pop(name))}
    return out


@pytest.mark.parametrize("padded", [False, True])
def test_outputs_agree(row, padded):
    _, module, _, model, params = row
    inputs = make_inputs(module, padded)
    ours, expected, exact = (
        forward(model, params, inputs),
        *(reference(module, inputs, dtype) for dtype in (torch.float32, torch.float64)),
    )
    assert ours.keys() == expected.keys()
    for name, b in expected.items():
        mask = inputs.get("attention_mask" if "encoder" in name else "decoder_attention_mask")
        seen = slice(None) if mask is None else mask.astype(bool)
        a, b, c = (x[seen] for x in (ours[name], b, exact[name]))
        noise = np.nan_to_num(np.abs(b - c).max())
        assert np.abs(a - b).max() <= max(10 * noise, 1e-5 * max(1, np.abs(b).max())), name


def test_loss_and_gradients_agree(row):
    name, module, _, model, params = row
    inputs = make_inputs(module, True)
    labels = np.random.default_rng(1).integers(3, V, (3, L))
    for embedding in module.modules():
        if type(embedding) is torch.nn.Embedding:
            embedding.padding_idx = None  # torch drops the gradient of that row.
    module.zero_grad()
    weight = torch.tensor(inputs["decoder_attention_mask"].astype(np.float32))
    logits = run(module, inputs).logits / head_scale(module)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.tensor(labels), reduction="none")
    expected = (losses * weight).sum() / weight.sum()
    expected.backward()
    kind, weights = outputs.KINDS[type(model)], weight.numpy()
    batch = kind.batch(model, inputs)

    def loss(params):
        scores = jax.nn.log_softmax(kind.outputs(model, params, batch)["logits"])
        return -(jnp.take_along_axis(scores, labels[..., None], -1)[..., 0] * weights).sum() / weights.sum()

    ours, gradients = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(ours, expected.item(), rtol=1e-5)
    found = dict(hf.named(model, gradients, name))
    assert not np.any(found.pop("final_logits_bias", 0.0))
    named = dict(module.named_parameters(remove_duplicate=False))
    computed = {id(p) for path, p in named.items() if "embed_positions" in path and model.positions == "sinusoidal"}
    assert {id(named[path]) for path in found} == {id(p) for p in named.values()} - computed
    theirs = {path: named[path].grad.numpy() for path in found}
    largest = max(np.linalg.norm(g) for g in theirs.values())
    for path, g in found.items():
        # Key biases shift all scores of a query alike: their gradient is rounding noise around zero.
        bound = 1e-4 * max(np.linalg.norm(theirs[path]), 1e-3 * largest)
        assert np.linalg.norm(g - theirs[path]) <= bound, path


def test_greedy_generation_agrees(row):
    _, module, _, model, params = row
    inputs, lengths = make_inputs(module, True), (12, 8)  # The third row's padding comes first, as none of ours does.
    settings = module.generation_config
    # FSMT's default is a beam; the end of the text, awaited or forced at the last place, is not what is compared.
    settings.num_beams, settings.forced_eos_token_id, settings.eos_token_id = 1, None, None
    expected = module.generate(
        torch.tensor(inputs["input_ids"][:2]),
        attention_mask=torch.tensor(inputs["attention_mask"][:2]),
        max_new_tokens=12,
        do_sample=False,
        # The cache there has a place for as many layers as the encoder has, and fails where the decoder has more.
        use_cache=model.layers >= model.decoder_stack.block.layers,
    )
    prompts = [ids[:n] for ids, n in zip(inputs["input_ids"], lengths, strict=False)]
    ours = generate(model, params, prompts, 12, temperature=0)
    np.testing.assert_array_equal(ours, expected[:, 1:])


def test_what_is_saved_is_the_same_for_both(row, tmp_path):
    name, module, _, model, params = row
    assert lm.interop.save(tmp_path, model, params, architecture=name) == name
    again, info = getattr(transformers, name).from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = module.state_dict()
    for path, p in again.state_dict().items():
        if not path.endswith("embed_positions.weight") or model.positions == "learned":
            np.testing.assert_array_equal(p.numpy(), before[path].numpy())
    inputs = make_inputs(module, True)
    expected = reference(module, inputs)
    for path, x in reference(again.eval(), inputs).items():
        np.testing.assert_allclose(x, expected[path], rtol=0, atol=1e-5 * np.abs(expected[path]).max())
    read, found = lm.load(tmp_path)
    assert numbers(read) == numbers(model)
    ours = tree.flatten(found)
    assert all(np.array_equal(a, ours[path]) for path, a in tree.flatten(params).items())
