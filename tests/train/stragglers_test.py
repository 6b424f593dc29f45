"""The process that keeps the others waiting is named, and nobody is where nobody does."""

import json
import time

import jax
import pytest

from lm.train import stragglers
from lm.train.ledger import Ledger
from lm.train.stragglers import Stragglers, straggler


def figures(*data_ms, step_ms=100.0):
    return {i: {"step": 20, "host": f"h{i}", "step_s": step_ms / 1e3, "data_s": d / 1e3} for i, d in enumerate(data_ms)}


@pytest.mark.parametrize(
    ("data_ms", "slow"),
    [
        ((1, 1, 50, 1), 2),
        ((1, 50), 1),
        ((50, 1), 0),
        ((1, 1, 9, 1), None),  # Nine times the others, but under a tenth of the step.
        ((40, 42, 44, 50), None),  # All wait alike: the data is slow, not a process.
        ((20, 20, 31, 20), 2),
        ((50,), None),
        ((), None),
    ],
)
def test_who_is_slow(data_ms, slow):
    assert straggler(figures(*data_ms)) == slow


@pytest.fixture
def board(monkeypatch):
    """Three processes, of which this one is the first."""
    notes = {}
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(stragglers.hosts, "post", lambda name, text: notes.update({0: text}))
    monkeypatch.setattr(stragglers.hosts, "posted", lambda name: notes)
    return notes


def test_the_slowest_is_named_once_and_written_down(tmp_path, board):
    said, ledger = [], Ledger(tmp_path)
    watched = Stragglers(5, ledger, said.append)
    batches = iter(range(100))
    for step in range(1, 21):
        assert watched.next(batches) == step - 1
        time.sleep(0.002)
        for process, data_s in ((1, 0.3), (2, 0.001)):
            note = {"step": step - 1, "host": f"h{process}", "step_s": 0.4, "data_s": data_s}
            board[process] = json.dumps(note)
        watched.step(step)
    own = json.loads(board[0])
    assert own["step"] == 20 and 0 <= own["data_s"] < 0.002 <= own["step_s"] < 0.1
    (row,) = ledger.rows()
    assert (row["event"], row["step"], row["process"]) == ("straggler", 5, 1) and set(row["slowest"]) == {"0", "1", "2"}
    (table,) = said
    assert table.splitlines()[0].startswith("process 1 on h1 is slow")
    assert table.splitlines()[2].split() == ["1", "400.0", "300.0", "h1"] and len(table.splitlines()) == 5


def test_figures_of_long_ago_do_not_count(tmp_path, board):
    said = []
    watched = Stragglers(2, Ledger(tmp_path), said.append)
    board[1] = json.dumps({"step": 2, "host": "h1", "step_s": 0.4, "data_s": 0.3})
    batches = iter(range(100))
    for step in range(9, 13):
        watched.next(batches)
        watched.step(step)
    assert not said


def test_one_process_tells_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(stragglers.hosts, "post", lambda *_: pytest.fail("told"))
    watched = Stragglers(1, Ledger(tmp_path), print)
    for step in range(1, 4):
        watched.next(iter([1]))
        watched.step(step)
