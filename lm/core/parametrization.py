"""How what is tuned on a small model carries over to a wide or deep one: one table, read by all that depends on it."""

import dataclasses
from typing import Any, NamedTuple

from lm.core import params
from lm.core.errors import UsageError, check_choice, check_given
from lm.core.params import Constant, Normal, Param

PARAMETRIZATIONS = ("sp", "mup", "completep")
DECAYS = ("product", "coefficient")
_ALPHA = 1.0  # The exponent of depth: 1 is CompleteP, under which features of every layer keep being learned.

Exponents = tuple[float, float]


class Row(NamedTuple):
    """Exponents of (m, m_L), the width and the layers over those of the base: what each figure is multiplied by.

    `init` is of the standard deviation, `rate` of the learning rate, `decay` of the weight decay, `eps` of Adam's,
    `forward` of what the parameters add to the forward pass.
    """

    init: Exponents = (0, 0)
    rate: Exponents = (0, 0)
    decay: Exponents = (0, 0)
    eps: Exponents = (0, 0)
    forward: Exponents = (0, 0)


# Table 1 of CompleteP (Dey et al. 2025, 2505.01618), whose columns without depth are muP for Adam (Yang et al. 2022,
# 2203.03466, tables 3 and 8, with the unembedding's 1 / m in the forward pass, the one form that tied tables have).
# "router" and "classifier" map the width to a fixed number: muP's output again, in the form without a multiplier.
# For what is outside the layers the table keeps eps; equation 40, and the authors' code since, has eps / m there.
TABLE = {
    "embedding": Row(),
    "hidden matrix": Row(init=(-0.5, 0), rate=(-1, _ALPHA - 1), decay=(1, 0), eps=(-1, -_ALPHA)),
    "hidden vector": Row(rate=(0, _ALPHA - 1), eps=(-1, -_ALPHA)),
    "branch": Row(forward=(0, -_ALPHA)),  # Of the residual stream: what a sublayer adds to it.
    "router": Row(init=(-1, 0), rate=(-1, _ALPHA - 1), decay=(1, 0), eps=(0, -_ALPHA)),
    "matrix": Row(init=(-0.5, 0), rate=(-1, 0), decay=(1, 0), eps=(-1, 0)),  # Outside the layers, and so below.
    "vector": Row(),
    "classifier": Row(init=(-1, 0), rate=(-1, 0), decay=(1, 0)),
    "head": Row(forward=(-1, 0)),
}


@dataclasses.dataclass(frozen=True)
class Ratios:
    """The sizes of a model over those of the base that it was tuned at: all 1 in the standard parametrization.

    `width` is m, `layers` m_L, `head_dim` that of a head. `decay_keeps` says what of the weight decay is the same at
    all widths: the "product" of learning rate and decay (CompleteP, microsoft/mup), so that hidden matrices have m
    times the coefficient, or the "coefficient" (nanoGPT-mup).
    """

    width: float = 1.0
    layers: float = 1.0
    head_dim: float = 1.0
    decay_keeps: str = "product"

    def power(self, exponents: Exponents) -> float:
        """m and m_L to these powers."""
        return self.width ** exponents[0] * self.layers ** exponents[1]

    def forward(self, row: str) -> float:
        """The multiplier of the forward pass: of the "head"'s logits, or of a "branch"."""
        return self.power(TABLE[row].forward)

    def attention(self, scale: float | None, head_dim: int) -> float | None:
        """The scale of attention's scores, from the base's own: 1 / head_dim, where the base has its root.

        Queries and keys become correlated in training, so that products grow as head_dim, not as its root.
        """
        if self.head_dim == 1:
            return scale
        return (scale or (head_dim / self.head_dim) ** -0.5) / self.head_dim

    def apply(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The spec of a whole model, initial values as at the base, with the table's multipliers."""

        def scaled(p: Param) -> Param:
            row = TABLE[_row(p)]
            decay = self.power(row.decay) if self.decay_keeps == "product" else 1.0
            init = _scaled(p.init, self.power(row.init))
            return dataclasses.replace(p, init=init, rate=self.power(row.rate), decay=decay, eps=self.power(row.eps))

        return params.map_spec(scaled, spec)

    @property
    def changes_forward(self) -> bool:
        """Whether the forward pass has multipliers that the standard parametrization lacks."""
        return any(self.forward(row) != 1 for row in TABLE) or self.head_dim != 1


def ratios_of(model: Any, head_dim: int) -> Ratios:
    """The Ratios of a model, from its settings of these names.

    `parametrization`: "sp"; "mup", which needs `base_width`; "completep", which needs `base_layers` too. The base is
    this model with those for its width and layers: its heads are as many, and narrower unless the model has a
    `head_dim` of its own; `base_head_dim` says otherwise. Raises UsageError for settings that are missing or have no
    effect.
    """
    kind, bases = model.parametrization, ("base_width", "base_layers", "base_head_dim")
    check_choice("parametrization", kind, PARAMETRIZATIONS)
    check_choice("decay_keeps", model.decay_keeps, DECAYS)
    check_given(model, *bases)
    needed = {"sp": (), "mup": bases[:1], "completep": bases[:2]}[kind]
    for name in bases:
        given = getattr(model, name) is not None
        if name in needed and not given:
            raise UsageError(f"parametrization={kind!r} needs {name}, that of the model whose settings carry over")
        if given and name not in needed and (kind == "sp" or name != "base_head_dim"):
            raise UsageError(f"{name}={getattr(model, name)} has no effect with parametrization={kind!r}: leave it out")
    if kind == "sp":
        if model.decay_keeps != "product":
            raise UsageError(f"decay_keeps={model.decay_keeps!r} has no effect with parametrization='sp': leave it out")
        return Ratios()
    if kind == "completep" and model.norm_place == "post":
        raise UsageError("parametrization='completep' scales what is added to the residual: norm_place='post' has none")
    width = model.width / model.base_width
    layers = model.layers / model.base_layers if kind == "completep" else 1.0
    heads = 1.0 if getattr(model, "head_dim", None) else width
    if model.base_head_dim is not None:
        heads = head_dim / model.base_head_dim
    return Ratios(width, layers, heads, model.decay_keeps)


def _row(p: Param) -> str:
    if p.role == "matrix" and "classes" in p.axes:
        return "classifier"
    return f"hidden {p.role}" if "layers" in p.axes and p.role in ("matrix", "vector") else p.role


def _scaled(init: Any, factor: float) -> Any:
    if factor == 1 or isinstance(init, Constant):
        return init
    if not isinstance(init, Normal):
        raise TypeError(f"initial values by {init} are not known to the table")
    return Normal(init.std * factor)
