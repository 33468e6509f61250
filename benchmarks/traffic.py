"""Counts the memory traffic of a compiled program: bytes per kernel, and the part of the training step it belongs to.

A kernel is an instruction at the top level of an optimized program: a fusion, a library's convolution, a copy. It reads
each operand from memory once and writes each result once; everything else in it stays on the chip. If a fusion reads
only slices of an operand, the slices count; if a result replaces a part of an operand, the part counts. Arrays in a
TPU's on-chip memory do not count. The body of a loop counts as often as it runs, if the program gives the number.

The counts ignore caches, which save some of the reads, and what a library's convolution moves beyond its operands.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence

from benchmarks import programs
from benchmarks.programs import Array, Frame, Instruction, Program

# Parts of a training step. A fusion that belongs to several of them counts as the first.
SOURCES = (
    "convolutions",
    "pooling",
    "BatchNorm backward",
    "BatchNorm forward",
    "ReLU and adds",
    "head",
    "loss",
    "queue",
    "augmentation",
    "momentum",
    "optimizer",
    "exchange",
    "copies",
    "other",
)

LARGE = 20_000_000  # bytes from which reports list an array


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch of a device, or several of the same instruction in a loop.

    Attributes:
      name: name in the program.
      opcode: fusion, copy, or the name of a library's function.
      source: part of the step, one of `SOURCES`.
      reads: bytes read from memory, in all runs.
      writes: bytes written to memory, in all runs.
      operations: floating-point operations of its convolutions and matrix products, in all runs.
      dtype: dtype of the factors of its products; "" if it has none.
      exact: whether the program requests products in full float32.
      cycles: the compiler's estimate, in all runs; 0 if it gives none.
      runs: number of runs in a step.
      results: arrays that it writes.
      transposes: bytes of the arrays whose dimensions it reorders in memory.
    """

    name: str
    opcode: str
    source: str
    reads: float
    writes: float
    operations: float = 0.0
    dtype: str = ""
    exact: bool = False
    cycles: float = 0.0
    runs: int = 1
    results: tuple[Array, ...] = ()
    transposes: float = 0.0

    @property
    def bytes(self) -> float:
        """Memory traffic, in all runs."""
        return self.reads + self.writes


def kernels(program: Program) -> list[Kernel]:
    """Returns the kernels of a program in the order in which they start."""
    return list(_kernels(program, program.entry, 1))


# No kernel: names for what is there already, and the ends of what has counted at its start.
_FREE = frozenset(
    (
        *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "add-dependency"),
        *("opt-barrier", "optimization-barrier", "partition-id", "replica-id", "async-update"),
    )
)
_COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast", "send", "recv"),
)


def _kernels(program: Program, computation: str, runs: int) -> Iterable[Kernel]:
    for instruction in program.computations[computation]:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            continue
        if opcode in ("call", "async-start"):
            for called in instruction.called():
                yield from _kernels(program, called, runs)
        elif opcode == "while":
            count = int(instruction.attribute("trip_count") or 1)
            for called in instruction.called():
                yield from _kernels(program, called, runs * count)
        elif opcode == "conditional":
            branches = (list(_kernels(program, called, runs)) for called in instruction.called())
            yield from max(branches, key=lambda branch: sum(kernel.bytes for kernel in branch))
        else:
            yield _kernel(program, computation, instruction, runs)


def _kernel(program: Program, computation: str, instruction: Instruction, runs: int) -> Kernel:
    reads, writes = _moved(program, computation, instruction)
    own = [(computation, instruction)]
    parts = own + list(program.inside(instruction))
    multiplied = [(_operations(program, at, part), part, at) for at, part in parts]
    operations = sum(each for each, _, _ in multiplied)
    dtype, exact = "", False
    if operations:
        _, most, at = max(multiplied, key=lambda one: one[0])
        dtype = program.find(at, most.operands[0]).results[0].dtype
        exact = "highest" in most.attribute("operand_precision")
    if instruction.attribute("custom_call_target") == "ConcatBitcast":  # a name for arrays that lie side by side
        reads = writes = 0.0
    return Kernel(
        name=instruction.name,
        opcode=instruction.attribute("custom_call_target") or instruction.opcode,
        source=_served(program, computation, instruction) or _source(parts) or _user_source(program, *own[0]),
        reads=runs * reads,
        writes=runs * writes,
        operations=runs * operations,
        dtype=dtype,
        exact=exact,
        cycles=runs * float(instruction.attribute("cycles") or 0),
        runs=runs,
        results=instruction.results,
        transposes=_transposed(program, parts),
    )


