"""Ledgers whose seconds are known by hand: every one is of one class, and none is counted twice."""

import datetime

import pytest

from lm.report import goodput

BEGIN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def at(second):
    return (BEGIN + datetime.timedelta(seconds=second)).isoformat()


def row(second, event, step, spent=None, **fields):
    sums = {} if spent is None else {"spent": {f"{name}_s": float(spent.get(name, 0)) for name in goodput.CLASSES}}
    return {"time": at(second), "event": event, "step": step, **fields, **sums}


def start(second, step, spent, seen=None):
    return row(second, "start", step, spent, seen=seen and at(seen))


def spent(start, compile, data, step, evaluate, checkpoint):
    return dict(zip(goodput.CLASSES, (start, compile, data, step, evaluate, checkpoint), strict=False))


TWICE_KILLED = [
    # From 0 to about 65: step 10 is saved, step 20 is begun to be.
    start(10, 0, {"start": 8, "compile": 2}),
    row(20, "time", 1, spent(9, 10, 0, 1, 0, 0)),
    row(40, "time", 10, spent(9, 10, 2, 16, 0, 3)),
    row(41, "saved", 10),
    row(60, "time", 20, spent(9, 11, 4, 28, 4, 4)),
    # From 100 to about 118: nothing is saved.
    row(101, "lock_taken_over", None),
    start(110, 10, {"start": 10}, seen=65),
    row(115, "time", 11, spent(11, 3, 0, 1, 0, 0)),
    # From 130 to the end.
    row(131, "lock_taken_over", None),
    start(135, 10, {"start": 5}, seen=118),
    row(140, "time", 11, spent(5, 4, 0, 1, 0, 0)),
    row(160, "time", 20, spent(5, 4, 1, 17, 0, 3)),
    row(161, "stop", 20, spent(5, 4, 1, 17, 0, 4)),
]


def test_two_kills_by_hand():
    found = goodput.classes(TWICE_KILLED)
    kept = {"step": 16 + 17, "data": 2 + 1, "evaluate": 0, "checkpoint": 3 + 4, "other": 0}
    lost = (2 + 12 + 4 + 1 + 5) + (1 + 3)
    assert found == kept | {"start": 9 + 11 + 5, "compile": 11 + 3 + 4, "lost": lost, "down": 35 + 12}
    assert sum(found.values()) == 161 and goodput.share(found) == 33 / 161


def test_a_start_that_finds_nothing_to_do_takes_no_time():
    assert goodput.classes([*TWICE_KILLED, start(9999, 20, {"start": 3})]) == goodput.classes(TWICE_KILLED)


def test_a_start_that_is_killed_before_its_first_step_has_lost_none():
    first, *_ = TWICE_KILLED
    found = goodput.classes([first, start(40, 0, {"start": 10}, seen=13), row(50, "time", 1, spent(12, 3, 0, 5, 0, 0))])
    assert (found["start"], found["lost"], found["down"], found["step"]) == (8 + 3 + 12, 0, 30 - 13, 5)
    assert sum(found.values()) == 50


def test_work_after_a_checkpoint_that_turned_out_damaged_is_lost():
    again = [start(180, 9, {"start": 10}), row(200, "time", 10, spent(10, 0, 0, 20, 0, 0))]
    found = goodput.classes([*TWICE_KILLED, *again])
    assert found["step"] == 1 + 20 and found["lost"] == (27 + 4 + 4 + 4 + 5) + 4 + 22
    assert sum(found.values()) == 200


def test_a_run_that_saved_and_stopped_loses_nothing():
    again = [start(210, 20, {"start": 10}, seen=160), row(220, "time", 21, spent(15, 0, 0, 5, 0, 0))]
    before, found = goodput.classes(TWICE_KILLED), goodput.classes([*TWICE_KILLED, *again])
    assert found == before | {"start": 25 + 15, "step": 33 + 5, "down": before["down"] + 200 - 161}


def test_what_follows_the_last_sums_of_a_run_that_goes_on_is_other():
    found = goodput.classes([*TWICE_KILLED[:5], row(70, "saved", 20)])
    assert (found["other"], found["lost"], found["step"]) == (10, 0, 28) and sum(found.values()) == 70


@pytest.mark.parametrize("ledger", [[], TWICE_KILLED[:1], [row(1, "start", 0), *TWICE_KILLED]])
def test_a_ledger_without_sums_says_nothing(ledger):
    assert goodput.classes(ledger) == {}


def test_the_table_and_the_bar_name_every_class():
    found = goodput.classes(TWICE_KILLED)
    table, picture = goodput.to_markdown(found), goodput.draw(found)
    assert "| step | 33.0 | 20.5% |" in table and "| all | 161.0 | |" in table
    assert all(f"| {name} |" in table and f"<!-- {name} " in picture for name in found)
