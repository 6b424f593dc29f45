"""Processes find each other by whatever started them, and agree."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.parallel import hosts, rules
from lm.parallel.layout import Layout
from lm.parallel.mesh import Mesh

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("coordinator", ("no.such.host.invalid:1234", "here", "here:port"))
def test_a_coordinator_that_does_not_resolve_is_refused_at_once(coordinator):
    with pytest.raises(UsageError, match="coordinator"):
        hosts.initialize(Layout(coordinator, 2, 1, "flags"))


@pytest.fixture
def joined(monkeypatch):
    """The arguments that jax.distributed.initialize was called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize(
    ("coordinator", "resolves_to", "listens_on"),
    [
        ("node1:5", "10.0.0.1", "node1:5"),
        ("127.0.0.1:5", "127.0.0.1", "127.0.0.1:5"),
        ("localhost:5", "127.0.0.1", "localhost:5"),
        ("node1:5", "127.0.1.1", "[::]:5"),  # Debian's name for the host itself.
        ("[::1]:5", "::1", "[::1]:5"),
    ],
)
def test_the_coordinator_listens_where_others_find_it(monkeypatch, joined, coordinator, resolves_to, listens_on):
    monkeypatch.setattr(hosts.socket, "getaddrinfo", lambda *_: [(2, 1, 6, "", (resolves_to, 5))])
    hosts.initialize(Layout(coordinator, 2, 0, "flags"))
    assert joined[0]["coordinator_bind_address"] == listens_on and joined[0]["coordinator_address"] == coordinator


def test_a_process_drives_all_devices_that_it_can_see(monkeypatch, joined):
    """And not the one that has the number of its Slurm task, as jax would have it."""
    monkeypatch.setenv("SLURM_LOCALID", "0")
    hosts.initialize(Layout("127.0.0.1:5", 2, 0, "Slurm"))
    assert joined[0]["local_device_ids"] is None and joined[0]["cluster_detection_method"] == "deactivate"


def test_a_pod_waits_for_the_coordinators_name(monkeypatch, joined):
    tries = []

    def resolves(*_):
        tries.append(1)
        if len(tries) < 3:
            raise OSError("not yet")
        return [(2, 1, 6, "", ("10.0.0.1", 5))]

    monkeypatch.setattr(hosts.socket, "getaddrinfo", resolves)
    monkeypatch.setattr(hosts.time, "sleep", lambda _: None)
    hosts.initialize(Layout("run1-lm-0-0.run1:5", 2, 1, "an Indexed Job", patience_s=60))
    assert len(tries) == 3 and len(joined) == 1


def test_a_collectives_error_in_a_run_of_several_is_the_peers_failure(monkeypatch):
    gone = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:2991")
    ours = [ValueError("train.steps"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), RuntimeError("internal")]
    assert not hosts.is_peers_failure(gone)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert hosts.is_peers_failure(gone) and not any(map(hosts.is_peers_failure, ours))


def test_one_process_has_nobody_to_tell():
    hosts.post("note", "text")
    assert hosts.posted("note") == {}


def test_one_process_starts_nothing():
    hosts.initialize(Layout())
    assert hosts.is_main() and hosts.broadcast({"a": 1}) == {"a": 1} and not hosts.any_process(False)


def test_a_process_supplies_its_rows_of_the_global_batch():
    mesh = Mesh(fsdp=2, tensor=2).build()
    assert hosts.host_rows(mesh, 12) == (0, 12)
    rows = {"tokens_BL": np.arange(36).reshape(12, 3)}
    batch = hosts.global_array(rows, rules.batch_sharding(mesh))
    assert batch["tokens_BL"].shape == (12, 3) and np.array_equal(batch["tokens_BL"], rows["tokens_BL"])
    assert {s.data.shape for s in batch["tokens_BL"].addressable_shards} == {(3, 3)}


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    with pytest.raises(
        UsageError, match=r"train.batch_size=13 does not divide over mesh data=4 x fsdp=2: take 8 or 16"
    ):
        hosts.host_rows(Mesh(fsdp=2).build(), 13)


