"""The hidden Markov model of text: its filter as a language model, Viterbi paths and posteriors, all in log space.

Z stands for the hidden states.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lm.core import params as specs
from lm.core.errors import UsageError, check_positive
from lm.core.params import Constant, Normal, Param
from lm.layers.embed import mask_padding
from lm.models.output import Output
from lm.parallel import rules

_LEAST = float(np.finfo(np.float32).tiny)  # What no float32 is below counts as this: its logarithm stays finite.

Tables = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class HMM:
    """The config, hashable, and the pure functions over its parameters (Baum and Petrie 1966; Rabiner 1989).

    A state of `states` follows the one before and emits a token. The parameters are log-potentials, normalised
    wherever they are used over the axes that are not their inputs; they start at draws from N(0, init_std^2).
    `valid_vocab_size`: ids from there on stand for no token and are never emitted.
    """

    states: int = 64
    vocab_size: int | None = None
    valid_vocab_size: int | None = None
    init_std: float = 1.0

    offers = ("causal", "states")  # What an objective may need of it.
    context_limit = None  # Any length.

    def __post_init__(self):
        check_positive(states=self.states, init_std=self.init_std)  # Equal states would stay equal.
        if self.valid_vocab_size is not None and not 0 < self.valid_vocab_size <= (self.vocab_size or 0):
            raise UsageError(f"valid_vocab_size={self.valid_vocab_size} is not within vocab_size={self.vocab_size}")

    def spec(self) -> dict[str, Param]:
        """{"begin" [Z], "transition" [Z, Z] from state to state, "emission" [Z, V]}."""
        if self.vocab_size is None:
            raise UsageError("vocab_size=None is not resolved: take it from the tokenizer or set it")
        Z, V, init = self.states, self.vocab_size, Normal(self.init_std)
        return {
            "begin": Param((Z,), ("embed",), init, role="vector"),
            "transition": Param((Z, Z), ("embed", "embed_out"), init, inputs=("embed",)),
            "emission": Param((Z, V), ("embed", "vocab"), init, inputs=("embed",), role="head"),
        }

    def log_probs(self, params: Tables) -> Tables:
        """The log-probabilities of all or some of the parameters."""
        spec = self.spec()
        masked = {n: mask_padding(w, self.valid_vocab_size) if n == "emission" else w for n, w in params.items()}
        return {name: _log_normalized(spec[name], w) for name, w in masked.items()}

    def apply(
        self,
        params: Tables,
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: Tables | None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """Hidden states [B, L, Z]: log p(next state | tokens up to here).

        `batch` has tokens_BL and may have documents_BL: where its number changes a sequence begins, and -1 is padding,
        which is passed over. Nothing is random.
        """
        if capture:
            raise UsageError("HMM has no states to capture")
        tokens_BL, documents_BL = batch["tokens_BL"], batch.get("documents_BL")
        real_BL = jnp.ones(tokens_BL.shape, bool) if documents_BL is None else documents_BL >= 0
        tables = self.log_probs(params)
        _, states_BLZ, left = self.filter(tables, tokens_BL, real_BL, documents_BL, cache)
        next_BLZ = _log_dot(states_BLZ, jnp.exp(tables["transition"]))
        return Output(
            rules.constrain(next_BLZ, "batch", "residual_length", "act_embed"), None if cache is None else left
        )

    def filter(
        self,
        tables: Tables,
        tokens_BL: jax.Array,
        real_BL: jax.Array,
        documents_BL: jax.Array | None = None,
        carry: Tables | None = None,
    ) -> tuple[jax.Array, jax.Array, Tables]:
        """(log p(tokens of the row | carry) [B], log p(state | tokens up to here) [B, L, Z], the carry that is left).

        The forward algorithm (Rabiner 1989, section III.A) of potentials that need not be normalised. Tokens that are
        not `real_BL` are passed over. A text begins where the document's number changes, and with the row unless
        `carry` has begun.
        """
        carry = carry or specs.initialize(self.carry_spec(tokens_BL.shape[0]), jax.random.key(0))
        continues_BL = jnp.ones(tokens_BL.shape, bool).at[:, 0].set(carry["begun"])
        if documents_BL is not None:
            continues_BL = continues_BL.at[:, 1:].set(documents_BL[:, 1:] == documents_BL[:, :-1])
        total_B, states_LBZ = _forward(
            tables, _emitted(tables, tokens_BL), continues_BL.T, real_BL.T, jax.lax.stop_gradient(carry["state"])
        )
        left = {"state": states_LBZ[-1], "begun": carry["begun"] | real_BL.any(1)}
        return total_B, states_LBZ.swapaxes(0, 1), left

    def posteriors(self, params: Tables, tokens_BL: jax.Array) -> jax.Array:
        """p(state | all tokens of the row) [B, L, Z]: how the likelihood changes with what each state emits."""
        tables, always_LB = self.log_probs(params), jnp.ones(tokens_BL.T.shape, bool)
        carry = specs.initialize(self.carry_spec(tokens_BL.shape[0]), jax.random.key(0))

        def total(emitted_LBZ):
            return _forward(tables, emitted_LBZ, always_LB.at[0].set(False), always_LB, carry["state"])[0].sum()

        return jax.grad(total)(_emitted(tables, tokens_BL)).swapaxes(0, 1)

    def viterbi(self, params: Tables, tokens_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(the likeliest states of each row [B, L], log p(they and the tokens) [B]) (Viterbi 1967)."""
        tables = self.log_probs(params)
        emitted_LBZ = _emitted(tables, tokens_BL)

        def step(best_BZ, emitted_BZ):
            paths_BZZ = best_BZ[:, :, None] + tables["transition"][None]
            return paths_BZZ.max(1) + emitted_BZ, paths_BZZ.argmax(1)

        def back(state_B, from_BZ):
            before_B = jnp.take_along_axis(from_BZ, state_B[:, None], 1)[:, 0]
            return before_B, before_B

        best_BZ, from_LBZ = jax.lax.scan(step, tables["begin"][None] + emitted_LBZ[0], emitted_LBZ[1:])
        last_B = best_BZ.argmax(1)
        before_LB = jax.lax.scan(back, last_B, from_LBZ, reverse=True)[1]
        return jnp.concatenate([before_LB, last_B[None]]).T, best_BZ.max(1)

    def carry_spec(self, batch_size: int) -> dict[str, Param]:
        """{"state" [B, Z], log p(state | tokens so far), and "begun" [B], whether there were any}."""
        uniform = Constant(-float(np.log(self.states)))
        return {
            "state": Param((batch_size, self.states), ("batch", "act_embed"), uniform, role="vector", trainable=False),
            "begun": Param((batch_size,), ("batch",), Constant(), role="vector", trainable=False, dtype="bool"),
        }

    def cache_spec(self, batch_size: int, length: int) -> dict[str, Param]:
        """The same: it does not grow with the `length`."""
        return self.carry_spec(batch_size)

    def forward_flops(self, spec: dict[str, Any], lengths: dict[str, int]) -> float:
        """Floating-point operations of a row: the products of states and transitions; of the emissions one is read."""
        return 2.0 * lengths["tokens_BL"] * self.states**2

    def attention_flops(self, length: int) -> float:
        """None: nothing is attended to."""
        return 0.0

    def head(self, params: Tables) -> Tables:
        """The parameters that make logits."""
        return {"emission": params["emission"]}

    def logits(self, head: Tables, x: jax.Array) -> jax.Array:
        """log p(token) [..., V] = log sum_z p(z) p(token | z) of log p(z) [..., Z]; padding ids are masked."""
        return mask_padding(_log_dot(x, jnp.exp(self.log_probs(head)["emission"])), self.valid_vocab_size)


