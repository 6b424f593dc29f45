"""Every event is one whole line, also after a writer that died in the middle of one."""

from lm.train.ledger import NAME, Ledger


def test_rows_keep_their_order_and_a_start_says_what_ran(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.write("start", step=0)
    ledger.write("saved", step=10)
    start, saved = Ledger(tmp_path).rows()
    assert start["event"] == "start" and start["pid"] and "jax" in start["versions"]
    assert (saved["event"], saved["step"]) == ("saved", 10) and saved["time"] >= start["time"]


def test_a_torn_line_costs_itself_alone(tmp_path):
    Ledger(tmp_path).write("saved", step=1)
    with open(tmp_path / NAME, "a") as f:
        f.write('{"time": "2026-01-01T00:00')
    assert len(Ledger(tmp_path).rows()) == 1
    Ledger(tmp_path).write("saved", step=2)
    assert [row["step"] for row in Ledger(tmp_path).rows()] == [1, 2]


def test_other_processes_write_nothing(tmp_path):
    Ledger(tmp_path, writes=False).write("start")
    assert not (tmp_path / NAME).exists()


def test_the_starts_of_a_launch_are_counted_from_a_step_on(tmp_path):
    ledger = Ledger(tmp_path)
    for launch, step in (("a", 0), ("a", 10), ("b", 10), ("a", 10), (None, 10)):
        ledger.write("start", step=step, launch=launch)
        ledger.write("hung", step=step)
    assert [ledger.starts("a", step) for step in (0, 10, 20)] == [3, 2, 0]
    assert ledger.starts("b", 10) == 1
