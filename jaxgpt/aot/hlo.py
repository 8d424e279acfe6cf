"""What a compiled program's text says: its collectives, how often they run and along which mesh axes, and its buffers.

The text is XLA's, as `compiled.as_text()` gives it, after optimization.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ACROSS = "send"
"""The kind of what goes from one slice of a TPU to another, through their hosts."""
BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s4": 1, "u4": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\(")
_CALLED = re.compile(r"(body|condition|calls|to_apply|branch_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)")
_VIEWS = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant", "conditional", "call")
"""Instructions whose results are buffers of others."""


class Collective(NamedTuple):
    """One kind of exchange along mesh axes, of a whole run of the program."""

    kind: str
    axes: tuple[str, ...]
    """Those along which devices exchange; ("?",) where the text does not say it in a form known here."""
    count: int
    """How often, loops included."""
    bytes: int
    """Of the larger of operand and result, a device, in all."""


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name; that of the program itself is "ENTRY"."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = found.setdefault("ENTRY" if line.startswith("ENTRY") else head[1], [])
        elif line.rstrip() == "}":
            lines = []
        else:
            lines.append(line)
    return found


def runs(found: Mapping[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in one run of the program.

    A loop's count is the number that its condition compares with; 1 where there is none.
    """
    times: dict[str, int] = {}

    def walk(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for line in found.get(name, ()):
            called = {
                role: [one.strip().lstrip("%") for one in names.split(",")] for role, names in _CALLED.findall(line)
            }
            trips = _trips(line, found.get(called["condition"][0], []), found) if "condition" in called else 1
            for role, names in called.items():
                for other in names:
                    walk(other, count * (trips if role == "body" else 1))

    walk("ENTRY", 1)
    return times


def _trips(line: str, condition: list[str], found: Mapping[str, list[str]]) -> int:
    if known := re.search(r'known_trip_count":?\s*\{"?n"?:"?(\d+)', line):
        return int(known[1])
    lines = [*condition, *(inner for name in _all_called(condition) for inner in found.get(name, ()))]
    numbers = [int(n) for one in lines for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", one)]
    return max(numbers, default=1)


def _all_called(lines: list[str]) -> list[str]:
    return [one.strip().lstrip("%") for line in lines for _, names in _CALLED.findall(line) for one in names.split(",")]


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The program's exchanges by kind and axes, largest first.

    One that is spread over several computations so that others go on meanwhile counts once: they share a channel.
    mesh: the sizes of the axes, in the mesh's order.
    """
    found = computations(text)
    times, seen = runs(found), {}
    for name, lines in found.items():
        for line in lines:
            match = _INSTRUCTION.match(line)
            kind = None if match is None else match[3].removesuffix("-start")
            across = kind == ACROSS and "megascale" in line
            if match is None or not (kind in KINDS or across) or not times.get(name):
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            shape = re.sub(r"^%", "", match[2])
            size = max(_sizes(shape), default=0) if match[3].endswith("-start") else sum(_sizes(shape))
            if kind == "reduce-scatter":
                size *= _group_size(line, mesh)
            key = (channel[1] if channel else match[1], shape)
            old = seen.get(key)
            count = max(times[name], old[2] if old else 0)
            seen[key] = (kind, ("data",) if across else _axes(line, mesh), count, size)
    totals: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for kind, axes, count, size in seen.values():
        total = totals.setdefault((kind, axes), [0, 0])
        total[0] += count
        total[1] += count * size
    parts = [Collective(kind, axes, count, size) for (kind, axes), (count, size) in totals.items() if axes]
    return sorted(parts, key=lambda part: -part.bytes)


def largest(text: str) -> list[tuple[int, str]]:
    """(bytes, shape) of the largest buffers that the program makes for itself, each shape once, largest first.

    Results of instructions inside fusions are none: they are never stored.
    """
    found, sizes = computations(text), {}
    fused = {name for lines in found.values() for line in lines if " fusion(" in line for name in _all_called([line])}
    for name, lines in found.items():
        if name in fused:
            continue
        for line in lines:
            match = _INSTRUCTION.match(line)
            if match is None or match[3].removesuffix("-done") in _VIEWS:
                continue
            for dtype, dims in _SHAPE.findall(match[2]):
                if dtype in BYTES:
                    sizes[f"{dtype}[{dims}]"] = BYTES[dtype] * math.prod(map(int, filter(None, dims.split(","))))
    return sorted(((size, shape) for shape, size in sizes.items()), reverse=True)


def _sizes(shape: str) -> list[int]:
    return [
        BYTES[dtype] * math.prod(map(int, filter(None, dims.split(","))))
        for dtype, dims in _SHAPE.findall(shape)
        if dtype in BYTES
    ]


def _group(line: str) -> list[int] | None:
    """The first group of devices that exchange."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(n) for n in match[1].split(",")]
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return [int(match[1]), int(match[2])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        groups, dims, order = ([int(n) for n in part.split(",")] if part else None for part in match.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids if order is None else ids.transpose(order)
        return ids.reshape(groups)[0].tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\[([^\]]*)\])? ?\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        along = re.findall(r"'(\w+)'", match[3])
        if match[2] or not set(along) <= set(sizes):
            return None
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        at = tuple(slice(None) if name in along else 0 for name in sizes)
        return np.ravel(ids[at]).tolist()
    return None


def _group_size(line: str, mesh: Mapping[str, int]) -> int:
    return len(_group(line) or range(math.prod(mesh.values())))


def _axes(line: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the first group differs: none for a group of one."""
    group = _group(line)
    if group is None:
        return ("?",)
    at = np.array(np.unravel_index(group, tuple(mesh.values())))
    return tuple(itertools.compress(mesh, (at != at[:, :1]).any(axis=1)))