def _moved(program: Program, computation: str, instruction: Instruction) -> tuple[float, float]:
    """Returns the bytes that an instruction reads and writes in one run."""
    results = instruction.results
    if instruction.opcode.endswith("-start"):
        results = _made_by_start(instruction)
    inner = program.computations[instruction.called()[0]] if instruction.opcode == "fusion" else ()
    parameters = {int(one.attribute("number")): one.name for one in inner if one.opcode == "parameter"}
    # An operand may be given twice, under two names.
    wanted: dict[tuple[str, int], tuple[float, float]] = {}
    for place, operand in enumerate(instruction.operands):
        share = _part_read(inner, parameters.get(place, "")) if inner else _part_of_operand(instruction, place)
        for number, array in enumerate(program.find(computation, operand).results):
            whole = _in_memory(array)
            part = whole if share is None else min(share, whole)
            key = _origin(program, computation, operand), number
            before = wanted.get(key, (0.0, whole))[0]
            wanted[key] = min(before + part, whole), whole
    written = _parts_written(inner, results) if inner else [_part_of_result(program, computation, instruction)]
    writes = sum(
        min(_in_memory(array), _in_memory(array) if part is None else part)
        for array, part in zip(results, written * len(results) if len(written) == 1 else written, strict=True)
    )
    return sum(read for read, _ in wanted.values()), writes


def _in_memory(array: Array) -> float:
    """Bytes that an array takes in the large memory."""
    return 0.0 if array.space else array.bytes


def _origin(program: Program, computation: str, name: str) -> str:
    """Returns the name of the instruction that made what another one only names."""
    instruction = program.find(computation, name)
    while instruction.opcode in ("bitcast", "opt-barrier"):
        name = instruction.operands[0]
        instruction = program.find(computation, name)
    if instruction.opcode == "get-tuple-element":
        return f"{_origin(program, computation, instruction.operands[0])}[{instruction.attribute('index')}]"
    return name


def _made_by_start(instruction: Instruction) -> tuple[Array, ...]:
    """Returns what an asynchronous instruction makes: its type lists what it takes, too, and bookkeeping."""
    arrays = instruction.results
    if instruction.opcode == "copy-start":
        return arrays[:1]
    if instruction.opcode in ("all-reduce-start", "send", "recv"):
        return arrays
    taken = len(instruction.operands)
    return arrays[taken : 2 * taken] or arrays


_SLICES = ("slice", "dynamic-slice", "gather")
_SAME = ("copy", "convert", "reshape", "transpose", "pad", "concatenate", "slice")  # make the same values


def _part_read(inner: Sequence[Instruction], name: str) -> float | None:
    """Returns the bytes that a fusion reads of a parameter; None: all of it."""
    total = 0.0
    for user in inner:
        if name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == name:
            total += _unpadded(user.results[0])
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name and name not in user.operands[1:]:
            continue  # what is not replaced stays where it is
        elif user.opcode == "bitcast":
            part = _part_read(inner, user.name)
            if part is None:
                return None
            total += part
        else:
            return None
    return total


def _unpadded(array: Array) -> float:
    return array.size * programs.width(array.dtype)


def _parts_written(inner: Sequence[Instruction], results: Sequence[Array]) -> list[float | None]:
    """Returns the bytes that a fusion writes of each result; None: all of it."""
    by_name = {one.name: one for one in inner}
    root = next(one for one in inner if one.root)
    made = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(made) != len(results):  # nested tuples
        return [None] * len(results)
    parts = []
    for one in made:
        while one.opcode == "bitcast":
            one = by_name[one.operands[0]]
        updates = one.opcode == "dynamic-update-slice"
        parts.append(_unpadded(by_name[one.operands[1]].results[0]) if updates else None)
    return parts


