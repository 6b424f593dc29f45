"""The whole configuration of a run: what an experiment returns and what `config.json` holds."""

import dataclasses
from typing import Any, Protocol

from lm.core.config import setting
from lm.core.errors import UsageError, check_positive
from lm.data.stream import Data
from lm.models.headed import with_vocabulary
from lm.parallel.mesh import Mesh
from lm.train import optimizers, schedules

VOCAB_MULTIPLE = 128  # Matrix units take columns in groups of 128.


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, in which batches, and how often to look and to save."""

    steps: int = 1000
    batch_size: int = 8  # Sequences a step, over all devices.
    seq_len: int = 256
    accumulate: int = 1  # Micro-batches a step.
    seed: int = 0
    ema_decay: float | None = None  # Keeps an exponential average of the weights, and evaluates it.
    max_skipped: int = 3  # Steps in a row without finite numbers that stop the run.
    poison: tuple[int, int] | None = None  # (first, last) steps whose gradients become NaN: a drill.
    # Measures the gradient noise scale, in sequences; the micro-batches of `accumulate` are its small batches.
    noise_scale: bool = setting(False, identity=False)
    # Keeps the optimizer's moments in the memory of the devices' hosts, see lm.train.offload.
    offload_optimizer: bool = setting(False, identity=False)
    log_every: int = setting(10, identity=False)
    eval_every: int = setting(250, identity=False)
    save_every: int = setting(500, identity=False)
    keep_last: int = setting(2, identity=False)
    keep_every: int | None = setting(None, identity=False)
    # Seconds without a step that end the process, or 10 times the median step where that is longer; 0 never.
    watchdog_s: float = setting(60.0, identity=False)

    def __post_init__(self):
        names = ("steps", "batch_size", "seq_len", "accumulate", "max_skipped", "log_every", "eval_every", "save_every")
        check_positive(**{f"train.{name}": getattr(self, name) for name in names})
        if self.keep_every is not None:
            check_positive(**{"train.keep_every": self.keep_every})
        if self.keep_last < 2:
            raise UsageError(f"train.keep_last={self.keep_last} must be at least 2: a damaged step needs one before it")
        if not self.watchdog_s >= 0:
            raise UsageError(f"train.watchdog_s={self.watchdog_s} must not be negative; 0 switches the watchdog off")
        if self.batch_size % self.accumulate:
            raise UsageError(f"train.accumulate={self.accumulate} does not divide train.batch_size={self.batch_size}")
        if self.noise_scale and self.accumulate < 2:
            raise UsageError(
                "train.noise_scale=True compares micro-batches with the whole batch: "
                f"train.accumulate={self.accumulate} must be at least 2"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UsageError(f"train.ema_decay={self.ema_decay} must be at least 0 and below 1")
        if self.poison is not None and len(self.poison) != 2:
            raise UsageError(f"train.poison={self.poison} needs two steps, the first and the last")


@dataclasses.dataclass(frozen=True)
class Evals:
    """What is measured on the validation split while training."""

    batch_size: int | None = None  # None takes the training batch.
    seq_len: int | None = None  # None takes the training length.
    max_tokens: int | None = None  # None takes the whole split.
    sample_tokens: int = setting(0, identity=False)  # Tokens written to samples/ at each evaluation.
    prompt: str | None = setting(None, identity=False)  # None takes the first tokens of the training text.
    baselines: bool = setting(False, identity=False)  # Counting models and xz on the same bytes, at the end.

    def __post_init__(self):
        given = {name: getattr(self, name) for name in ("batch_size", "seq_len", "max_tokens")}
        check_positive(**{f"evals.{name}": number for name, number in given.items() if number is not None})
        if self.sample_tokens < 0:
            raise UsageError(f"evals.sample_tokens={self.sample_tokens} must not be negative")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run is a function of this alone, and of the corpus that `data` names."""

    model: Any
    objective: Any
    data: Data = Data()
    optimizer: optimizers.Optimizer = optimizers.AdamW()
    schedule: schedules.Schedule = schedules.Cosine()
    mesh: Mesh = setting(Mesh(), identity=False)
    train: Train = Train()
    evals: Evals = Evals()
    name: str = setting("", identity=False)  # Of one run among those of a sweep, whose folder it is: "rotary/seed0".

    def __post_init__(self):
        limit = self.model.context_limit
        for name, length in (("train.seq_len", self.train.seq_len), ("evals.seq_len", self.evals.seq_len)):
            if limit is not None and length is not None and length > limit:
                raise UsageError(f"{name}={length} exceeds the model's positions: raise model.max_len={limit}")
        if self.mesh.stage > 1:
            self._check_stages()

    def _check_stages(self) -> None:
        stages, stacks = self.mesh.stage, getattr(self.model, "stacks", ())
        if not stacks:
            raise UsageError(
                f"mesh.stage={stages} divides a stack of layers, which {type(self.model).__name__} does not have: "
                "leave mesh.stage out"
            )
        for stack in stacks:
            stack.check_stages(stages, self.mesh.rounds)
        rows, micro_batches = self.train.batch_size // self.train.accumulate, self.mesh.micro_batches or stages
        if rows % micro_batches:
            raise UsageError(
                f"train.batch_size={self.train.batch_size} / train.accumulate={self.train.accumulate} do not divide "
                f"into mesh.micro_batches={micro_batches}: take a multiple of it"
            )


