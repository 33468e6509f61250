"""Reads a program in XLA's text form (HLO): its instructions, their operands and results, and their source code.

    program = programs.parse(compiled.as_text())

The text is the only complete description of a program that was compiled for an absent GPU: XLA's own counts are missing
there. On a TPU they are not memory traffic, since they include operands that never leave the chip.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping


@dataclasses.dataclass(frozen=True)
class Array:
    """An array as the program holds it.

    Attributes:
      dtype: u8, bf16, f32 ...
      shape: sizes of its dimensions.
      layout: dimensions from the fastest-varying to the slowest; () if the text gives none.
      tile: sizes to which the fastest-varying dimensions are padded, the fastest last; () if they are not.
      space: number of the memory space; 0 is the device's large memory (HBM), others are on the chip.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes in memory, padding included."""
        sizes = [self.shape[dim] for dim in self.layout] or list(reversed(self.shape))  # from the fastest on
        for place, unit in enumerate(reversed(self.tile[-len(sizes) :] if sizes else ())):
            sizes[place] = -(-sizes[place] // unit) * unit
        return math.prod(sizes) * width(self.dtype)


def width(dtype: str) -> float:
    """Returns the bytes of an element: 4 for f32, 1 for pred; 0 for a token."""
    if dtype in ("token", "opaque"):
        return 0
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) / 8 if digits else 1


@dataclasses.dataclass(frozen=True)
class Frame:
    """A call on the way to an operation: the file's path and the function's qualified name."""

    file: str
    function: str


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program.

    Attributes:
      name: unique in its computation.
      opcode: fusion, custom-call, dot, parameter ...
      results: arrays that it writes; those of a tuple in order, nested ones flattened.
      operands: names of the instructions whose results it reads.
      attributes: rest of the line.
      op_name: JAX's path to the operation, such as `jit(step)/transpose(jvp())/dot_general`; "" if unknown.
      frames: calls that led to the operation, the innermost first; () if unknown.
      root: whether its result is the computation's.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    op_name: str = ""
    frames: tuple[Frame, ...] = ()
    root: bool = False

    def called(self) -> tuple[str, ...]:
        """Returns the names of the computations that it runs, without those it applies to single elements."""
        if self.opcode in _ELEMENTWISE_CALLERS:
            return ()
        found = _CALLED.findall(self.attributes)
        if branches := _BRANCHES.search(self.attributes):
            found += branches[1].split(",")
        return tuple(name.strip().removeprefix("%") for name in found)

    def attribute(self, name: str) -> str:
        """Returns the value of `name=value`, without braces around it; "" if there is none."""
        found = re.search(rf"\b{name}=(?:\{{([^{{}}]*)\}}|\"([^\"]*)\"|([^\s,]+))", self.attributes)
        return next((value for value in found.groups() if value is not None), "") if found else ""


