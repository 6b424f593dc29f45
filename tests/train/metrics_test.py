"""metrics.jsonl is a function of the run, not of its interruptions."""

import json

import matplotlib.image
from tensorboardX.proto.event_pb2 import Event

from lm.train import metrics
from lm.train.metrics import Metrics


def events(folder):
    """(step, value) of each TensorBoard event, read by the length prefixes of its record format."""
    found = []
    for name in sorted(folder.glob("events.*")):
        data, at = name.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 12 + size + 4
    return found


def test_rows_of_lost_work_are_dropped_on_resume(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
    first = Metrics(straight)
    for step in range(1, 7):
        first.write(step, loss=1.0 / step)
    lost = Metrics(broken)
    for step in range(1, 6):
        lost.write(step, loss=1.0 / step)
    with open(broken / metrics.NAME, "a") as f:
        f.write('{"step": 6, "lo')
    resumed = Metrics(broken, step=3)
    for step in range(4, 7):
        resumed.write(step, loss=1.0 / step)
    assert (straight / metrics.NAME).read_bytes() == (broken / metrics.NAME).read_bytes()


def test_what_is_not_finite_is_null_and_every_row_is_json(tmp_path):
    writer = Metrics(tmp_path)
    writer.write(1, loss=float("nan"), grad_norm=float("inf"), learning_rate=0.5)
    row = json.loads((tmp_path / metrics.NAME).read_text(), parse_constant=lambda name: 1 / 0)
    assert row == {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 0.5}


def test_tensorboard_gets_the_same_numbers(tmp_path):
    writer = Metrics(tmp_path)
    writer.write(1, loss=2.0)
    writer.write(2, loss=1.5)
    writer.close()
    assert events(tmp_path) == [(1, "loss", 2.0), (2, "loss", 1.5)]


def test_the_picture_takes_few_rows_and_many(tmp_path):
    assert metrics.plot(tmp_path) is None
    writer = Metrics(tmp_path)
    writer.write(1, loss=5.0, learning_rate=1e-3)
    assert matplotlib.image.imread(metrics.plot(tmp_path)).shape[1] > 600
    for step in range(2, 200):
        writer.write(step, loss=5.0 / step, learning_rate=1e-3)
        if step % 50 == 0:
            writer.write(step, val_loss=6.0 / step)
    assert metrics.plot(tmp_path) == str(tmp_path / "loss.png")
