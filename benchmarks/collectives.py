"""The collectives of a compiled program, read from its text: what the devices exchange in a step."""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind between as many chips, taken together.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter, all-to-all, ragged-all-to-all or collective-permute.
      dtype: of what is exchanged: u8, bf16, f32 ...
      devices: that exchange it with each other.
      count: how many a step.
      bytes: in all; of each the whole array: gathered, reduced, before it is scattered, all parts of an exchange.
      largest: shape of the largest array.
    """

    kind: str
    dtype: str
    devices: int
    count: int
    bytes: int
    largest: tuple[int, ...]


_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf" = (.+?) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


def read(hlo: str, devices: int) -> list[Collective]:
    """Returns the collectives of a compiled program, the most bytes first.

    The compiler spreads one over several fusions to do other work meanwhile, each with a copy of its line; those share
    a channel and are one.

    Args:
      hlo: its text.
      devices: that it runs on.
    """
    groups: dict[tuple[str, str, int], dict[str, list[tuple[str, tuple[int, ...], float]]]] = {}
    for number, line in enumerate(hlo.splitlines()):
        found = _COLLECTIVE.search(line)
        if not found:
            continue
        shapes, kind, started = found.groups()
        arrays = [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(shapes)]
        size = _group_size(line, devices)
        # The start of an asynchronous one returns what goes in next to what comes out.
        share = 1.0
        if started and kind == "all-gather":
            share = size / (size + 1)
        elif started and kind == "collective-permute":
            share = 0.5
        elif kind == "reduce-scatter":
            share = size / (size + 1) if started else float(size)
        elif kind.endswith("all-to-all"):
            share = size / 2 if started else float(size)
        channel = re.search(r"channel_id=(\d+)", line)
        sized = [(dtype, shape, share * math.prod(shape) * _width(dtype)) for dtype, shape in arrays]
        dtype = max(sized, key=lambda array: array[2])[0]
        groups.setdefault((kind, dtype, size), {})[channel[1] if channel else f"line {number}"] = sized
    made = []
    for (kind, dtype, size), channels in groups.items():
        sized = [array for arrays in channels.values() for array in arrays]
        total = round(sum(array[2] for array in sized))
        largest = max(sized, key=lambda array: array[2])[1]
        made.append(Collective(kind, dtype, size, len(channels), total, largest))
    return sorted(made, key=lambda one: -one.bytes)


def _width(dtype: str) -> float:
    """Bytes of an element."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) / 8 if digits else 1


def _group_size(line: str, devices: int) -> int:
    """How many devices take part in one collective with each other."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return devices