# What each process sees and agrees on, as one JSON line from process 0.
WORKER = """
import json, os, sys
import jax, numpy as np
from lm.parallel import hosts, layout, rules
from lm.parallel.mesh import Mesh
from lm.train.checkpoint import Checkpoints
from lm.train.digest import digests
hosts.initialize(layout.resolve(os.environ))
rank, folder, order = jax.process_index(), sys.argv[1], sys.argv[2]
mesh = Mesh().build()
for text in ("old", f"from {rank}"):
    hosts.post("note", text)
hosts.barrier("posted")
posted = hosts.posted("note")
first, count = hosts.host_rows(mesh, 8)
rows = np.arange(48, dtype=np.float32).reshape(8, 6)[first : first + count]
batch = hosts.global_array({"w": rows}, rules.batch_sharding(mesh))
events = []
checkpoints = Checkpoints(folder, report=lambda event, **fields: events.append([event, fields["step"]]))
if "save" in order:
    for step in (1, 2):
        checkpoints.save(step, {"params": batch}, {"by": jax.process_count()}, wait=True)
hosts.barrier("saved")
wanted = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)}
restored, meta, step = checkpoints.restore(wanted, quarantine=True)
said = {
    "rows": [first, count],
    "any": hosts.any_process(rank == jax.process_count() - 1),
    "none": hosts.any_process(False),
    "broadcast": hosts.broadcast({"from": rank}),
    "posted": posted,
    "digest": digests(batch)["w"],
    "restored": digests(restored["params"])["w"],
    "step": step,
    "by": meta["by"],
    "events": events,
    "total": float(batch["w"].sum()),
}
print("said " + json.dumps(said) + "\\n", end="", flush=True)  # One write even where stdout is unbuffered.
"""


def said(processes, folder, order=""):
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    if processes == 1:
        environ["JAX_NUM_CPU_DEVICES"] = "2"
    launcher = [sys.executable, str(ROOT / "launch" / "local.py"), "-n", str(processes), "--"]
    command = [*launcher, sys.executable, "-c", WORKER, str(folder), order]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    # Gloo's own lines may share one with ours.
    return [json.loads(line.split("said ", 1)[1]) for line in result.stdout.splitlines() if "said {" in line]


@pytest.mark.slow
def test_two_processes_agree_and_equal_one_with_two_devices(tmp_path):
    two = sorted(said(2, tmp_path / "two", "save"), key=lambda each: each["rows"])
    (one,) = said(1, tmp_path / "one", "save")
    assert [each["rows"] for each in two] == [[0, 4], [4, 4]] and one["rows"] == [0, 8]
    assert all(each["any"] and not each["none"] and each["broadcast"] == {"from": 0} for each in two)
    assert all(each["posted"] == {"0": "from 0", "1": "from 1"} for each in two) and one["posted"] == {}
    assert {each["digest"] for each in two} == {each["restored"] for each in two} == {one["digest"]}
    assert {each["total"] for each in two} == {one["total"]} == {48 * 47 / 2}
    # Either reads what the other saved; both pass over a damaged step together, and one of them renames it.
    (crossed,) = said(1, tmp_path / "two")
    assert (crossed["step"], crossed["by"], crossed["restored"]) == (2, 2, one["digest"])
    (tmp_path / "one" / "checkpoints" / "2" / "meta" / "metadata").write_text("{}")
    back = said(2, tmp_path / "one")
    assert [(each["step"], each["by"], each["restored"]) for each in back] == [(1, 1, one["digest"])] * 2
    assert sorted(each["events"] for each in back) == [[], [["quarantined", 2]]]
    assert jax.process_count() == 1


def test_an_error_of_one_process_ends_all_at_once():
    """Also behind a proxy that is not there, which the processes do not need to find each other."""
    code = (
        "import os, sys\nfrom lm.parallel import hosts, layout\nhosts.initialize(layout.resolve(os.environ))\n"
        "hosts.abandon(2) if hosts.is_main() else hosts.barrier('never')"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "http_proxy": "http://127.0.0.1:9"}
    launcher = [sys.executable, str(ROOT / "launch" / "local.py"), "-n", "2", "--", sys.executable, "-c", code]
    start = time.monotonic()
    assert subprocess.run(launcher, env=environ, capture_output=True, timeout=60).returncode == 2
    assert time.monotonic() - start < 25  # A plain exit takes the 30 s of a collective's time-out.


@pytest.mark.slow
def test_a_barrier_waits_longer_than_gloo_does():
    code = (
        "import os, time\nfrom lm.parallel import hosts, layout\nhosts.initialize(layout.resolve(os.environ))\n"
        "time.sleep(35 if hosts.is_main() else 0)\nhosts.barrier('late')\nassert hosts.broadcast(1) == 1"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    launcher = [sys.executable, str(ROOT / "launch" / "local.py"), "-n", "2", "--", sys.executable, "-c", code]
    assert subprocess.run(launcher, env=environ, capture_output=True, timeout=90).returncode == 0
