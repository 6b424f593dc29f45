"""Overrides, JSON, digest and diff of frozen configs."""

import dataclasses

import pytest

from lm.core import config
from lm.core.errors import UsageError
from lm.models.decoder import Decoder
from lm.parallel.mesh import Mesh
from lm.train.optimizers import AdamW, Group
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine, Linear


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    name: str | None = None
    sizes: tuple[int, ...] = (1, 2)

    context_limit = None  # A Run asks its model for it.


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    count: int = 3
    flag: bool = False
    folder: str = config.setting("here", identity=False)


@pytest.mark.parametrize(
    "assignment, get, expected",
    [
        ("count=1_000", lambda c: c.count, 1000),
        ("count=2e3", lambda c: c.count, 2000),
        ("inner.rate=3", lambda c: c.inner.rate, 3.0),
        ("inner.name=None", lambda c: c.inner.name, None),
        ("inner.name=x=y", lambda c: c.inner.name, "x=y"),
        ("inner.sizes=(4,5)", lambda c: c.inner.sizes, (4, 5)),
        ("inner.sizes=7", lambda c: c.inner.sizes, (7,)),
        ("flag=true", lambda c: c.flag, True),
    ],
)
def test_an_override_is_parsed_by_the_type_of_its_field(assignment, get, expected):
    assert get(config.override_all(Outer(), [assignment])) == expected


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("coutn=3", "count"),
        ("inner.rat=3", "rate"),
        ("count=many", "'many' is not of type int"),
        ("count=1.5", "is not of type int"),
        ("flag=maybe", "is not of type bool"),
        ("count.deep=1", "plain value"),
        ("count", "name=value"),
    ],
)
def test_a_wrong_override_names_what_is_right(assignment, words):
    with pytest.raises(UsageError, match=words):
        config.override_all(Outer(), [assignment])


def test_a_class_is_chosen_by_name_and_keeps_shared_settings():
    run = Run(model=Inner(), objective=Inner(), schedule=Cosine(peak=0.1, warmup_steps=7))
    assert config.override_all(run, ["schedule=Linear"]).schedule == Linear(peak=0.1, warmup_steps=7)
    with pytest.raises(UsageError, match="Linear"):
        config.override_all(run, ["schedule=Liner"])


def test_overrides_take_effect_at_once():
    run = Run(model=Inner(), objective=Inner(), train=Train(batch_size=480, accumulate=5))
    for order in (["train.batch_size=2", "train.accumulate=1"], ["train.accumulate=1", "train.batch_size=2"]):
        assert config.override_all(run, order).train == Train(batch_size=2, accumulate=1)
    both = config.override_all(run, ["schedule.final=0.5", "schedule=Linear"]).schedule
    assert both == Linear(final=0.5)


def test_json_round_trip_is_the_same_run():
    run = Run(
        model=Decoder(positions="rotary"),
        objective=Mesh(),
        optimizer=AdamW(groups=(Group("embedding", 0.1), Group("norm", 1.0, 0.0))),
        train=Train(poison=(1, 2)),
    )
    assert config.from_json(config.to_json(run)) == run


@pytest.mark.parametrize(
    "name", ["os.system", "lm.core.config.digest", "lm.nowhere.Thing", "subprocess.Popen", 3, None]
)
def test_json_resolves_only_our_dataclasses(name):
    with pytest.raises(UsageError):
        config.from_json({"class": name})


def test_json_with_an_unknown_setting_is_refused_by_name():
    data = {**config.to_json(Mesh()), "colour": 1}
    with pytest.raises(UsageError, match="colour"):
        config.from_json(data)


def test_the_digest_ignores_defaults_mesh_and_cadence_and_nothing_else():
    run = Run(model=Inner(), objective=Inner())
    same = dataclasses.replace(run, mesh=Mesh(fsdp=2), train=Train(log_every=3), evals=Evals(sample_tokens=5))
    assert config.digest(same) == config.digest(run)
    for name in ("train.seed", "data.seed", "schedule.peak", "model.rate", "optimizer.b1"):
        other = config.override_all(run, [f"{name}={9 if 'seed' in name else 0.25}"])
        assert config.digest(other) != config.digest(run), name


def test_the_digest_knows_the_class_of_a_choice():
    run = Run(model=Inner(), objective=Inner())
    assert config.digest(config.override_all(run, ["schedule=Linear"])) != config.digest(run)


def test_diff_lists_both_values():
    run = Run(model=Inner(), objective=Inner())
    other = config.override_all(run, ["schedule=Linear", "train.steps=5"])
    changes = config.diff(run, other)
    assert changes["train.steps"] == (1000, 5)
    assert changes["schedule.class"] == ("lm.train.schedules.Cosine", "lm.train.schedules.Linear")
    assert set(changes) == {"train.steps", "schedule.class"}
