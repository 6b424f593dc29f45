"""Recurrent encoder-decoders: against torch's cells, and what an encoder-decoder promises."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from lm.core import params as specs
from lm.core import tree
from lm.core.errors import UsageError
from lm.data.stream import stack
from lm.generate.sample import generate
from lm.models.seq2seq import Seq2Seq
from lm.objectives.causal import Causal
from lm.objectives.encdec import encdec_row
from lm.parallel import rules
from lm.train import meters
from tests.models.contract_test import assert_same, loss_and_gradients, randomized

B, S, L, V = 8, 7, 9, 128
TINY: dict[str, Any] = {"width": 12, "hidden": 16, "vocab_size": V, "valid_vocab_size": V - 3}
MODELS = {
    "bahdanau": Seq2Seq(**TINY, attention_width=10, readout_width=8),
    "deep_lstm_attention": Seq2Seq(**TINY, cell="lstm", layers=2, decoder_layers=2, source_vocab_size=64),
    "cho": Seq2Seq(**TINY, attention="none", code_width=6),
    "sutskever": Seq2Seq(
        **TINY, attention="none", cell="lstm", layers=2, decoder_layers=2, directions="backward", source_vocab_size=64
    ),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def params(model):
    return randomized(model, seed=0)


@pytest.fixture(scope="module")
def reference(model, params):
    """The loss and gradients on one device."""
    return loss_and_gradients(model, params, make_batch())


@pytest.fixture(scope="module")
def hidden(model, params):
    """The hidden states of a batch, compiled once for all tests that have its shapes."""
    return functools.partial(jax.jit(lambda params, batch: model.apply(params, batch).hidden_BLD), params)


def make_batch():
    """Sources of 7, 4 and, with padding before it, 2 words."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V - 3, (B, L + 1), dtype=np.int32)
    source, documents = rng.integers(0, 63, (B, S), dtype=np.int32), np.zeros((B, S), np.int32)
    documents[1, 4:] = documents[3, :5] = -1
    weights = rng.integers(0, 2, (B, L)).astype(np.float32)
    batch = {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:], "weights_BL": weights}
    return batch | {"source_tokens_BS": source, "source_documents_BS": documents}


def torch_loss(model, p, batch):
    """The mean loss by torch's cells, row by row and step by step."""
    import torch

    def layer(p, inputs):
        kind = {"gru": torch.nn.GRUCell, "lstm": torch.nn.LSTMCell}[model.cell](inputs, model.hidden)
        own = {name: p[name].reshape(p[name].shape[0], -1).T for name in ("input", "state")}
        bias = p["bias"].ravel()
        if model.cell == "gru":
            two = bias[: 3 * model.hidden], torch.cat([torch.zeros(2 * model.hidden), bias[3 * model.hidden :]])
        else:
            two = bias, torch.zeros_like(bias)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = dict(zip(names, (own["input"], own["state"], *two), strict=True))
        return lambda x, state: torch.func.functional_call(kind, weights, (x, state))

    def h(state):
        return state[0] if model.cell == "lstm" else state

    def affine(p, x):
        return x @ p["kernel"].reshape(p["kernel"].shape[0], -1) + p["bias"].ravel()

    zeros = torch.zeros(model.hidden)
    total = torch.zeros(())
    for b in range(len(batch["tokens_BL"])):
        real = batch["source_documents_BS"][b] >= 0
        x = p.get("source_embed", p["embed"])["table"][batch["source_tokens_BS"][b][real]]
        for i in range(model.layers):
            sides = {}
            for name, own in p["encoder"][f"layer_{i}"].items():
                run, state, states = layer(own, x.shape[-1]), (zeros, zeros) if model.cell == "lstm" else zeros, []
                for row in x if name == "forward" else x.flip(0):
                    state = run(row, state)
                    states.append(h(state))
                sides[name] = torch.stack(states if name == "forward" else states[::-1])
            x = torch.cat([sides[name] for name in ("forward", "backward") if name in sides], -1)
        ends = [sides[name][at] for name, at in (("forward", -1), ("backward", 0)) if name in sides]
        code = ends[-1] if model.attention == "additive" else torch.tanh(affine(p["code"], torch.cat(ends)))
        states = [
            {name: torch.tanh(affine(one, code)) for name, one in p["start"][f"layer_{i}"].items()}
            for i in range(model.decoder_layers)
        ]
        states = [(s["h"], s["c"]) if model.cell == "lstm" else s["h"] for s in states]
        for token, target, weight in zip(*(batch[f"{n}_BL"][b] for n in ("tokens", "targets", "weights")), strict=True):
            word = p["embed"]["table"][token]
            context = code
            if model.attention == "additive":
                a = p["attention"]
                scores = torch.tanh(h(states[0]) @ a["query"] + x @ a["key"]) @ a["score"]
                context = torch.softmax(scores, 0) @ x
            below = torch.cat([word, context])
            for i in range(model.decoder_layers):
                states[i] = layer(p["decoder"][f"layer_{i}"], len(below))(below, states[i])
                below = h(states[i])
            first, second = affine(p["readout"], torch.cat([below, word, context])).chunk(2)
            logits = p["head"]["table"] @ torch.maximum(first, second) + p["head"]["bias"]
            logits = logits[: model.valid_vocab_size]
            total = total + weight.item() * torch.nn.functional.cross_entropy(logits, torch.tensor(target.item()))
    return total / float(batch["weights_BL"].sum())


