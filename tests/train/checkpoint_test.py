"""A step is either what was saved or refused, whatever happened to its files or its writer."""

import dataclasses
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from lm.core import files
from lm.core.errors import UsageError
from lm.train import checkpoint
from lm.train.checkpoint import Checkpoints, SaveError

# Reads that Orbax leaves unfinished beside the failed one complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ROOT = pathlib.Path(__file__).resolve().parents[2]


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    optimizer: tuple
    ema: dict | None


def expected(step):
    """The closed form of the state at a step."""
    w = np.arange(64, dtype=np.float32).reshape(8, 8) * step + 0.5
    return {"w": w, "b": w[0]}


def state(step, sharding=None):
    params = jax.tree.map(lambda x: jax.device_put(jnp.asarray(x), sharding), expected(step))
    slots = {"mu": params["w"].astype(jnp.bfloat16), "empty": jnp.zeros((0, 3))}
    return State(jnp.int32(step), params | {"nothing": {}}, (slots, ()), None)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def saved(folder, *steps, **options):
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state(step), {"config": {"lr": 0.1}}, wait=True)
    return checkpoints


def equal(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def files_of(folder):
    return sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * where), len(data) - 1)] ^= 4
    path.write_bytes(data)


def test_what_comes_back_is_what_was_saved_with_its_meta(tmp_path):
    checkpoints = saved(tmp_path, 3)
    restored, meta, step = Checkpoints(tmp_path).restore(abstract(state(3)))
    assert step == 3 and meta["config"] == {"lr": 0.1} and meta["versions"]["jax"] == jax.__version__
    assert isinstance(restored, State) and restored.ema is None and equal(restored, state(3))
    assert checkpoints.newest() == 3 and checkpoint.read_meta(tmp_path, 3) == meta


def test_any_mesh_restores_what_another_saved(tmp_path):
    def over(count, *spec):
        mesh = jax.make_mesh((count,), ("a",), devices=jax.devices()[:count])
        return NamedSharding(mesh, PartitionSpec(*spec))

    Checkpoints(tmp_path).save(
        1, {"params": {"w": jax.device_put(expected(1)["w"], over(8, None, "a"))}}, {}, wait=True
    )
    for count in (1, 2, 4):
        sharding = over(count, "a")
        wanted = {"params": {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}}
        restored, _, _ = Checkpoints(tmp_path).restore(wanted)
        assert restored["params"]["w"].sharding == sharding and equal(restored["params"], {"w": expected(1)["w"]})


def test_donating_the_state_while_it_is_written_changes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"params": {"w": jnp.zeros((512, 1024))}}
    checkpoints.save(1, tree, {})
    for _ in range(5):
        tree = advance(tree)
    jax.block_until_ready(tree)
    checkpoints.wait()
    restored, _, _ = Checkpoints(tmp_path).restore(abstract(tree))
    assert float(jnp.abs(restored["params"]["w"]).max()) == 0.0


def test_parameters_come_alone_and_by_their_own_digests(tmp_path):
    saved(tmp_path, 2)
    params, meta, step = Checkpoints(tmp_path).restore_params(abstract(state(2).params))
    assert step == 2 and meta["config"] and equal(params, state(2).params)


def test_a_config_that_does_not_fit_is_told_by_leaf_and_shape(tmp_path):
    saved(tmp_path, 1)
    wanted = abstract(state(1))
    wider = dataclasses.replace(wanted, params=wanted.params | {"w": jax.ShapeDtypeStruct((8, 9), jnp.float32)})
    with pytest.raises(UsageError, match=r"params/w has shape \(8, 8\) in .*expects \(8, 9\)"):
        Checkpoints(tmp_path).restore(wider, quarantine=True)
    with pytest.raises(UsageError, match="no array ema/w"):
        Checkpoints(tmp_path).restore(dataclasses.replace(wanted, ema={"w": wanted.params["w"]}))
    with pytest.raises(UsageError, match="array optimizer/0/empty that this config lacks"):
        Checkpoints(tmp_path).restore(dataclasses.replace(wanted, optimizer=()))
    assert Checkpoints(tmp_path).steps() == [1]


def test_retention_keeps_the_newest_and_every_nth(tmp_path):
    assert saved(tmp_path, 1, 2, 3, 4, 5, 6, keep_last=2, keep_every=3).steps() == [3, 5, 6]


def test_retention_does_not_count_steps_that_it_has_not_seen_whole(tmp_path):
    saved(tmp_path, 1, 2)
    checkpoints = Checkpoints(tmp_path)  # Has verified neither.
    checkpoints.save(3, state(3), {}, wait=True)
    assert checkpoints.steps() == [1, 2, 3]
    checkpoints.save(4, state(4), {}, wait=True)
    assert checkpoints.steps() == [3, 4]