def _part_of_operand(instruction: Instruction, place: int) -> float | None:
    """Returns the bytes that an instruction which is no fusion reads of an operand; None: all of it."""
    if place == 0 and instruction.opcode in _SLICES:
        return sum(_unpadded(array) for array in instruction.results)
    if place == 0 and instruction.opcode in ("slice-start", "dynamic-slice-start"):
        return sum(_unpadded(array) for array in _made_by_start(instruction))
    if place == 0 and instruction.opcode in ("dynamic-update-slice", "scatter"):
        return 0.0
    return None


def _part_of_result(program: Program, computation: str, instruction: Instruction) -> float | None:
    if instruction.opcode == "dynamic-update-slice":
        return _unpadded(program.find(computation, instruction.operands[1]).results[0])
    if instruction.opcode == "scatter":
        return _unpadded(program.find(computation, instruction.operands[-1]).results[0])
    return None


# ---- Operations.


def operations(program: Program) -> float:
    """Returns the floating-point operations of a program's convolutions and matrix products, two for each product.

    For a program as it is written too, before the compiler has changed it. Products with the zeros of a padded border
    are not counted.
    """

    def total(computation: str) -> float:
        found = 0.0
        for instruction in program.computations[computation]:
            found += _operations(program, computation, instruction)
            inner = [total(called) for called in instruction.called()]
            if instruction.opcode == "conditional":
                found += max(inner)
            else:
                found += sum(inner) * (int(instruction.attribute("trip_count") or 1))
        return found

    return total(program.entry)


def _operations(program: Program, computation: str, instruction: Instruction) -> float:
    """Returns the operations of one instruction, without those of computations that it calls."""
    if instruction.opcode == "dot" or instruction.attribute("custom_call_target") in (
        "__cublas$gemm",
        "__cublas$lt$matmul",
    ):
        left = program.find(computation, instruction.operands[0]).results[0]
        contracted = instruction.attribute("lhs_contracting_dims")
        depth = math.prod(left.shape[int(dim)] for dim in contracted.split(",") if dim)
        return 2.0 * instruction.results[0].size * depth
    if instruction.opcode != "convolution" and "conv" not in instruction.attribute("custom_call_target").lower():
        return 0.0
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels"))
    if not labels:
        return 0.0
    first, second = (program.find(computation, name).results[0] for name in instruction.operands[:2])
    result = instruction.results[0]
    # A library's gradients are described as the convolution that they are of.
    x, kernel, y = {
        "__cudnn$convBackwardInput": (result, second, first),
        "__cudnn$convBackwardFilter": (first, result, second),
    }.get(instruction.attribute("custom_call_target"), (first, second, result))
    x_labels, kernel_labels, y_labels = labels.groups()
    window = {
        name: value.split("x") for name, value in re.findall(r"(\w+)=([\d_x\-]+)", instruction.attribute("window"))
    }
    dims = sum(label.isdigit() for label in kernel_labels)
    pairs = 1.0
    for dim in range(dims):
        label = str(dim)
        low, _, _high = window["pad"][dim].partition("_") if "pad" in window else ("0", "", "0")
        pairs *= _pairs(
            x.shape[x_labels.index(label)],
            kernel.shape[kernel_labels.index(label)],
            y.shape[y_labels.index(label)],
            stride=int(window["stride"][dim]) if "stride" in window else 1,
            low=int(low),
            x_dilation=int(window["lhs_dilate"][dim]) if "lhs_dilate" in window else 1,
            kernel_dilation=int(window["rhs_dilate"][dim]) if "rhs_dilate" in window else 1,
        )
    images, inputs = (x.shape[x_labels.index(label)] for label in "bf")
    outputs = y.shape[y_labels.index("f")]
    groups = int(instruction.attribute("feature_group_count") or 1) * int(
        instruction.attribute("batch_group_count") or 1
    )
    return 2.0 * pairs * images * inputs * outputs / groups


