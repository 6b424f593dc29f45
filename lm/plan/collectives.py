"""The collectives of a compiled program: how often each runs, over which mesh axes, and the bytes that it moves."""

import collections
import dataclasses
import math
import re

import jax
import numpy as np

# Bytes that leave a device in a ring of n, over the bytes of the larger side: the result of a gather, what goes into a
# scatter or a reduction. An all-reduce is a scatter and a gather; fused with the slice that keeps a device's own part,
# as TPUs have it, a scatter alone.
_SHARE = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(_SHARE)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=(\(\S+\)))? \{([^}]*)\}")
# The channel of what a program asks for by itself, such as a permutation between stages; the partitioner's have others.
_ASKED = "channel_id=1"
_TRIPS = re.compile(r'known_trip_count[\\":{ ]+n[\\": ]+(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind over one set of mesh axes: how many run in a step, and the bytes that leave each device."""

    kind: str
    axes: tuple[str, ...]
    count: int
    sent_bytes: float


def read(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """All of a program's, loops' bodies as often as they run; those that move the most come first."""
    bodies, entry = _computations(text)
    runs = collections.Counter[str]()
    for line, times in _executed(bodies, entry, 1):
        if _INSTRUCTION.search(line):
            runs[line] += times
    # TPUs fuse one collective with several products, a piece of it in each: they share its channel.
    once: dict[str, str] = {}
    for line in runs:
        name = line if _channel(line) in ("", _ASKED) else _channel(line)
        once[name] = max(once.get(name, line), line, key=runs.__getitem__)
    totals: dict[tuple[str, tuple[str, ...]], list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for line in once.values():
        kind, groups, moved = _moved(line, mesh.size)
        if groups is not None:
            total = totals[kind, _axes(groups, mesh)]
            total[0] += runs[line]
            total[1] += runs[line] * moved
    found = [Collective(kind, axes, int(count), sent) for (kind, axes), (count, sent) in totals.items()]
    return sorted(found, key=lambda c: -c.sent_bytes)


def _moved(line, devices):
    """(kind, the groups that meet, bytes that leave a device each time); no groups where nobody meets another."""
    match = _INSTRUCTION.search(line)
    assert match is not None  # Only such lines come here.
    kind, groups = match[2], _groups(line, devices)
    size = len(groups[0]) if kind != "collective-permute" else 2
    if size < 2:
        return kind, None, 0.0
    moved: float = sum(_size(*shape) for shape in _SHAPE.findall(match[1]))
    if match[3] and kind in ("all-gather", "reduce-scatter"):
        # A start returns its operands beside its results, and one side is n times the other.
        moved *= size / (size + 1)
    elif match[3] and kind == "collective-permute":
        moved /= 2
    elif kind == "reduce-scatter":
        moved *= size
    return kind, groups, moved * _SHARE[kind](size)


def largest_buffer(text: str) -> float:
    """Bytes of the largest array of any instruction."""
    return max((_size(*shape) for shape in _SHAPE.findall(text)), default=0.0)


def _computations(text):
    """({name: lines}, the entry's name)."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and "->" in line:
            name = line.removeprefix("ENTRY ").partition(" ")[0].removeprefix("%")
            lines = bodies[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif lines is not None and line.startswith(" "):
            lines.append(line)
    return bodies, entry


def _executed(bodies, name, times):
    """(line, how often it runs) of a computation and of all that it calls."""
    for line in bodies.get(name, ()):
        yield line, times
        inner = times * _trips(bodies, line) if " while(" in line else times
        for called in _CALLED.findall(line):
            for callee in re.findall(r"%([\w.\-]+)", called):
                fused = callee.startswith("all-reduce-scatter")
                # TPUs may start a collective in one fusion, go on in others, and end it in a last one.
                later = callee.startswith("async_collective_fusion") or "%async-collective-done" in line[:40]
                for own, n in _executed(bodies, callee, inner):
                    if not (later and _channel(own) == _ASKED):
                        yield (own.replace(" all-reduce(", " all-reduce-scatter(") if fused else own), n


def _channel(line):
    found = re.search(r"channel_id=\d+", line)
    return found[0] if found else ""


def _trips(bodies, line):
    """How often a loop runs: as it says, or the bound that its condition compares with."""
    if said := _TRIPS.search(line):
        return int(said[1])
    condition = line.partition("condition=%")[2].partition(",")[0]
    bounds = [int(n) for inner in bodies.get(condition, ()) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", inner)]
    if not bounds:
        body = line.partition("body=%")[2].partition(",")[0]
        # A kernel's own loop, on one device.
        if not any(_INSTRUCTION.search(inner) for inner, _ in _executed(bodies, body, 1)):
            return 1
        raise ValueError(f"nothing says how often this loop runs: {line.strip()[:200]}")
    return max(bounds)


def _size(kind, dims):
    width = _BYTES.get(kind, 1 if kind.startswith("f8") else 4)
    return float(width * math.prod(int(d) for d in dims.split(",") if d))


def _groups(line, devices):
    """Lists of the devices that meet, by their place in the mesh's order."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [list(map(int, pair.split(","))) for pair in re.findall(r"\{?(\d+,\d+)\}?", pairs[1])]
    if explicit := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return [list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", explicit[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, source = (list(map(int, part.split(","))) for part in (iota[1], iota[2]))
        order = list(map(int, iota[3].split(","))) if iota[3] else list(range(len(source)))
        return np.arange(math.prod(source)).reshape(source).transpose(order).reshape(shape).tolist()
    if named := _NAMED.search(line):
        return _along(named[1], named[2], named[3])
    if "replica_groups" not in line or "replica_groups={}" in line:
        return [list(range(devices))]
    raise ValueError(f"no such form of groups is known: {line.strip()[:300]}")


def _along(axes, order, met):
    """The groups of mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b','a':(1)2}: along axes, or along a part of one."""
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if order:
        shape, _, transposed = order.strip("()[").partition("]")
        shape = list(map(int, shape.split(",")))
        transposed = re.findall(r"\d+", transposed)
        ids = ids.reshape(shape).transpose(*map(int, transposed)) if transposed else np.array(shape)
    parts: dict[str, int] = {}
    dims: list[int] = []
    for name, n in sizes.items():
        split = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", met)
        before, size = (int(split[1]), int(split[2])) if split and split[2] else (1, n)
        if split:
            parts[name] = len(dims) + 1
        dims += [before, size, n // before // size]
    ids = np.moveaxis(ids.reshape(dims), list(parts.values()), range(-len(parts), 0))
    return ids.reshape(-1, math.prod(ids.shape[-len(parts) :])).tolist()


def _axes(groups, mesh):
    """The mesh axes along which the members of any group differ."""
    places = np.stack(np.unravel_index(np.array(groups), mesh.devices.shape), -1)  # [groups, members, axes]
    differ = (places != places[:, :1]).any((0, 1))
    return tuple(a for a, apart in zip(mesh.axis_names, differ, strict=True) if apart)