def test_the_loss_and_all_gradients_are_torchs(model, params, reference):
    torch = pytest.importorskip("torch")
    theirs = {k: torch.tensor(np.array(v), requires_grad=True) for k, v in tree.flatten(params).items()}
    loss = torch_loss(model, tree.unflatten(theirs), make_batch())
    loss.backward()
    gradients = tree.unflatten({k: np.zeros(v.shape) if v.grad is None else v.grad.numpy() for k, v in theirs.items()})
    assert_same(reference, (loss.item(), gradients))


def test_hidden_states_and_captures_have_the_declared_shapes(model, params):
    names = ("code", "memory") + ("attention",) * (model.attention == "additive")
    out = jax.eval_shape(lambda p: model.apply(p, make_batch(), capture=names), params)
    shapes = {name: x.shape for name, x in out.captured.items()}
    readout = model.readout_width or model.width
    assert out.hidden_BLD.shape == (B, L, readout) and shapes.pop("memory") == (B, S, model.memory_width)
    assert shapes.pop("code") == (B, model.code_width or model.hidden) and shapes in ({}, {"attention": (B, L, S)})
    logits = model.logits(model.head(params), jnp.ones((5, readout)))
    assert logits.shape == (5, V) and logits.dtype == jnp.float32 and logits[:, V - 3 :].max() <= -1e9


def test_a_token_sees_those_before_it_and_the_whole_source(hidden):
    batch = {k: v for k, v in make_batch().items() if not k.startswith(("targets", "weights"))}
    batch["source_documents_BS"] = np.zeros((B, S), np.int32)

    def reach(name, count):
        """Which of the first `count` tokens of `name` change place 5 of the output, by a change of each in turn."""
        rows = {k: np.repeat(v[:1], B, 0) for k, v in batch.items()}
        rows[name][np.arange(count), np.arange(count)] += 1
        x = np.asarray(hidden(rows))[:, 5]
        return (np.abs(x[:count] - x[-1]).max(-1) > 0).tolist()

    assert reach("source_tokens_BS", S) == [True] * S
    assert reach("tokens_BL", B - 1) == [True] * 6 + [False]


def test_padding_of_the_source_changes_nothing_on_either_side_of_it(hidden):
    batch = make_batch()
    padding, out = batch["source_documents_BS"] < 0, hidden(batch)
    other = batch | {"source_tokens_BS": np.where(padding, 9, batch["source_tokens_BS"])}
    np.testing.assert_array_equal(hidden(other), out)
    for row in (1, 3):
        real = batch["source_tokens_BS"][[row]][:, ~padding[row]]
        alone = hidden({"tokens_BL": batch["tokens_BL"][[row]], "source_tokens_BS": real})
        np.testing.assert_allclose(out[row], alone[0], atol=1e-5, rtol=1e-5)


def test_a_source_without_a_word_tells_nothing(hidden):
    batch = make_batch() | {"source_documents_BS": np.full((B, S), -1, np.int32)}
    out = hidden(batch)
    np.testing.assert_array_equal(out, hidden(batch | {"source_tokens_BS": np.zeros((B, S), np.int32)}))
    assert np.isfinite(out).all()


def test_cached_decoding_of_ragged_rows_equals_the_full_pass(model, params, hidden):
    batch, lengths = make_batch(), np.array([3, 5, 1, 4, 2, 5, 4, 5], np.int32)
    tokens, source = batch["tokens_BL"], {k: v for k, v in batch.items() if k.startswith("source")}
    full = hidden(batch)
    apply = jax.jit(lambda batch, cache: model.apply(params, batch, cache=cache))
    cache = specs.initialize(model.cache_spec(B, L, S), jax.random.key(0))
    padding = {"documents_BL": np.where(np.arange(5) < lengths[:, None], 0, -1)}
    out = apply({"tokens_BL": tokens[:, :5]} | padding | source, cache)
    assert jax.tree.map(jnp.shape, out.cache) == jax.tree.map(jnp.shape, cache)
    np.testing.assert_allclose(out.hidden_BLD, full[:, :5], atol=1e-5, rtol=1e-5)
    rows = np.arange(B)
    for step in range(4):
        at = lengths + step
        out = apply({"tokens_BL": tokens[rows, at][:, None]}, out.cache)
        np.testing.assert_allclose(out.hidden_BLD[:, 0], full[rows, at], atol=1e-5, rtol=1e-5)


def test_generation_takes_the_likeliest_by_full_passes(model, params, hidden):
    prompts = [np.array([5, 6, 7, 8]), np.array([9])]
    for prompt, row in zip(prompts, generate(model, params, prompts, 4, temperature=0), strict=True):
        read = np.concatenate([[model.start_id], row[:-1]])[None]
        x_LD = hidden({"tokens_BL": read, "source_tokens_BS": prompt[None]})[0]
        np.testing.assert_array_equal(np.argmax(model.logits(model.head(params), x_LD), -1), row)


