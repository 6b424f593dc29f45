"""XLNet's classes against transformers, with what other families do not have: orders, targets, segments and memory."""

import numpy as np
import pytest

import lm
from lm.core import tree
from lm.core.errors import UsageError
from lm.generate.sample import generate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

V, L, B = 61, 12, 4
OWN = {"vocab_size": V, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "mem_len": None}
ROWS = {
    "bi": OWN,
    "uni": OWN | {"attn_type": "uni"},
    "bi_data_clamped": OWN | {"bi_data": True, "clamp_len": 4, "tie_word_embeddings": False},
    "same_length": OWN | {"attn_type": "uni", "same_length": True, "mem_len": 5, "reuse_len": 7},
}
PICKS = [1, 5, 9]


@pytest.fixture(params=ROWS, scope="module")
def row(request, tmp_path_factory):
    """(module, our model, our parameters)."""
    torch.manual_seed(0)
    module = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**ROWS[request.param])).float().eval()
    with torch.no_grad():
        for path, p in module.named_parameters():
            p.copy_(0.2 * torch.randn_like(p) + (1.0 if path.endswith("norm.weight") else 0.0))
    folder = tmp_path_factory.mktemp(request.param)
    module.save_pretrained(folder)
    return module, *lm.load(folder)


@pytest.mark.parametrize("used", ["", "types", "types mems", "mask", "perm picks", "perm picks types mems mask"])
def test_outputs_agree_at_every_place_even_of_padding(row, used):
    module, model, params = row
    if model.causal and ("mask" in used or "perm" in used):
        pytest.skip("transformers adds a row's mask in place to one of all rows, and fails")
    rng = np.random.default_rng(0)
    mask = np.ones((B, L), np.float32)
    mask[1, :3] = mask[2, 8:] = 0
    known = {
        "types": ("token_type_ids", rng.integers(0, 3, (B, L))),
        "mask": ("attention_mask", mask),
        "perm": ("perm_mask", (rng.random((B, L, L)) < 0.4).astype(np.float32)),
        "picks": ("target_mapping", np.eye(L, dtype=np.float32)[PICKS][None].repeat(B, 0)),
        "mems": ("mems", rng.standard_normal((2, 5, B, 32)).astype(np.float32)),
    }
    inputs = {"input_ids": rng.integers(3, V, (B, L))} | dict(known[name] for name in used.split())
    theirs = {name: torch.tensor(array) for name, array in inputs.items()}
    if "mems" in used:
        theirs["mems"] = list(theirs["mems"])
    with torch.no_grad():
        expected = module(**theirs, output_hidden_states=True)
    out = lm.interop.forward(model, params, **inputs)
    pairs = [(out["logits"], expected.logits), *zip(out["hidden_states"], expected.hidden_states, strict=True)]
    if "mask" not in used:
        pairs += zip(out["mems"], expected.mems, strict=True)
    for ours, other in pairs:
        assert np.abs(ours - other.numpy()).max() <= 1e-5 * max(1, np.abs(other.numpy()).max())


def test_a_mapping_that_mixes_tokens_is_refused(row):
    _, model, params = row
    with pytest.raises(UsageError, match="target_mapping must choose one token"):
        lm.interop.forward(model, params, input_ids=np.ones((B, L), int), target_mapping=np.full((B, 1, L), 1 / L))


def test_greedy_generation_is_that_of_full_recomputation(row):
    module, model, params = row
    if model.same_length:
        with pytest.raises(UsageError, match="same_length=True"):
            generate(model, params, [[5, 6]], 1)
        return
    if model.two_directions:
        prompts = [[5, 6, 7], [8, 9, 10, 11]]  # An even number of rows: the second half reads backwards.
    else:
        prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    rows = generate(model, params, prompts, 6, temperature=0)
    for i, (prompt, new) in enumerate(zip(prompts, rows, strict=True)):
        ids = list(prompt)
        for token in new:
            n, repeats = len(ids) + 1, 2 if model.two_directions else 1
            perm, mapping = torch.zeros(repeats, n, n), torch.zeros(repeats, 1, n)
            perm[:, :, -1] = mapping[:, 0, -1] = 1
            with torch.no_grad():
                dummy = torch.tensor([[*ids, 0]] * repeats)
                logits = module(dummy, perm_mask=perm, target_mapping=mapping, use_mems=False).logits
            assert token == logits[i if model.two_directions else 0, 0].argmax().item()
            ids.append(int(token))


def test_what_is_saved_is_the_same_for_both(row, tmp_path):
    module, model, params = row
    assert lm.interop.save(tmp_path, model, params) == "XLNetLMHeadModel"
    again, info = transformers.XLNetLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for path, p in again.named_parameters():
        np.testing.assert_array_equal(p.detach().numpy(), dict(module.named_parameters())[path].detach().numpy())
    ours = tree.flatten(lm.load(tmp_path)[1])
    assert all(np.array_equal(a, ours[path]) for path, a in tree.flatten(params).items())
