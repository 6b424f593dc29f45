import jax
import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.layers.activations import ACTIVATIONS, activation

torch = pytest.importorskip("torch")
F = torch.nn.functional
TORCH = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "squared_relu": lambda x: F.relu(x) ** 2,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_slopes_equal_torch(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    tx = torch.tensor(x, requires_grad=True)
    expected = TORCH[name](tx)
    expected.sum().backward()
    np.testing.assert_allclose(activation(name, x), expected.detach(), atol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: activation(name, x).sum())(x), tx.grad, atol=1e-5)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UsageError, match="did you mean gelu"):
        activation("gellu", np.zeros(1))
