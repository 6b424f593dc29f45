"""At the base all parametrizations are one; away from it, each multiplier is that of a table written by hand."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.core import params as specs
from lm.core import tree
from lm.core.errors import UsageError
from lm.core.parametrization import TABLE
from lm.data import synthetic
from lm.layers.block import Layer
from lm.layers.buckets import Buckets
from lm.layers.heads import TaskHead
from lm.layers.moe import Experts
from lm.models.decoder import Decoder
from lm.models.encdec import EncDec
from lm.models.encoder import Encoder
from lm.models.headed import Headed
from lm.objectives.causal import Causal
from lm.train import optimizers, step
from tests.models import contract_test

B, L, V = 4, 8, 64
TINY = {"width": 32, "heads": 4, "vocab_size": V}
MODELS = {
    name: model
    for name, model in contract_test.MODELS.items()
    if hasattr(model, "parametrization") and not getattr(model, "embed_width", None)
} | {
    "t5": EncDec(
        **TINY,
        layers=2,
        positions="none",
        norm_place="pre",
        buckets=Buckets(each_layer=True),
        attention_scale=1.0,
        logit_scale=32**-0.5,
        init="t5",
        init_std=1.0,
    ),
    "bart": EncDec(**TINY, layers=2, positions="learned", max_len=L, embed_norm=True, tied=False, head_bias=True),
    "pair": Encoder(**TINY, layers=2, max_len=L, outputs=("tokens", "pair", "detect")),
    "headed": Headed(Decoder(**TINY, layers=2, positions="rotary"), TaskHead("sequence", ("a", "b"), dense="tanh")),
}


def parametrized(model, kind, **settings):
    if isinstance(model, Headed):
        return dataclasses.replace(model, base=parametrized(model.base, kind, **settings))
    base = {"base_width": model.width}
    if kind == "completep":
        base["base_layers"] = model.layers
    return dataclasses.replace(model, parametrization=kind, **base | settings)


def make_batch(seed=0):
    tokens = np.random.default_rng(seed).integers(0, V, (B, L + 1), dtype=np.int32)
    weights = np.ones((B, L), np.float32)
    return {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:], "weights_BL": weights}


def scores(model, params, tokens):
    """Every output of the model, whatever its kind."""
    batch = {"tokens_BL": tokens}
    if isinstance(model, EncDec):
        batch["source_tokens_BS"] = tokens
    hidden = model.apply(params, batch).hidden_BLD
    found = [model.logits(model.head(params), hidden)]
    if "pair" in getattr(model, "outputs", ()):
        found += [model.pair_logits(params, hidden), model.detect_logits(params, hidden)]
    return found


@pytest.mark.parametrize("kind", ["mup", "completep"])
@pytest.mark.parametrize("name", MODELS)
def test_at_the_base_all_parametrizations_are_one(name, kind):
    model = MODELS[name]
    if kind == "completep" and getattr(model, "norm_place", "pre") == "post":
        pytest.skip("refused")
    same = parametrized(model, kind)
    assert tree.flatten(same.spec()) == tree.flatten(model.spec())
    tokens = np.zeros((2, L), np.int32)
    programs = (
        jax.make_jaxpr(lambda p, t, m=m: scores(m, p, t))(specs.abstract(m.spec()), tokens) for m in (model, same)
    )
    assert len({re.sub("0x[0-9a-f]+", "", str(program)) for program in programs}) == 1


def first_update(model, optimizer):
    """(loss, parameters) of one step."""
    spec = model.spec()
    transformation = optimizer.build(spec)
    state = step.initialize(spec, transformation, jax.random.key(0), False)
    take = jax.jit(step.make_step(model, Causal(), transformation))
    state, metrics = take(state, make_batch(), jnp.float32(1e-2), jax.random.key(1))
    return metrics["loss"], state.params


@pytest.mark.slow
def test_at_the_base_loss_and_first_update_are_those_of_sp_to_the_bit():
    model = Decoder(**TINY, layers=2, max_len=L)
    loss, weights = first_update(model, optimizers.AdamW())
    for kind in ("mup", "completep"):
        same_loss, same_weights = first_update(parametrized(model, kind), optimizers.AdamW())
        assert same_loss == loss
        jax.tree.map(np.testing.assert_array_equal, same_weights, weights)


# (standard deviation, learning rate, weight decay, eps) at m = 4 and m_L = 3, by path, over those of the base.
BY_HAND = {
    "embed/table": (1, 1, 1, 1),
    "positions/table": (1, 1, 1, 1),
    "final_norm/scale": (None, 1, 1, 1),
    "final_norm/bias": (None, 1, 1, 1),
    "head/table": (1, 1, 1, 1),
    "group0/layer0/attention/q/kernel": (1 / 2, 1 / 4, 4, 1 / 12),
    "group0/layer0/attention/o/kernel": (1 / 2, 1 / 4, 4, 1 / 12),
    "group0/layer0/attention/o/bias": (None, 1, 1, 1 / 12),
    "group0/layer0/attention_norm/scale": (None, 1, 1, 1 / 12),
    "group0/layer0/mlp_norm/bias": (None, 1, 1, 1 / 12),
    "group0/layer0/mlp/router/kernel": (1 / 4, 1 / 4, 4, 1 / 3),
    "group0/layer0/mlp/down/kernel": (1 / 2, 1 / 4, 4, 1 / 12),
}


def test_multipliers_are_those_written_by_hand():
    layer = Layer(experts=Experts(2, 1, normalize=False))
    small = Decoder(layers=2, width=16, heads=4, vocab_size=V, max_len=L, tied=False, mlp_bias=False, pattern=(layer,))
    large = dataclasses.replace(
        small, layers=6, width=64, parametrization="completep", base_width=16, base_layers=2, base_head_dim=4
    )
    base, found = (tree.flatten(model.spec()) for model in (small, large))
    for path, (std, *rest) in BY_HAND.items():
        assert [found[path].rate, found[path].decay, found[path].eps] == pytest.approx(rest), path
        if std is None:
            assert found[path].init == base[path].init, path
        else:
            assert found[path].init.std == pytest.approx(std * base[path].init.std), path
    flat = parametrized(small, "mup", width=64, base_width=16)
    for path, p in tree.flatten(flat.spec()).items():
        m_l = 3 if "group0" in path else 1
        assert (p.rate, p.decay) == (found[path].rate, found[path].decay) and p.eps == pytest.approx(
            m_l * found[path].eps
        )
    kept = dataclasses.replace(large, decay_keeps="coefficient")
    assert {p.decay for p in tree.flatten(kept.spec()).values()} == {1}


def test_outside_the_layers_matrices_scale_and_classifiers_are_outputs():
    large = parametrized(MODELS["pair"], "mup", width=128, base_width=32)
    for path, wanted in {
        "head/dense/kernel": (0.01, 1 / 4, 4, 1 / 4),
        "head/bias": (None, 1, 1, 1),
        "pooler/kernel": (0.01, 1 / 4, 4, 1 / 4),
        "pair/kernel": (0.005, 1 / 4, 4, 1),
        "detect/out/kernel": (0.005, 1 / 4, 4, 1),
        "types/table": (0.02, 1, 1, 1),
    }.items():
        p = tree.flatten(large.spec())[path]
        assert (getattr(p.init, "std", None), p.rate, p.decay, p.eps) == pytest.approx(wanted), path


@pytest.mark.parametrize("init, fan_in", [("fan_in", 64), ("t5", 64)])
def test_kernels_drawn_by_their_fan_in_stay_so_and_the_head_is_drawn_as_at_the_base(init, fan_in):
    model = Decoder(layers=2, width=64, heads=4, vocab_size=V, max_len=L, tied=False, init=init)
    spec = tree.flatten(parametrized(model, "mup", base_width=16).spec())
    assert spec["group0/layer0/attention/k/kernel"].init.std == pytest.approx(fan_in**-0.5)
    assert spec["head/table"].init.std == pytest.approx(16**-0.5)


def test_the_forward_multipliers():
    small = Decoder(layers=2, width=32, heads=4, vocab_size=V, positions="rotary", norm_eps=1e-12)
    mup = parametrized(small, "mup", base_width=8)
    params = specs.initialize(small.spec(), jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 32))
    np.testing.assert_allclose(4 * mup.logits(mup.head(params), x), small.logits(small.head(params), x), rtol=1e-6)
    scales = [m.stack.block._form(True, None, None).scale for m in (mup, dataclasses.replace(mup, base_head_dim=8))]
    assert scales == [pytest.approx(2**0.5 / 8), None]  # The base's heads are 2 wide, or as these are.
    assert mup.ratios.attention(0.5, 8) == 0.5 / 4
    deep = parametrized(small, "completep", base_layers=1, base_head_dim=8)
    tokens = make_batch()["tokens_BL"]
    states = [m.apply(params, {"tokens_BL": tokens}, capture=("hidden_states",)).captured["hidden_states"]
              for m in (small, deep)]  # fmt: skip
    # Attention, which sees the embeddings alone in both; the rest of the layer sees what half of it has changed.
    block = deep.stack.block
    assert block._leave({}, "attention", jnp.ones(4), jnp.full(4, 3.0)).tolist() == [2.5] * 4
    assert not np.allclose(states[0][1], states[1][1])


@pytest.mark.parametrize("config", [optimizers.AdamW(eps=0.1, clip_norm=None), optimizers.Lion(clip_norm=None)])
def test_each_parameter_steps_as_with_settings_of_its_own(config):
    sizes = {"parametrization": "completep", "base_width": 8, "base_layers": 2}
    spec = Decoder(**TINY, layers=3, max_len=L, tied=False, **sizes).spec()
    ours = specs.initialize(spec, jax.random.key(0))
    theirs, transformation = tree.flatten(ours), config.build(spec)
    state, singles = transformation.init(ours), {}
    for path, p in tree.flatten(spec).items():
        decay = config.weight_decay * p.decay if p.role != "vector" else 0.0
        if isinstance(config, optimizers.Lion):
            singles[path] = optax.lion(1e-2 * p.rate, config.b1, config.b2, weight_decay=decay)
        else:
            singles[path] = optax.adamw(1e-2 * p.rate, config.b1, config.b2, config.eps * p.eps, weight_decay=decay)
    slots = {path: single.init(theirs[path]) for path, single in singles.items()}
    for i in range(3):
        grads = jax.tree.map(lambda w, i=i: jax.random.normal(jax.random.key(i), w.shape), ours)
        direction, state = transformation.update(grads, state, ours)
        ours = jax.tree.map(lambda w, d: w - 1e-2 * d, ours, direction)
        for path, single in singles.items():
            update, slots[path] = single.update(tree.flatten(grads)[path], slots[path], theirs[path])
            theirs[path] = theirs[path] + update
    for path, weights in tree.flatten(ours).items():
        np.testing.assert_allclose(weights, theirs[path], atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", ["SGD", "Adafactor", "Lamb", "Muon"])
def test_optimizers_with_other_rules_are_refused(name):
    model = Decoder(**TINY, layers=2, max_len=L)
    getattr(optimizers, name)().build(model.spec())
    with pytest.raises(UsageError, match=f"optimizer={name} .*use AdamW or Lion"):
        getattr(optimizers, name)().build(parametrized(model, "mup", base_width=8).spec())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"base_width": 8}, "base_width=8 has no effect"),
        ({"base_head_dim": 8}, "base_head_dim=8 has no effect"),
        ({"decay_keeps": "coefficient"}, "no effect with parametrization='sp'"),
        ({"parametrization": "mup"}, "needs base_width"),
        ({"parametrization": "mup", "base_width": 8, "base_layers": 2}, "base_layers=2 has no effect"),
        ({"parametrization": "completep", "base_width": 8}, "needs base_layers"),
        ({"parametrization": "muP"}, "did you mean mup"),
        ({"parametrization": "mup", "base_width": 0}, "base_width=0 must be greater than 0"),
        (
            {"parametrization": "completep", "base_width": 8, "base_layers": 2, "norm_place": "post"},
            "norm_place='post'",
        ),
    ],
)
def test_settings_that_are_missing_or_without_effect_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Decoder(**TINY, layers=2, max_len=L, **settings)


def test_what_the_table_does_not_cover_is_refused():
    with pytest.raises(UsageError, match="embed_width"):
        Encoder(**TINY, embed_width=8, parametrization="mup", base_width=8)
    deep = {"parametrization": "completep", "base_width": 8, "base_layers": 2, "norm_place": "pre"}
    with pytest.raises(UsageError, match="shared_groups"):
        Encoder(**TINY, shared_groups=2, **deep)
    with pytest.raises(UsageError, match="one depth"):
        EncDec(**TINY, layers=4, decoder_layers=2, **deep)


def slopes(kind, axis):
    """Log-log slopes over a 4-fold width or depth of (what the layers leave, the logits), after 4 steps."""
    text = synthetic.parse("markov?tokens=8000").sample().reshape(5, 8, -1)[:, :, :33]
    batches = [{"tokens_BL": t[:, :-1], "targets_BL": t[:, 1:], "weights_BL": np.ones((8, 32), "f4")} for t in text]
    found = []
    for size in (1, 4):
        sizes = {"layers": 2 * size, "width": 64} if axis == "layers" else {"layers": 1, "width": 128 * size}
        model = Decoder(**sizes, heads=4, vocab_size=V, positions="rotary", tied=False)
        base = {"sp": {}, "mup": {"base_width": 128}, "completep": {"base_width": 64, "base_layers": 2}}[kind]
        model = dataclasses.replace(model, parametrization=kind, **base)
        spec = model.spec()
        transformation = optimizers.AdamW(weight_decay=0.0, clip_norm=None).build(spec)
        state = step.initialize(spec, transformation, jax.random.key(0), False)
        take = jax.jit(step.make_step(model, Causal(), transformation))
        for batch in batches[:4]:
            state, _ = take(state, batch, jnp.float32(1e-2), jax.random.key(1))

        @jax.jit
        def sizes_of(params, model=model):
            out = model.apply(params, batches[4], capture=("hidden_states",))
            logits = model.logits(model.head(params), out.hidden_BLD)
            return [jnp.abs(x).mean() for x in (out.captured["hidden_states"][-1], logits)]

        found.append(sizes_of(state.params))
    return np.log(np.divide(*reversed(found))) / np.log(4)


@pytest.mark.slow
def test_activations_keep_their_size_over_widths_and_depths_as_parametrized_and_not_otherwise():
    assert max(abs(slopes("mup", "width"))) < 0.15 and min(slopes("sp", "width")) > 0.5
    assert max(abs(slopes("completep", "layers"))) < 0.15 and slopes("sp", "layers")[0] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("row, wrong", [("hidden matrix", {"rate": (-0.5, 0)}), ("head", {"forward": (-0.5, 0)})])
def test_a_wrong_exponent_shows_in_the_activations(monkeypatch, row, wrong):
    monkeypatch.setitem(TABLE, row, TABLE[row]._replace(**wrong))
    assert max(abs(slopes("mup", "width"))) > 0.25
