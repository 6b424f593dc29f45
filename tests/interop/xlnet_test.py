"""XLNet's classes against transformers, with what other families do not have: orders, targets, segments and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm
from lm.core import tree

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
def test_logits_and_memory_agree(row, used):
    module, model, params = row
    if model.causal and ("mask" in used or "perm" in used):
        pytest.skip("transformers adds a row's mask in place to one of all rows, and fails")
    rng = np.random.default_rng(0)
    ids, types = rng.integers(3, V, (B, L)), rng.integers(0, 3, (B, L))
    mask, perm = np.ones((B, L), np.int32), (rng.random((B, L, L)) < 0.4).astype(np.float32)
    mask[1, :3] = 0
    memory = rng.standard_normal((2, B, 5, 32)).astype(np.float32)
    theirs, ours, cache = {"input_ids": torch.tensor(ids), "use_mems": "mems" in used}, {"tokens_BL": ids}, None
    seen = np.ones((B, L), bool)
    if "types" in used:
        theirs["token_type_ids"], ours["types_BL"] = torch.tensor(types), types
    if "mask" in used:
        theirs["attention_mask"], ours["documents_BL"], seen = torch.tensor(mask).float(), mask - 1, mask > 0
    if "perm" in used:
        mapping = np.eye(L, dtype=np.float32)[PICKS][None].repeat(B, 0)
        theirs |= {"perm_mask": torch.tensor(perm), "target_mapping": torch.tensor(mapping)}
        ours |= {"blocked_BLL": perm, "picks_BP": np.array([PICKS] * B)}
    if "mems" in used:
        theirs["mems"] = [torch.tensor(m.transpose(1, 0, 2)) for m in memory]
        cache = {"memory": jnp.asarray(memory), "length": jnp.full(B, 5)}
    with torch.no_grad():
        expected = module(**theirs)
    out = model.apply(params, jax.tree.map(jnp.asarray, ours), cache=cache)
    logits = np.asarray(model.logits(model.head(params), out.hidden_BLD))
    rows = seen[:, PICKS] if "picks" in used else seen
    error = np.abs(logits - expected.logits.numpy())[rows].max()
    assert error <= 1e-5 * np.abs(expected.logits.numpy()[rows]).max()
    if cache is not None:
        kept = np.stack([m.numpy().transpose(1, 0, 2) for m in expected.mems])
        whole = (mask > 0).all(1)
        np.testing.assert_allclose(out.cache["memory"][:, whole], kept[:, whole], atol=1e-5)


def test_what_is_saved_is_the_same_for_both(row, tmp_path):
    module, model, params = row
    assert lm.interop.save(tmp_path, model, params) == "XLNetLMHeadModel"
    again, info = transformers.XLNetLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for path, p in again.named_parameters():
        np.testing.assert_array_equal(p.detach().numpy(), dict(module.named_parameters())[path].detach().numpy())
    ours = tree.flatten(lm.load(tmp_path)[1])
    assert all(np.array_equal(a, ours[path]) for path, a in tree.flatten(params).items())