def test_saving_the_same_step_twice_does_nothing_and_a_rolled_back_one_gives_way(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    checkpoints.save(2, state(7), {}, wait=True)
    assert equal(checkpoints.restore(abstract(state(2)))[0], state(2))
    assert checkpoints.restore(abstract(state(1)), step=1)[2] == 1
    checkpoints.save(2, state(7), {}, wait=True)
    assert equal(checkpoints.restore(abstract(state(2)))[0], state(7))


def test_the_rename_that_commits_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "fsync_folder", lambda name: synced.append(os.fspath(name)))
    saved(tmp_path, 1)
    assert synced[0] == os.fspath(tmp_path / "checkpoints")


def test_saved_is_reported_once_and_only_when_durable(tmp_path):
    events = []
    checkpoints = Checkpoints(tmp_path, report=lambda event, **fields: events.append((event, fields["step"])))
    checkpoints.save(1, state(1), {})
    while checkpoints.check() is None:
        assert not events
        time.sleep(0.002)
    assert (tmp_path / "checkpoints" / "1").is_dir() and events == [("saved", 1)] and checkpoints.check() is None


@pytest.mark.parametrize("clock", (lambda: 0.0, lambda: 4e9))
def test_a_jumping_clock_changes_neither_names_nor_retention(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(time, "time", clock)
    assert saved(tmp_path, 1, 2, 3).steps() == [2, 3]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run folder with one good step, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("whole")
    Checkpoints(folder).save(1, large(), {}, wait=True)
    return folder


def large():
    """A state with an array in data files of its own, beside those that Orbax keeps inside its tables."""
    small = state(1)
    return dataclasses.replace(small, params=small.params | {"e": jax.random.normal(jax.random.key(0), (64, 256))})


@pytest.mark.parametrize(
    "damage",
    (
        "flip",
        "truncate",
        *(pytest.param(d, marks=pytest.mark.slow) for d in ("flip early", "flip late", "empty", "delete")),
    ),
)
def test_damage_to_any_file_is_refused(tmp_path, whole, damage):
    outcomes = {}
    for number, original in enumerate(files_of(whole)):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        path = folder / original.relative_to(whole)
        data = path.read_bytes()
        if damage.startswith("flip"):
            flip(path, {"flip early": 0.1, "flip": 0.5, "flip late": 0.95}[damage])
        elif damage == "delete":
            path.unlink()
        else:
            path.write_bytes(data[: len(data) // 2] if damage == "truncate" else b"")
        for part in ("state", "params"):
            try:
                tree = large() if part == "state" else large().params
                checkpoints = Checkpoints(folder)
                got = (checkpoints.restore if part == "state" else checkpoints.restore_params)(abstract(tree))
                outcome = "equal" if equal(got[0], tree) else "different"
            except UsageError as error:
                assert "step 1" in str(error)
                outcome = "refused"
            outcomes[str(original.relative_to(whole)), part] = outcome
    # Without its seal a step is as a kill between commit and seal leaves it: its arrays have digests of their own.
    unsealed = {("checkpoints/1/files.sha256", part): "equal" for part in ("state", "params") if damage == "delete"}
    assert outcomes == dict.fromkeys(outcomes, "refused") | unsealed


@pytest.mark.parametrize("where", (0.1, 0.5, 0.95))
def test_damaged_arrays_of_a_step_without_a_seal_are_refused_or_harmless(tmp_path, whole, where):
    for number, original in enumerate(files_of(whole)):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        (folder / "checkpoints" / "1" / "files.sha256").unlink()
        path = folder / original.relative_to(whole)
        if not path.exists():
            continue
        flip(path, where)
        try:
            assert equal(Checkpoints(folder).restore(abstract(large()))[0], large()), path
        except UsageError as error:
            assert "step 1" in str(error)


def test_a_damaged_newest_step_is_quarantined_and_the_one_before_is_used(tmp_path):
    saved(tmp_path, 1, 2)
    flip(tmp_path / "checkpoints" / "2" / "meta" / "metadata")
    events = []
    checkpoints = Checkpoints(tmp_path, report=lambda event, **fields: events.append((event, fields)))
    restored, _, step = checkpoints.restore(abstract(state(1)))
    assert step == 1 and equal(restored, state(1)) and checkpoints.newest() == 1
    assert events[0][0] == "skipped" and checkpoints.steps() == [1, 2]
    checkpoints.restore(abstract(state(1)), quarantine=True)
    assert events[1][0] == "quarantined" and events[1][1]["to"] == "2.damaged-1"
    assert checkpoints.steps() == [1] and (tmp_path / "checkpoints" / "2.damaged-1").is_dir()
    checkpoints.save(2, state(2), {}, wait=True)
    assert checkpoints.steps() == [1, 2]


def test_where_none_verifies_it_says_so_and_touches_nothing(tmp_path):
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        flip(tmp_path / "checkpoints" / str(step) / "meta" / "metadata")
    with pytest.raises(UsageError, match="step 2: .*step 1: "):
        Checkpoints(tmp_path).restore(abstract(state(1)), quarantine=True)
    assert Checkpoints(tmp_path).steps() == [1, 2] and Checkpoints(tmp_path).newest() is None


def test_a_step_under_the_wrong_number_is_refused(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "9")
    with pytest.raises(UsageError, match="that of step 1"):
        Checkpoints(tmp_path).restore(abstract(state(1)))


def test_locate_takes_a_run_or_one_of_its_steps(tmp_path):
    saved(tmp_path, 1)
    run = str(tmp_path)
    assert checkpoint.locate(tmp_path) == checkpoint.locate(tmp_path / "checkpoints") == (run, None)
    assert checkpoint.locate(tmp_path / "checkpoints" / "1") == (run, 1)
    with pytest.raises(UsageError, match="neither a run folder"):
        checkpoint.locate(tmp_path / "checkpoints" / "2")


# A writer of states in the closed form of `expected`, to be killed.
WRITER = """
import sys, jax.numpy as jnp, numpy as np
from lm.train.checkpoint import Checkpoints
def state(step):
    w = np.arange(64, dtype=np.float32).reshape(8, 8) * step + 0.5
    return {"step": jnp.int32(step), "params": {"w": jnp.asarray(w)}}
import jax
shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))
checkpoints = Checkpoints(sys.argv[1])
step = checkpoints.restore(shapes, quarantine=True)[2] if checkpoints.steps() else 0
print("from", step, flush=True)
for step in range(step + 1, step + 1 + int(sys.argv[2])):
    checkpoints.save(step, state(step), {})
    while checkpoints.check() is None:
        pass
    print(step, flush=True)
"""


def writer(folder, count, failpoint="", **options):
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "LM_FAILPOINT": failpoint, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", WRITER, str(folder), str(count)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def check_against_the_closed_form(folder):
    shapes = {"step": jax.ShapeDtypeStruct((), jnp.int32), "params": {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}
    restored, _, step = Checkpoints(folder).restore(shapes)
    assert int(restored["step"]) == step and np.array_equal(restored["params"]["w"], expected(step)["w"])
    return step


@pytest.mark.parametrize("kills", (5, pytest.param(50, marks=pytest.mark.slow)))
def test_killed_at_any_instant_the_newest_step_is_whole(tmp_path, kills):
    rng = random.Random(0)
    reported = 0
    for _ in range(kills):
        process = writer(tmp_path, 10**6)
        assert int(process.stdout.readline().split()[1]) >= reported
        time.sleep(rng.uniform(0.3, 1.2))
        process.send_signal(signal.SIGKILL)
        lines = process.communicate()[0].split()
        reported = int(lines[-1]) if lines else reported
        if Checkpoints(tmp_path).steps():
            assert check_against_the_closed_form(tmp_path) >= reported
    assert reported > 0


def test_dying_before_the_commit_leaves_the_step_before_and_the_rest_is_cleaned(tmp_path):
    assert writer(tmp_path, 3).wait(timeout=60) == 0
    assert writer(tmp_path, 3, failpoint="before_commit").wait(timeout=60) == 9
    folder = tmp_path / "checkpoints"
    assert any("tmp" in p.name for p in folder.iterdir()) and check_against_the_closed_form(tmp_path) == 3
    assert writer(tmp_path, 1).wait(timeout=60) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["3", "4"]


def test_a_write_that_fails_names_the_step_and_the_last_good_one(tmp_path):
    checkpoints = saved(tmp_path, 1)
    big = {"params": {"w": jax.random.normal(jax.random.key(0), (256, 1024))}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(SaveError, match=r"saving step 2 .* failed .*last good step is 1"):
            checkpoints.save(2, big, {})
            while checkpoints.check() is None:
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert checkpoints.steps() == [1] and equal(Checkpoints(tmp_path).restore(abstract(state(1)))[0], state(1))
    checkpoints.save(2, big, {}, wait=True)
    assert checkpoints.steps() == [1, 2]


def test_a_folder_that_cannot_be_written_ends_the_process_with_the_reason(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    process = writer(tmp_path, 1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "saving step 1" in err and "Not a directory" in err


def test_a_full_disk_stops_at_the_failing_step_and_recovers(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        checkpoints = saved(disk, 1)
        big = {"params": {"w": jax.random.normal(jax.random.key(0), (1024, 1024))}}
        with pytest.raises(SaveError, match=r"saving step 2 .*last good step is 1"):
            checkpoints.save(2, big, {}, wait=True)
        again = Checkpoints(disk)
        assert again.steps() == [1] and equal(again.restore(abstract(state(1)))[0], state(1))
        again.save(2, state(2), {}, wait=True)
        assert sorted(p.name for p in (disk / "checkpoints").iterdir()) == ["1", "2"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
