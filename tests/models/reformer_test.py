"""What Reformer promises beyond the contract: memory flat in depth, one hashing a step, rotations, padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lm.core import params as specs
from lm.core import tree
from lm.core.errors import UsageError
from lm.generate.sample import generate
from lm.layers.axial import Axial
from lm.layers.local import Local
from lm.layers.lsh import LSH
from lm.models.reformer import Reformer
from lm.objectives.causal import Causal
from lm.objectives.mlm import MaskedLM
from lm.parallel import rules
from lm.train.run import Run, Train, resolve

V, B, L = 50, 4, 60
MODEL = Reformer(
    layers=4,
    width=32,
    heads=4,
    pattern=("lsh", "local"),
    lsh=LSH(rounds=2, chunk=8, dropout=0.1),
    local=Local(chunk=16, dropout=0.1),
    mlp_chunk=10,
    vocab_size=V,
    max_len=64,
    axial=Axial((8, 8), (12, 20)),
    dropout=0.1,
)
TOKENS = np.random.default_rng(0).integers(0, V, (B, L + 1), dtype=np.int32)
BATCH = {"tokens_BL": TOKENS[:, :-1], "targets_BL": TOKENS[:, 1:], "weights_BL": np.ones((B, L), np.float32)}


@pytest.fixture(scope="module")
def params():
    flat = tree.flatten(specs.initialize(MODEL.spec(), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return tree.unflatten({k: v + 0.1 * rng.standard_normal(v.shape, np.float32) for k, v in flat.items()})


def gradients(model, params, key, batch=BATCH):
    def loss(params):
        total, weight, _ = Causal().loss(model, params, batch, key=key)["loss"]
        return total / weight

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
    other = tree.flatten(expected[1])
    for path, g in tree.flatten(found[1]).items():
        assert np.linalg.norm(g - other[path]) <= 1e-5 * max(np.linalg.norm(other[path]), 1e-2), path


@pytest.mark.parametrize(
    "key",
    [pytest.param(None, marks=pytest.mark.slow, id="evaluation"), pytest.param(jax.random.key(3), id="training")],
)
def test_reversible_gradients_are_those_of_kept_activations_even_with_dropout(params, key):
    expected = gradients(dataclasses.replace(MODEL, remat="none", mlp_chunk=None if key is None else 10), params, key)
    assert_same(gradients(MODEL, params, key), expected)


def test_tokens_are_hashed_in_the_forward_pass_alone(params, monkeypatch):
    calls, original = [], Reformer._hash
    monkeypatch.setattr(Reformer, "_hash", lambda *args: calls.append(args[-1]) or original(*args))
    jax.make_jaxpr(jax.grad(lambda p: jnp.sum(MODEL.apply(p, BATCH, key=jax.random.key(0)).hidden_BLD)))(params)
    assert calls == [0]


@pytest.mark.slow
def test_memory_of_a_step_is_flat_in_depth():
    def temporary(layers, remat):
        model = dataclasses.replace(MODEL, layers=layers, remat=remat, max_len=512, axial=None)
        tokens = jax.ShapeDtypeStruct((2, 512), np.int32)
        grad = jax.jit(jax.grad(lambda p, t: jnp.sum(jnp.sin(model.apply(p, {"tokens_BL": t}).hidden_BLD))))
        compiled = grad.lower(specs.abstract(model.spec()), tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = [temporary(layers, "reversible") for layers in (2, 4, 8, 16)]
    assert max(sizes) <= 1.1 * min(sizes)  # Buckets are kept, in two bytes each.
    assert temporary(16, "none") > 4 * temporary(2, "none")


def test_training_draws_rotations_anew_and_evaluation_keeps_its_own(params):
    still = dataclasses.replace(
        MODEL, dropout=0.0, lsh=dataclasses.replace(MODEL.lsh, dropout=0.0), local=Local(chunk=16)
    )
    apply = jax.jit(lambda model, key: model.apply(params, BATCH, key=key).hidden_BLD, static_argnums=0)
    one, two = apply(still, jax.random.key(0)), apply(still, jax.random.key(1))
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(apply(still, None), apply(still, None))
    assert np.abs(apply(dataclasses.replace(still, hash_seed=1), None) - apply(still, None)).max() > 1e-3


def test_what_is_padded_changes_nothing_where_buckets_stay(params):
    model = dataclasses.replace(MODEL, lsh=dataclasses.replace(MODEL.lsh, buckets=(8,)))
    apply = jax.jit(lambda batch: model.apply(params, batch).hidden_BLD)
    short = apply({"tokens_BL": TOKENS[:, :40]})
    documents = np.where(np.arange(48) < 40, 0, -1)[None].repeat(B, 0)
    padded = apply({"tokens_BL": TOKENS[:, :48], "documents_BL": documents})
    np.testing.assert_allclose(padded[:, :40], short, atol=1e-5, rtol=1e-5)


def test_generation_is_the_likeliest_token_of_full_passes(params):
    prompts, new = [[5, 6, 7], [8, 9, 10, 11, 12]], 12
    rows = generate(MODEL, params, prompts, new, temperature=0)
    size = max(map(len, prompts)) + new
    apply = jax.jit(lambda batch: MODEL.apply(params, batch).hidden_BLD)
    for prompt, row in zip(prompts, rows, strict=True):
        ids = np.array([[*prompt, *row]])
        ids = np.pad(ids, ((0, 0), (0, size - ids.shape[1])))
        for i in range(len(prompt), len(prompt) + new, 5):
            documents = np.where(np.arange(size) < i, 0, -1)[None]
            out = apply({"tokens_BL": ids, "documents_BL": documents})[:, i - 1]
            assert MODEL.logits(MODEL.head(params), out)[0].argmax() == ids[0, i]


@pytest.mark.slow
def test_a_mesh_gives_the_same_loss_and_gradients(params):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    shape = tuple(sizes.get(axis, 1) for axis in rules.MESH_AXES)
    mesh = jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    expected = gradients(MODEL, params, None)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, rules.shardings(MODEL.spec(), mesh))
        assert_same(gradients(MODEL, sharded, None, jax.device_put(BATCH, rules.batch_sharding(mesh))), expected)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"layers": 3}, "layers=3 is no multiple of the 2"),
        ({"pattern": ()}, "no multiple of the 0 of pattern"),
        ({"pattern": ("lsh", "full")}, "unknown pattern 'full'"),
        ({"pattern": ("lsh",)}, "local=.* has no effect"),
        ({"local": Local(after=1)}, "local.after=1 looks ahead"),
        ({"axial": Axial((8, 8), (12, 12))}, "add up to width=32"),
        ({"max_len": 65}, "at least max_len=65 places"),
        ({"heads": 5}, "no multiple of heads=5"),
        ({"remat": "full"}, "unknown remat 'full'"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_without_sense_or_effect_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(MODEL, **settings)


def test_a_sequence_beyond_the_positions_is_refused(params):
    with pytest.raises(UsageError, match="65 tokens is longer than max_len=64"):
        MODEL.apply(params, {"tokens_BL": np.zeros((1, 65), np.int32)})


def test_one_that_sees_both_ways_is_for_masked_tokens_and_continues_no_text(params):
    both = dataclasses.replace(MODEL, causal=False)
    with pytest.raises(UsageError, match="causal=False continues no text"):
        generate(both, params, [[1, 2]], 1)

    class Tokenizer:
        vocab_size = 40

        def special(self, name):
            return None

    run = resolve(Run(both, MaskedLM(), train=Train(seq_len=64)), Tokenizer())
    assert run.objective.ids == (40, 41, 42)
    with pytest.raises(UsageError, match="MaskedLM does not fit model=Reformer"):
        resolve(Run(MODEL, MaskedLM(), train=Train(seq_len=64)), Tokenizer())
