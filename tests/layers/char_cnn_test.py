"""Word vectors from characters, against torch's convolutions and the paper's equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.core.params import Uniform
from lm.layers.char_cnn import CharCNN
from lm.layers.highway import highway, highway_spec

CNN = CharCNN(width=4, filters=((1, 3), (2, 5), (4, 2)), highways=2, max_characters=7)
PIECES = ["a", "cat", "cats", "tomcat", "éa"]


def made(cnn=CNN, words=8):
    p = specs.initialize(cnn.spec(words, Uniform(0.5)), jax.random.key(0))
    rng = np.random.default_rng(1)
    p = jax.tree.map(lambda w: w + jnp.float32(0.1) * rng.standard_normal(w.shape, np.float32), p)
    return cnn.with_pieces(p, PIECES)


def test_words_are_spelled_between_marks_and_cut_before_the_last():
    rows = np.asarray(made()["spelling"]).astype(int).tolist()
    begin, end, pad = 0xF9, 0xFA, 0xF8
    assert rows[0] == [begin, ord("a"), end, pad, pad, pad, pad]
    assert rows[3] == [begin, *b"tomca", end]
    assert rows[4] == [begin, *"éa".encode(), end, pad, pad]
    assert rows[5] == [pad] * 7


def test_no_byte_of_text_is_a_mark():
    used = {byte for code in range(0x110000) if not 0xD800 <= code < 0xE000 for byte in chr(code).encode()}
    assert not used & {0xF8, 0xF9, 0xFA} and max(used) < 256


def test_vectors_and_gradients_are_those_of_torch():
    torch = pytest.importorskip("torch")
    p, tokens = made(), np.array([[0, 1, 2], [3, 4, 1]], np.int32)
    slopes = np.random.default_rng(2).standard_normal((2, 3, CNN.features)).astype(np.float32)

    def loss(p):
        x = CNN.apply(p, tokens, "float32")
        return jnp.sum(x * slopes), x

    gradients, ours = jax.grad(loss, has_aux=True)(p)
    t = jax.tree.map(lambda w: torch.tensor(np.array(w), requires_grad=True), p)
    ids = t["spelling"].detach().round().long()[torch.tensor(tokens.ravel()).long()]
    x_TRC = (t["table"][ids] * (ids != 0xF8)[..., None]).transpose(1, 2)
    found = []
    for i in range(3):
        f = t[f"filters_{i}"]
        y = torch.tanh(torch.nn.functional.conv1d(x_TRC, f["kernel"].permute(2, 1, 0), f["bias"]))
        found.append(y.max(-1).values)
    x = torch.cat(found, -1)
    for i in range(2):
        h = t[f"highway_{i}"]
        gate = torch.sigmoid(x @ h["gate"]["kernel"] + h["gate"]["bias"])
        x = gate * torch.relu(x @ h["change"]["kernel"] + h["change"]["bias"]) + (1 - gate) * x
    np.testing.assert_allclose(ours.reshape(6, -1), x.detach(), atol=1e-5, rtol=1e-5)
    (x * torch.tensor(slopes.reshape(6, -1))).sum().backward()
    assert not np.any(gradients.pop("spelling")) and t.pop("spelling").grad is None
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w.grad, atol=1e-5, rtol=1e-5), gradients, t)


def test_an_average_beside_the_whole_numbers_spells_the_same():
    p, tokens = made(), np.arange(5, dtype=np.int32)[None]
    for shift in (-1e-3, 1e-3):
        moved = p | {"spelling": p["spelling"] + shift}
        np.testing.assert_array_equal(CNN.apply(moved, tokens, "float32"), CNN.apply(p, tokens, "float32"))


def test_a_new_highway_lets_most_of_its_input_through():
    p = specs.initialize(highway_spec(6, Uniform(0.01), -2.0), jax.random.key(0))
    x = jnp.ones((2, 6))
    kept = 1 - jax.nn.sigmoid(-2.0)
    np.testing.assert_allclose(highway(p, x), jnp.full((2, 6), kept), atol=0.02)  # 6 weights of at most 0.01.


def test_single_characters_are_no_words():
    p = made()
    for pieces in (list("abcde"), [f"<0x{b:02X}>" for b in range(5)], [*"ab", "<unk>"]):
        with pytest.raises(UsageError, match="single characters"):
            CNN.with_pieces(p, pieces)


@pytest.mark.parametrize(
    "settings",
    [{"filters": ()}, {"filters": ((0, 3),)}, {"filters": ((8, 3),)}, {"highways": -1}, {"width": 0}],
    ids=str,
)
def test_sizes_without_sense_are_refused(settings):
    with pytest.raises(UsageError):
        CharCNN(**{"max_characters": 7, "filters": ((1, 3),)} | settings)
