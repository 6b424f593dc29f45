import math

import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.positions import rotary_table, rotate, sinusoids


def test_sinusoids_equal_the_papers_formula():
    table = sinusoids(jnp.arange(7), 6)
    for position in range(7):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert abs(table[position, 2 * i] - math.sin(angle)) < 1e-6
            assert abs(table[position, 2 * i + 1] - math.cos(angle)) < 1e-6


@pytest.mark.parametrize("layout", ["halves", "tensor2tensor"])
def test_layouts_with_all_sines_first_differ_in_their_frequencies(layout):
    table = sinusoids(jnp.array([[0, 3], [200, 7]]), 8, layout)
    for row, position in (((0, 1), 3), ((1, 0), 200)):
        for i in range(4):
            angle = position / 10000 ** (2 * i / 8 if layout == "halves" else i / 3)
            assert abs(table[*row, i] - math.sin(angle)) < 1e-5
            assert abs(table[*row, 4 + i] - math.cos(angle)) < 1e-5


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotation_equals_a_loop_over_pairs_and_leaves_the_rest(style):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 8), np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 0, 1]])
    expected = x.copy()
    for b, length, i in np.ndindex(2, 5, 2):
        first, second = (i, i + 2) if style == "half" else (2 * i, 2 * i + 1)
        angle = positions[b, length] / 100 ** (2 * i / 4)
        u, v = x[b, length, :, first], x[b, length, :, second]
        expected[b, length, :, first] = u * math.cos(angle) - v * math.sin(angle)
        expected[b, length, :, second] = v * math.cos(angle) + u * math.sin(angle)
    turned = rotate(x, rotary_table(jnp.asarray(positions), 4, 100.0), style)
    np.testing.assert_allclose(turned, expected, atol=1e-5)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