def _pairs(x: int, kernel: int, y: int, stride: int, low: int, x_dilation: int, kernel_dilation: int) -> int:
    """Returns how many pairs of an output and a tap of the kernel, along one axis, meet a value of the input."""
    count = 0
    for tap in range(kernel):
        # Output o reads place o * stride + offset of the input with zeros between its values.
        offset = tap * kernel_dilation - low
        first = max(0, -(offset // stride))
        last = min(y - 1, ((x - 1) * x_dilation - offset) // stride)
        if x_dilation == 1:
            count += max(0, last - first + 1)
        else:
            count += sum((place * stride + offset) % x_dilation == 0 for place in range(first, last + 1))
    return count


# ---- Sources.


def _is(file: str, *functions: str) -> Callable[[Frame], bool]:
    """Returns a test for frames of a file, and of a function whose name starts so; none: any."""
    return lambda frame: frame.file.endswith(file) and (not functions or frame.function.startswith(functions))


# The innermost frame for which one of these holds decides.
_FRAMES: tuple[tuple[Callable[[Frame], bool], str], ...] = (
    (_is("models/convolution.py"), "convolutions"),
    (_is("linear.py", "Conv."), "convolutions"),
    (_is("models/layers.py", "Conv."), "convolutions"),
    (_is("models/layers.py", "Linear."), "head"),
    (_is("models/batch_norm.py"), "BatchNorm"),
    (_is("models/pooling.py"), "pooling"),
    (_is("models/activation.py"), "ReLU and adds"),
    (_is("models/heads.py"), "head"),
    (_is("models/resnet.py", "ResNet.features"), "pooling"),  # the mean over the map; a ReLU is known by its name
    (_is("models/resnet.py"), "ReLU and adds"),
    (_is("models/encoder.py"), "loss"),  # normalization of embeddings
    (_is("methods/losses.py"), "loss"),
    (_is("methods/queue.py"), "queue"),
    (_is("methods/shuffle.py"), "augmentation"),
    (_is("augment.py"), "augmentation"),
    (_is("methods/method.py", "Views"), "augmentation"),
    (_is("methods/method.py"), "loss"),
    (_is("methods/moco.py", "MoCo.loss.<locals>"), "momentum"),
    (_is("methods/moco.py"), "augmentation"),  # the way back from the shuffle
    (_is("methods/simclr.py"), "augmentation"),  # both views of an image side by side
    (_is("optim.py"), "optimizer"),
    (lambda frame: "/optax/" in frame.file, "optimizer"),
)


def source_of(instruction: Instruction) -> str | None:
    """Returns the part of the step that an instruction is from, one of `SOURCES`; None: nothing tells."""
    if instruction.opcode.removesuffix("-start") in _COLLECTIVES:
        return "exchange"
    for frame in instruction.frames:
        for holds, source in _FRAMES:
            if not holds(frame):
                continue
            if source == "BatchNorm":
                return "BatchNorm backward" if "transpose(" in instruction.op_name else "BatchNorm forward"
            if source == "pooling" and "jit(relu)" in instruction.op_name:
                return "ReLU and adds"
            return source
    return None


def _source(parts: Sequence[tuple[str, Instruction]]) -> str | None:
    """Returns the source of a kernel, given what is in it: the first of `SOURCES` among what is of about full size.

    None: nothing in it tells.
    """
    known = [
        (part.opcode in _SAME, source, _size(part))
        for _, part in parts
        if part.opcode not in _FREE
        and part.opcode not in ("fusion", "broadcast", "iota")
        and (source := source_of(part))
    ]
    # What merely passes values on, to bfloat16 for the next convolution for example, tells only if nothing else does.
    found = [(source, size) for passes, source, size in known if not passes] or [one[1:] for one in known]
    if not found:
        kernel = parts[0][1]
        return source_of(kernel) or ("copies" if kernel.opcode.startswith("copy") else None)
    largest = max((size for _, size in found if size < math.inf), default=0)
    return min((source for source, size in found if 8 * size >= largest), key=SOURCES.index)


def _size(part: Instruction) -> float:
    """Returns the elements of the largest result; a product counts more than anything, however small its result is."""
    if part.opcode in ("convolution", "dot"):
        return math.inf
    return max((array.size for array in part.results), default=0)


def _served(program: Program, computation: str, instruction: Instruction) -> str | None:
    """Returns the source of the kernel that a transfer between memories serves; None: the instruction is none."""
    if instruction.opcode.removesuffix("-start") not in ("copy", "slice", "dynamic-slice") or not instruction.operands:
        return None
    made = (_made_by_start(instruction) if instruction.opcode.endswith("-start") else instruction.results)[0]
    if made.space == program.find(computation, instruction.operands[0]).results[0].space:
        return None
    if made.space:  # fetched, for the next that uses it
        name = program.first_user(computation, instruction.name, (*_FREE, "custom-call"))
    else:
        name = _origin(program, computation, instruction.operands[0]).partition("[")[0]
    if name is None:
        return None
    other = program.find(computation, name)
    if other.opcode.removesuffix("-start") == instruction.opcode.removesuffix("-start"):
        return None
    return _source([(computation, other), *program.inside(other)])


def _user_source(program: Program, computation: str, instruction: Instruction) -> str:
    """Returns the source of the next kernels that use the result of one whose own source is unknown."""
    for _ in range(5):
        name = program.first_user(computation, instruction.name, _FREE)
        if name is None:
            break
        instruction = program.find(computation, name)
        if source := _source([(computation, instruction), *program.inside(instruction)]):
            return source
    return "other"


def _transposed(program: Program, parts: Sequence[tuple[str, Instruction]]) -> float:
    """Returns the bytes of the arrays whose order in memory a kernel changes."""
    total = 0.0
    for computation, part in parts:
        if part.opcode not in ("transpose", "copy") or not part.operands:
            continue
        made = part.results[0]
        dimensions = [int(dim) for dim in part.attribute("dimensions").split(",") if dim]
        taken = program.find(computation, part.operands[0]).results[0]
        dimensions = dimensions or list(range(len(made.shape)))
        if _order(made, range(len(made.shape))) != _order(taken, [dimensions.index(d) for d in range(len(made.shape))]):
            total += made.bytes
    return total


def _order(array: Array, names: Sequence[int]) -> list[int]:
    """Returns the names of an array's dimensions from the slowest to the fastest, without those of size 1."""
    order = reversed(array.layout) if array.layout else range(len(array.shape))
    return [names[dim] for dim in order if array.shape[dim] > 1]


# ---- Tables.


def by_source(found: Sequence[Kernel]) -> dict[str, dict[str, float]]:
    """Returns kernels and bytes of each source that there is, in the order of `SOURCES`."""
    table = {}
    for source in SOURCES:
        own = [kernel for kernel in found if kernel.source == source]
        if own:
            table[source] = {
                "kernels": sum(kernel.runs for kernel in own),
                "bytes": round(sum(kernel.bytes for kernel in own)),
            }
    return table


def large_float32(found: Sequence[Kernel]) -> list[dict]:
    """Returns the float32 arrays above `LARGE` bytes that are written to memory, those of a shape taken together."""
    made: dict[tuple, dict] = {}
    for kernel in found:
        for array in kernel.results:
            if array.dtype == "f32" and not array.space and array.bytes > LARGE:
                row = {"source": kernel.source, "shape": array.shape, "count": 0, "bytes": 0}
                row = made.setdefault((kernel.source, array.shape), row)
                row["count"] += kernel.runs
                row["bytes"] += round(kernel.runs * array.bytes)
    return sorted(made.values(), key=lambda row: -row["bytes"])


_ACTIVATIONS = (
    "convolutions",
    "pooling",
    "BatchNorm backward",
    "BatchNorm forward",
    "ReLU and adds",
    "copies",
    "other",
)


def transposed_activations(found: Sequence[Kernel]) -> list[dict]:
    """Returns the kernels that reorder more than `LARGE` bytes of the network's maps."""
    return [
        {"name": kernel.name, "source": kernel.source, "bytes": round(kernel.transposes)}
        for kernel in found
        if kernel.transposes > LARGE and kernel.source in _ACTIVATIONS
    ]