class Vocabulary(Protocol):
    """What `resolve` needs of a tokenizer."""

    @property
    def eos_id(self) -> int | None: ...

    @property
    def vocab_size(self) -> int: ...

    def special(self, name: str) -> int | None:
        """The id of a special token, such as "[MASK]", by whatever name the tokenizer has it."""
        ...


def with_ids(objective: Any, tokenizer: Vocabulary) -> Any:
    """The objective with its `ids` filled in: the tokenizer's own, or the next after the tokenizer's last."""
    if not objective.extra_ids or objective.ids is not None:
        return objective
    ids, free = [], tokenizer.vocab_size
    for name in objective.extra_ids:
        own = tokenizer.special(name)
        ids.append(free if own is None else own)
        free += own is None
    return dataclasses.replace(objective, ids=tuple(ids), vocab_size=tokenizer.vocab_size)


def ids_in_all(objective: Any, tokenizer: Vocabulary) -> int:
    """How many ids the tokenizer and a resolved objective take together."""
    return max(tokenizer.vocab_size, *(i + 1 for i in objective.ids)) if objective.extra_ids else tokenizer.vocab_size


def resolve(run: Run, tokenizer: Vocabulary) -> Run:
    """`run` with the vocabulary size of its model and the special ids of its objective filled in.

    The rows are all ids of both, padded to a multiple of 128 unless `model.vocab_size` gives a number; logits past
    the valid ones are masked. Contexts of a counted model start anew after the tokenizer's `eos_id`. A decoder with a
    source starts from the objective's `start_id`. Raises UsageError for a given number below that, and for an
    objective with a source whose model has no place for one.
    """
    _check_fit(run.objective, run.model)
    _check_gradient(run.objective, run.optimizer)
    objective = with_ids(run.objective, tokenizer)
    valid = ids_in_all(objective, tokenizer)
    rows = run.model.vocab_size
    if rows is None:
        rows = -(-valid // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if rows < valid:
        raise UsageError(
            f"model.vocab_size={rows} is below the {valid} ids of the corpus's tokenizer and objective: "
            "leave it unset, or use the corpus that the model was made for"
        )
    model = with_vocabulary(run.model, rows, valid)
    if hasattr(model, "with_boundary"):
        model = model.with_boundary(tokenizer.eos_id)
    if "source" in objective.needs:
        _check_source(model, valid)
        model = dataclasses.replace(model, start_id=objective.start_id)
    return dataclasses.replace(run, model=model, objective=objective)


_WAYS_OUT = {
    "causal": "it predicts each token from those before it, as lm.models.decoder.Decoder does",
    "prefix": "use lm.models.decoder.Decoder, without windows",
    "masked": "use lm.models.encoder.Encoder with 'tokens' in model.outputs",
    "pair": "use lm.models.encoder.Encoder with 'pair' in model.outputs and model.types=2",
    "detect": "use lm.models.electra.Electra",
    "permuted": "use lm.models.xlnet.XLNet",
    "source": "use lm.models.encdec.EncDec",
    "vectors": "use lm.models.word2vec.Word2Vec",
    "words": "leave out model.buckets, or set objective.ngrams",
    "ngrams": "set model.buckets",
    "states": "use lm.models.hmm.HMM",
}


def _check_fit(objective: Any, model: Any) -> None:
    missing = next((need for need in objective.needs if need not in model.offers), None)
    if missing is not None:
        raise UsageError(
            f"objective={type(objective).__name__} does not fit model={type(model).__name__} as it is set: "
            f"{_WAYS_OUT[missing]}"
        )


def _check_gradient(objective: Any, optimizer: Any) -> None:
    """Expected counts are no slope to descend, and a slope holds no counts."""
    if getattr(objective, "gradient", None) != getattr(optimizer, "gradient", None):
        raise UsageError(
            f"optimizer={type(optimizer).__name__} does not fit objective={type(objective).__name__}: "
            "lm.objectives.em.Expectation and lm.train.optimizers.Maximization need each other"
        )


def _check_source(model: Any, valid: int) -> None:
    if model.source_vocab_size is not None and model.source_vocab_size < valid:
        raise UsageError(
            f"model.source_vocab_size={model.source_vocab_size} is below the {valid} ids of the corpus's tokenizer and "
            "objective: leave it unset"
        )