_ELEMENTWISE_CALLERS = frozenset(
    (
        *("reduce", "reduce-window", "select-and-scatter", "scatter", "sort", "map"),
        *("all-reduce", "all-reduce-start", "reduce-scatter", "custom-call"),
    )
)
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=(%?[\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
      computations: instructions of each, in the order in which they run.
      entry: name of the computation that is the program.
    """

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    @functools.cached_property
    def _by_name(self) -> dict[str, dict[str, Instruction]]:
        return {
            computation: {instruction.name: instruction for instruction in instructions}
            for computation, instructions in self.computations.items()
        }

    def find(self, computation: str, name: str) -> Instruction:
        """Returns an instruction of a computation."""
        return self._by_name[computation][name]

    @functools.cached_property
    def _users(self) -> dict[str, dict[str, list[Instruction]]]:
        found: dict[str, dict[str, list[Instruction]]] = {}
        for computation, instructions in self.computations.items():
            users = found[computation] = {}
            for instruction in instructions:
                for operand in instruction.operands:
                    users.setdefault(operand, []).append(instruction)
        return found

    def first_user(self, computation: str, name: str, passing: Collection[str]) -> str | None:
        """Returns the name of the first instruction that uses a result; None: there is none.

        Args:
          computation: it is in.
          name: of the instruction with the result.
          passing: opcodes that only pass a result on, besides the ends of asynchronous instructions.
        """
        for user in self._users[computation].get(name, ()):
            if user.opcode not in passing and not user.opcode.endswith("-done"):
                return user.name
            if user.opcode not in ("tuple", "while") and (found := self.first_user(computation, user.name, passing)):
                return found
        return None

    def inside(self, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
        """Yields the computation and the instruction for everything that an instruction runs, at any depth."""
        for computation in instruction.called():
            for inner in self.computations[computation]:
                yield computation, inner
                yield from self.inside(inner)


def parse(text: str) -> Program:
    """Returns the program of a text by `as_text()` of a compiled program, or `as_text("hlo")` of a lowered one.

    Raises:
      ValueError: if the text holds no program.
    """
    frames = _Frames(text)
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry = name = None
    lines: list[Instruction] = []
    for line in text.splitlines():
        if name is None:
            if header := _HEADER.match(line):
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name], name = tuple(lines), None
        elif instruction := _read_line(line, frames):
            lines.append(instruction)
    if entry is None:
        raise ValueError("the text holds no program: expected HLO with an ENTRY computation")
    return Program(computations, entry)


_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_OP_NAME = re.compile(r'\bop_name="((?:[^"\\]|\\.)*)"')


def _read_line(line: str, frames: "_Frames") -> Instruction | None:
    """Returns the instruction of a line; None: it has none."""
    start = _LINE.match(line)
    if not start:
        return None
    at = start.end()
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    opened = line.index("(", end)
    closed = _closing(line, opened)
    opcode, rest = line[end:opened].strip(), line[closed:]
    operands = [] if opcode in ("constant", "parameter") else _split(line[opened + 1 : closed - 1])
    named = _OP_NAME.search(rest)
    if opcode == "parameter":
        rest = f"number={line[opened + 1 : closed - 1]}{rest}"
    return Instruction(
        name=start[2],
        opcode=opcode,
        results=arrays(line[at:end]),
        operands=tuple(operand.split(" ")[-1].removeprefix("%") for operand in operands),
        attributes=rest.partition(", backend_config=")[0] + _known_trip_count(rest),
        op_name=named[1].replace("\\'", "'") if named else "",
        frames=frames.of(rest),
        root=bool(start[1]),
    )


def arrays(type_: str) -> tuple[Array, ...]:
    """Returns the arrays of a type as the text writes it, `f32[8,4]{1,0}` or a tuple of such."""
    made = []
    for dtype, sizes, layout in _ARRAY.findall(type_):
        order, _, tiling = layout.partition(":")
        tile, space = re.search(r"T\(([\d,]+)\)", tiling), re.search(r"S\((\d+)\)", tiling)
        made.append(
            Array(
                dtype,
                tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size),
                tuple(int(dim) for dim in order.split(",") if dim),
                tuple(int(size) for size in tile[1].split(",")) if tile else (),
                int(space[1]) if space else 0,
            )
        )
    return tuple(made)


def _closing(line: str, opened: int) -> int:
    """Returns the place after the parenthesis that closes the one at `opened`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, opened):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    return len(line)


def _split(text: str) -> list[str]:
    """Splits at the commas that are not within parentheses, brackets or braces."""
    text = re.sub(r"/\*.*?\*/", "", text)
    parts, depth, begun = [], 0, 0
    for found in re.finditer(r"[()\[\]{},]", text):
        if found[0] == ",":
            if not depth:
                parts.append(text[begun : found.start()].strip())
                begun = found.end()
        else:
            depth += 1 if found[0] in "([{" else -1
    parts.append(text[begun:].strip())
    return [part for part in parts if part]


def _known_trip_count(rest: str) -> str:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
    return (f", trip_count={found[1]}" if found else "") + (f", cycles={cycles[1]}" if cycles else "")


class _Frames:
    """The tables of source locations before the computations."""

    def __init__(self, text: str):
        files, functions, locations, frames = (
            self._table(text, name) for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
        )
        self._frames = {number: self._fields(fields) for number, fields in frames.items()}
        # Some versions write a parent's number one too high, so that 1 means none: the first frame is not its own.
        self._shift = int(any(frame.get("parent_frame_id") == number for number, frame in self._frames.items()))
        self._locations = {
            number: Frame(files[at["file_name_id"]].strip('"'), functions[at["function_name_id"]].strip('"'))
            for number, at in ((number, self._fields(fields)) for number, fields in locations.items())
        }
        self._known: dict[int, tuple[Frame, ...]] = {}

    @staticmethod
    def _table(text: str, name: str) -> dict[int, str]:
        found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        lines = (line.partition(" ") for line in found[1].splitlines()) if found else ()
        return {int(number): rest for number, _, rest in lines}

    @staticmethod
    def _fields(text: str) -> dict[str, int]:
        return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", text)}

    def of(self, rest: str) -> tuple[Frame, ...]:
        """Returns the frames of an instruction, by the number in its metadata, or the one file that is named there."""
        if number := re.search(r"\bstack_frame_id=(\d+)", rest):
            return self._chain(int(number[1]))
        file = re.search(r'\bsource_file="([^"]*)"', rest)
        return (Frame(file[1], ""),) if file else ()

    def _chain(self, number: int) -> tuple[Frame, ...]:
        if number not in self._known:
            frame = self._frames.get(number)
            if frame is None:
                return ()
            parent = frame.get("parent_frame_id", self._shift) - self._shift
            outer = self._chain(parent) if parent else ()
            self._known[number] = (self._locations[frame["file_location_id"]], *outer)
        return self._known[number]
