"""Hardware by name: what there is, and what is said of what there is not."""

import pytest

from lm.core.errors import UsageError
from lm.parallel import chips
from lm.plan import hardware


@pytest.mark.parametrize(
    "name,count,devices",
    [
        ("v5p:8x8x8", 512, 512),
        ("tpu7x:4x4x4", 64, 128),
        ("v6e:16x16*2", 512, 512),
        ("h100:64", 64, 64),
        ("cpu:8", 8, 8),
    ],
)
def test_a_name_says_how_many_there_are(name, count, devices):
    found = hardware.parse(name)
    assert (found.chips, found.devices) == (count, devices)


@pytest.mark.parametrize(
    "name,words",
    [
        ("v5p:3x4x4", "no topology 3x4x4.*multiples of 4"),
        ("v5e:4x4x4", "16x16"),
        ("v6e:16x32", "no topology"),
        ("v5p:8x4x4", "rising"),
        ("h100:12", "take 8 or 16"),
        ("h100:2x4", "takes a number"),
        ("cpu:8*2", "takes a number"),
        ("v5p", "KIND:SHAPE"),
        ("v5p:0x4x4", "KIND:SHAPE"),
        ("h10:8", "h100"),
    ],
)
def test_what_there_is_none_of_is_refused_with_what_there_is(name, words):
    with pytest.raises(UsageError, match=words):
        hardware.parse(name)


@pytest.mark.parametrize(
    "kind,name",
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x"),
     ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200")],
)  # fmt: skip
def test_a_device_is_known_by_its_kind(kind, name):
    device = type("Device", (), {"device_kind": kind})()
    assert chips.of_device(device) == chips.CHIPS[name]


def test_a_cpu_is_no_chip():
    assert chips.of_device(type("Device", (), {"device_kind": "cpu"})()) is None