def _log_normalized(p: Param, w: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(w, tuple(i for i, axis in enumerate(p.axes) if axis not in p.inputs))


def _emitted(tables: Tables, tokens_BL: jax.Array) -> jax.Array:
    """What each state has for each token, [L, B, Z]."""
    return rules.constrain(tables["emission"].T[tokens_BL.T], None, "batch", "act_embed")


def _forward(tables, emitted_LBZ, continues_LB, real_LB, state_BZ):
    """(log p of each row [B], normalised states [L, B, Z]).

    Each device goes through its own rows: left to the partitioner, the transitions' gradient would be summed over
    devices once a token.
    """
    arguments = tables["begin"], tables["transition"], emitted_LBZ, continues_LB, real_LB, state_BZ
    sizes = rules.sizes()
    axes = tuple(axis for axis in rules.BATCH_AXES if sizes.get(axis, 1) > 1)
    if not axes:
        return _forward_rows(*arguments)
    whole, rows, times = PartitionSpec(), PartitionSpec(axes), PartitionSpec(None, axes)
    each = jax.shard_map(
        _forward_rows,
        in_specs=(whole, whole, times, times, times, rows),
        out_specs=(rows, times),
        axis_names=set(axes),
        check_vma=False,
    )
    return each(*arguments)


def _forward_rows(begin_Z, transition_ZZ, emitted_LBZ, continues_LB, real_LB, state_BZ):
    """States are divided by their sums as by constants, so that the whole gradient comes back by the last state, as the
    backward variables do: sums of what is positive. Through the divisions it would come as small differences.
    """
    kernel_ZZ = jnp.exp(transition_ZZ)

    def step(state_BZ, now):
        emitted_BZ, continues_B, real_B = now
        anew_BZ = begin_Z[None] + jax.nn.logsumexp(state_BZ, 1, keepdims=True)
        entered_BZ = jnp.where(continues_B[:, None], _log_dot(state_BZ, kernel_ZZ), anew_BZ)
        joint_BZ = entered_BZ + emitted_BZ
        sum_B1 = jax.lax.stop_gradient(jax.nn.logsumexp(joint_BZ, 1, keepdims=True))
        state_BZ = jnp.where(real_B[:, None], joint_BZ - sum_B1, state_BZ)
        return state_BZ, (jnp.where(real_B, sum_B1[:, 0], 0), state_BZ)

    last_BZ, (sums_LB, states_LBZ) = jax.lax.scan(step, state_BZ, (emitted_LBZ, continues_LB, real_LB))
    return sums_LB.sum(0) + jax.nn.logsumexp(last_BZ, 1), states_LBZ


def _log_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """log(exp(x) @ kernel) in float32, also where products are otherwise rounded."""
    peak = jax.lax.stop_gradient(x.max(-1, keepdims=True))
    product = jnp.matmul(jnp.exp(x - peak), kernel, precision=jax.lax.Precision.HIGHEST)
    return peak + jnp.log(jnp.maximum(product, _LEAST))
