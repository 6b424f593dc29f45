"""Every second of a process is of one class, and what jax compiles is told apart."""

import os
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring

from lm.train import ledger, lock, metrics, times
from lm.train.ledger import Ledger
from lm.train.lock import RunLock
from lm.train.times import Times, last_sign, process_start


@pytest.fixture
def clock(monkeypatch):
    """A list of one instant, which is now."""
    now = [100.0]
    monkeypatch.setattr(times.time, "monotonic", lambda: now[0])
    return now


def test_every_second_is_of_one_class(tmp_path, clock):
    spent = Times(Ledger(tmp_path), 90.0)
    assert spent.counted_from == "process" and Times(Ledger(tmp_path)).counted_from == "call"
    spent.enter("step")
    clock[0] += 5
    spent.move("data", 2)
    with spent.within("checkpoint"):
        clock[0] += 3
        with pytest.raises(OSError), spent.within("other"):
            clock[0] += 1
            raise OSError
    clock[0] += 1
    spent.write("time", step=7)
    (row,) = Ledger(tmp_path).rows()
    expected = {"start": 10, "step": 4, "data": 2, "checkpoint": 3, "other": 1, "compile": 0, "evaluate": 0}
    assert row["event"] == "time" and row["step"] == 7
    assert row["spent"] == {f"{name}_s": seconds for name, seconds in expected.items()}


def test_spans_of_compiling_count_once_and_of_this_thread_alone(tmp_path, clock):
    event = "/jax/core/compile/jaxpr_trace_duration"
    with Times(Ledger(tmp_path)) as spent:
        clock[0] += 20
        for name, begin, end in ((event, 1, 2), (event, 3, 4), (event, 2.5, 6), (event, 6, 7), ("/jax/other", 8, 9)):
            monitoring.record_event_time_span(name, begin, end)
        thread = threading.Thread(target=monitoring.record_event_time_span, args=(event, 10, 11))
        thread.start()
        thread.join()
    monitoring.record_event_time_span(event, 12, 13)
    found = spent.spent()
    assert (found["compile"], found["start"]) == (1 + 3.5 + 1, 14.5)


def test_what_jax_compiles_is_no_step(tmp_path):
    begin = time.monotonic()
    with Times(Ledger(tmp_path)) as spent:
        spent.enter("step")
        f = jax.jit(lambda x: jnp.sin(x @ x.T) + jax.jit(jnp.cos)(x))
        f(jnp.ones((3, 3)))
        once = spent.spent()
        f(jnp.ones((3, 3)))
    assert 0.005 < once["compile"] <= time.monotonic() - begin and once["step"] >= 0
    assert spent.spent()["compile"] == once["compile"]


def test_a_process_knows_when_it_started():
    began = process_start()
    if began is None:
        pytest.skip("this system does not say")
    assert time.process_time() / (os.cpu_count() or 1) - 0.02 < time.monotonic() - began < 24 * 3600


def test_the_last_sign_of_a_start_is_in_its_own_files_unless_they_are_copies(tmp_path):
    held = RunLock(tmp_path).acquire()
    assert last_sign(tmp_path) is None
    Ledger(tmp_path).write("start", step=0, lock=held.id)
    (tmp_path / metrics.NAME).touch()
    os.utime(tmp_path / metrics.NAME, (1.25, 1.25))
    os.utime(tmp_path / lock.NAME, (3.5, 3.5))
    assert last_sign(tmp_path) == "1970-01-01T00:00:03.500+00:00"
    held.release()
    with RunLock(tmp_path):
        assert last_sign(tmp_path) == "1970-01-01T00:00:01.250+00:00"
    os.utime(tmp_path / ledger.NAME, (2.0, 2.0))
    assert last_sign(tmp_path) is None
