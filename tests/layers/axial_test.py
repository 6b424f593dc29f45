"""Axial positions are a row's vector beside a column's."""

import jax
import numpy as np
import pytest

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.layers.axial import Axial, axial_embed, axial_spec


def test_each_place_of_the_rectangle_has_its_row_and_its_column():
    form = Axial(shape=(3, 5), widths=(4, 2))
    p = specs.initialize(axial_spec(form), jax.random.key(0))
    found = axial_embed(form, p, np.arange(15), "float32")
    grid = [np.concatenate([row, column]) for row in p["rows"]["table"] for column in p["columns"]["table"]]
    np.testing.assert_array_equal(found, grid)


def test_sizes_that_are_no_rectangle_are_refused():
    with pytest.raises(UsageError, match="two positive sizes each"):
        Axial(shape=(3,), widths=(4, 2))
