"""Any of our models as a Flax Linen module, for code that builds on modules."""

from typing import Any

import flax.linen as nn
import jax
from flax.core import unfreeze

from lm.core import params as specs
from lm.core import tree
from lm.models.output import Output


class LinenModel(nn.Module):
    """The parameters of `model`, declared from its spec, and its methods over them.

    `init` gives {"params": tree} with each leaf boxed with its logical axes; `nn.unbox` takes the boxes off, and what
    is left is the tree that the model itself takes, as its own trees are what `apply` takes. An rng named "dropout"
    turns dropout on.
    """

    model: Any

    def setup(self) -> None:
        # Linen keeps a tree under one name: the top of the spec is enough to have all paths.
        self.tree = {name: self.param(name, _initializer(part)) for name, part in self.model.spec().items()}

    def _params(self) -> dict[str, Any]:
        # Linen freezes a tree that it keeps; models take plain dicts.
        return {name: unfreeze(part) for name, part in self.tree.items()}

    def __call__(self, batch: dict[str, jax.Array], cache: Any = None, capture: tuple[str, ...] = ()) -> Output:
        """The model's own Output, hidden states [B, L, D] in it."""
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        given = {} if cache is None else {"cache": cache}
        return self.model.apply(self._params(), batch, key=key, capture=capture, **given)

    def logits(self, batch: dict[str, jax.Array]) -> jax.Array:
        """[B, L, V] in float32."""
        return self.model.logits(self.model.head(self._params()), self(batch).hidden_BLD)


def linen(model: Any) -> LinenModel:
    """The module of a model: `linen(model).init(key, batch)`, `.apply({"params": params}, batch)`."""
    return LinenModel(model)


def _initializer(part: Any) -> Any:
    flat = tree.flatten({"": part})

    def boxed(key: jax.Array) -> Any:
        arrays = tree.flatten(specs.initialize({"": part}, key))
        return tree.unflatten({path: nn.Partitioned(x, flat[path].axes) for path, x in arrays.items()})[""]

    return boxed