def test_the_work_is_that_of_the_programs_products(model):
    rows = {name: jax.ShapeDtypeStruct((1, L), jnp.int32) for name in ("tokens_BL", "targets_BL")}
    rows["source_tokens_BS"] = jax.ShapeDtypeStruct((1, S), jnp.int32)

    def forward(params, batch):
        return model.logits(model.head(params), model.apply(params, batch).hidden_BLD)

    spec = model.spec()
    counted = sum(meters.product_flops(jax.make_jaxpr(forward)(specs.abstract(spec), rows).jaxpr))
    assert model.forward_flops(spec, {name: x.shape[1] for name, x in rows.items()}) == counted


@pytest.mark.slow
def test_a_mesh_gives_the_same_loss_and_gradients(model, params, reference):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    shape = tuple(sizes.get(axis, 1) for axis in rules.MESH_AXES)
    mesh = jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, rules.shardings(model.spec(), mesh))
        batch = jax.device_put(make_batch(), rules.batch_sharding(mesh))
        assert_same(loss_and_gradients(model, sharded, batch), reference)


@pytest.mark.slow
def test_dropout_is_turned_on_by_a_key(model, params, reference):
    dropped = loss_and_gradients(dataclasses.replace(model, dropout=0.3), params, make_batch(), jax.random.key(3))
    assert abs(reference[0] - dropped[0]) > 1e-5


@pytest.mark.slow
def test_bfloat16_agrees_with_float32_to_its_precision(model, params, reference):
    loss, gradients = loss_and_gradients(dataclasses.replace(model, dtype="bfloat16"), params, make_batch())
    np.testing.assert_allclose(loss, reference[0], rtol=1e-2)
    flat, expected = (np.concatenate([g.ravel() for g in jax.tree.leaves(x)]) for x in (gradients, reference[1]))
    # 8 bits a product, over the steps of two recurrences and a softmax: a wrong scale is far more.
    assert flat.dtype == np.float32 and np.linalg.norm(flat - expected) < 1e-1 * np.linalg.norm(expected)


def reversal(rng, rows):
    """Sources of 2 to 8 of 20 words, and the same backwards."""
    lengths = rng.integers(2, 9, rows)
    texts = [rng.integers(1, 21, n).astype(np.int32) for n in lengths]
    return stack([encdec_row(text, np.append(text[::-1], 0), (8, 9), 0) for text in texts]), lengths


@pytest.mark.slow
def test_attention_learns_to_reverse_and_follows_the_alignment():
    model = Seq2Seq(width=32, hidden=64, vocab_size=32)
    params, optimizer = specs.initialize(model.spec(), jax.random.key(0)), optax.adam(3e-3)
    state, rng = optimizer.init(params), np.random.default_rng(0)

    @jax.jit
    def step(params, state, batch):
        loss, gradients = jax.value_and_grad(lambda p: mean_loss(model, p, batch))(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(600):
        params, state, loss = step(params, state, reversal(rng, 64)[0])
    batch, lengths = reversal(rng, 64)
    assert mean_loss(model, params, batch) < 0.02
    weights_BLS = model.apply(params, batch, capture=("attention",)).captured["attention"]
    np.testing.assert_allclose(weights_BLS.sum(-1), 1, atol=1e-5)
    for weights_LS, n in zip(weights_BLS, lengths, strict=True):
        assert not weights_LS[:, n:].any()
    # Attention is asked before the cell takes the last word, and a place's state knows its neighbours.
    places = [
        abs(int(w[t].argmax()) - (n - 1 - t)) for w, n in zip(weights_BLS, lengths, strict=True) for t in range(n)
    ]
    assert np.mean(np.array(places) <= 1) > 0.95 and np.mean(np.array(places) == 0) > 0.5


def mean_loss(model, params, batch):
    total, weight, _ = Causal().loss(model, params, batch)["loss"]
    return total / weight


@pytest.mark.parametrize(
    "settings",
    [
        {"cell": "rnn"},
        {"attention": "dot"},
        {"directions": "left"},
        {"code_width": 8},
        {"attention": "none", "attention_width": 8},
        {"decoder_layers": 0},
        {"dropout": 1.0},
        {"start_id": -1},
        {"valid_vocab_size": V + 1},
    ],
    ids=str,
)
def test_settings_without_sense_or_effect_are_refused(settings):
    with pytest.raises(UsageError):
        Seq2Seq(**TINY | settings)


def test_a_batch_without_a_source_or_with_documents_is_refused():
    tokens = {"tokens_BL": np.zeros((1, 2), np.int32)}
    with pytest.raises(ValueError, match="source_tokens_BS"):
        MODELS["cho"].apply({}, tokens)
    with pytest.raises(ValueError, match="documents_BL"):
        MODELS["cho"].apply({}, tokens | {"documents_BL": tokens["tokens_BL"]})
    with pytest.raises(UsageError, match="unknown capture 'attention'"):
        MODELS["cho"].apply({}, tokens, capture=("attention",))
