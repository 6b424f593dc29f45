"""A run goes on over another number of processes, on another mesh, with the same data."""

import shutil
import subprocess

import numpy as np
import pytest

from tests.main.helpers import ROOT, TINY, events, losses, start

# SGD leaves the rounding of gradients as small as it is; dropout of layers in stages is drawn otherwise.
SETTINGS = ("optimizer=SGD", "model.layers=2", "model.residual_dropout=0.0", "train.log_every=1")
TRAIN = ("train", f"--experiment={TINY}", *(f"--set={s}" for s in SETTINGS))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A finished run of one process and one device, with its checkpoints 20, 40 and 60."""
    workdir = tmp_path_factory.mktemp("alone")
    arguments = (*TRAIN, f"--workdir={workdir}", "--set=train.save_every=20", "--set=train.keep_last=3")
    assert start(*arguments, devices=1, stdout=subprocess.DEVNULL).wait(240) == 0
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("processes, preset", [(2, "pp"), (2, "fsdp"), (4, "fsdp_tp"), (4, "fsdp_cp")])
def test_losses_after_another_start_are_those_of_the_run_that_never_stopped(alone, tmp_path, processes, preset):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    for step in ("40", "60"):
        shutil.rmtree(folder / "checkpoints" / step)
    launcher = (ROOT / "launch" / "local.py", "-n", str(processes), "--")
    arguments = (*TRAIN, f"--workdir={folder}", f"--set=mesh.preset={preset}")
    assert start(*arguments, devices=1, launcher=launcher, stdout=subprocess.DEVNULL).wait(400) == 0
    assert [row["step"] for row in events(folder, "start")] == [0, 20]
    ours, theirs = losses(folder), losses(alone)
    assert sorted(ours) == list(range(1, 61)) and ours[21] != ours[20]
    # The batches are the same to the last row, so that only the order of sums differs.
    np.testing.assert_allclose([ours[i] for i in range(21, 61)], [theirs[i] for i in range(21, 61)], rtol=1e-5)
