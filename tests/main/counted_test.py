"""Counted models through the verbs."""

import json
import shutil

import numpy as np
import pytest

import lm
from lm.train import counted
from tests.main.helpers import TINY, call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("counted") / "run"
    assert call("train", f"--experiment={TINY}:counted", f"--workdir={workdir}") == 0
    return workdir


def test_a_counted_run_has_the_figures_that_its_tables_give(trained, capsys):
    model, tables = lm.load(trained)
    from lm.data.corpus import Corpus

    split = Corpus(trained / "corpus").split("validation")
    loss = -model.score(tables, split.window(0, split.tokens)).mean()
    row = json.loads((trained / "row.json").read_text())
    assert row["loss"] == pytest.approx(loss) and row["N"] == sum(model.counts(tables).values())
    assert call("evaluate", f"--checkpoint={trained}", f"--corpus={trained / 'corpus'}") == 0
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert float(printed["loss"]) == pytest.approx(loss, abs=1e-6)


def test_the_same_command_counts_nothing_again(trained, capsys):
    before = {f: f.stat().st_mtime_ns for f in (trained / "checkpoints").rglob("*.npy")}
    assert call("train", f"--experiment={TINY}:counted", f"--workdir={trained}") == 0
    assert before == {f: f.stat().st_mtime_ns for f in (trained / "checkpoints").rglob("*.npy")}


def test_a_run_of_other_settings_is_refused(trained, capsys):
    assert call("train", f"--experiment={TINY}:counted", f"--workdir={trained}", "--set=model.order=2") == 2
    assert "model.order was 3, is 2" in capsys.readouterr().err


def test_a_changed_table_is_noticed(trained, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    table = copy / "checkpoints" / str(counted.STEP) / "tables" / "log_p_2.npy"
    content = bytearray(table.read_bytes())
    content[-3] ^= 1
    table.write_bytes(content)
    assert call("evaluate", f"--checkpoint={copy}", f"--corpus={copy / 'corpus'}") == 2
    assert "log_p_2.npy is not as it was saved" in capsys.readouterr().err


def test_what_is_left_of_a_fit_that_was_killed_is_counted_anew(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    step = copy / "checkpoints" / str(counted.STEP)
    step.rename(step.with_name("1.partial"))
    assert call("train", f"--experiment={TINY}:counted", f"--workdir={copy}") == 0
    assert not step.with_name("1.partial").exists()
    (_, tables), (_, again) = lm.load(trained), lm.load(copy)
    assert all(np.array_equal(tables[name], again[name]) for name in tables)


def test_it_writes_what_it_has_counted(trained, capsys):
    prompt = lm.load_tokenizer(trained).decode([0])
    command = f"--checkpoint={trained}", f"--prompt={prompt}", "--tokens=20", "--temperature=0"
    assert call("generate", *command) == 0
    first = capsys.readouterr().out
    assert call("generate", *command) == 0
    assert capsys.readouterr().out == first and len(first.strip()) == 21


def test_nothing_is_planned_for_it(capsys):
    assert call("plan", f"--experiment={TINY}:counted", "--hardware=cpu:8") == 2
    assert "counts and takes no step" in capsys.readouterr().err


def test_weights_to_start_from_are_refused(trained, capsys):
    assert call("train", f"--experiment={TINY}:counted", f"--workdir={trained}", f"--init_from={trained}") == 2
    assert "--init_from has no effect" in capsys.readouterr().err
