"""Convolutions by oneDNN, the library of PyTorch's on x86 CPUs, called from compiled programs.

oneDNN (Apache-2.0) comes with `pip install "ifm_jax[onednn]"`; where it is installed otherwise, by conda or the system
as libdnnl.so.3, that one is used. It is called through its C interface, which is stable within version 3, with the
addresses of the program's arrays (`host_call`): images stay as they are, the kernel is copied into the layout that
oneDNN prefers. It computes with as many threads as OpenMP is given (OMP_NUM_THREADS).

A convolution is prepared once for each shape, when it is traced. What oneDNN does not have on a processor, such as
bfloat16 on one with AVX2, or only in its slow reference form, is left to XLA (`supports`).
"""

import ctypes
import functools
import pathlib
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ifm_jax.models import host_call

_NAME = "ifm_jax_onednn_convolution"
_LIBRARY = "libdnnl.so.3"

# Values of oneDNN's enumerations (dnnl_types.h).
_CPU = 1
_IN_ORDER = 1  # stream flags
DTYPES = {"float32": 3, "bfloat16": 2}
_ANY_LAYOUT = 1
_TRAINING = 64
_DIRECT = 1
_USER_SCRATCHPAD = 1
_QUERY_IMPLEMENTATION = 8
_QUERY_KERNEL, _QUERY_KERNEL_GRADIENT, _QUERY_SCRATCHPAD = 131, 132, 136
_X, _RESULT, _KERNEL, _SCRATCHPAD = 1, 17, 33, 80  # arguments
_X_GRADIENT, _RESULT_GRADIENT, _KERNEL_GRADIENT = 129, 145, 161
_UNIMPLEMENTED = (3, 4)
_MOST_DIMENSIONS = 12
_ALIGNMENT = 64

Computation = Literal["output", "input_gradient", "kernel_gradient"]
COMPUTATIONS: tuple[Computation, ...] = ("output", "input_gradient", "kernel_gradient")
_Handle = ctypes.c_void_p
_Sizes = ctypes.c_int64 * _MOST_DIMENSIONS


class UnavailableError(RuntimeError):
    """oneDNN cannot be used here; the message says why and what to do."""


class Problem(NamedTuple):
    """A convolution: shapes as in `convolution.conv_general_dilated`.

    Attributes:
      computation: "output" (from input and kernel), "input_gradient" (from the result's gradient and kernel) or
        "kernel_gradient" (from the result's gradient and input).
      dtype: "float32" or "bfloat16".
      x: `(N, H, W, C_in)`.
      kernel: `(k_h, k_w, C_in / groups, C_out)`.
      output: `(N, H', W', C_out)`.
      strides: along height and width.
      padding: before and after, for height and width.
      groups: groups of channels.
    """

    computation: Computation
    dtype: str
    x: tuple[int, ...]
    kernel: tuple[int, ...]
    output: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], tuple[int, int]]
    groups: int = 1

    def to_key(self) -> tuple[int, ...]:
        """Returns the problem as integers; see `from_key`."""
        computation, dtype = COMPUTATIONS.index(self.computation), DTYPES[self.dtype]
        around = [zeros for pair in self.padding for zeros in pair]
        return computation, dtype, *self.x, *self.kernel, *self.output, *self.strides, *around, self.groups

    @staticmethod
    def from_key(key: Sequence[int]) -> "Problem":
        """Returns the problem of a key."""
        rest = iter(key)

        def take(count: int) -> tuple[int, ...]:
            return tuple(next(rest) for _ in range(count))

        computation, dtype = take(2)
        (name,) = (name for name, number in DTYPES.items() if number == dtype)
        shapes = take(4), take(4), take(4), take(2)
        padding = ((next(rest), next(rest)), (next(rest), next(rest)))
        return Problem(COMPUTATIONS[computation], name, *shapes, padding, next(rest))


def require() -> None:
    """Checks that oneDNN can be used.

    Raises:
      UnavailableError: if it cannot.
    """
    _load()


def is_available() -> bool:
    """Returns whether oneDNN can be used."""
    try:
        require()
    except UnavailableError:
        return False
    return True


def supports(problem: Problem) -> bool:
    """Returns whether oneDNN has this computation on this processor, in a form made for it."""
    return problem.dtype in DTYPES and is_available() and _prepare(problem.to_key()) is not None


def compute(problem: Problem, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a result of a convolution that `supports` accepts, in a program for one CPU device.

    Args:
      problem: the convolution.
      a: input, or for a gradient the gradient of the result.
      b: kernel, or for the kernel's gradient the input.
    """
    shapes = {"output": problem.output, "input_gradient": problem.x, "kernel_gradient": problem.kernel}
    result = jax.ShapeDtypeStruct(shapes[problem.computation], jnp.dtype(problem.dtype))
    return host_call.call(_NAME, (a, b), result, problem.to_key())


class _Argument(ctypes.Structure):
    _fields_ = (("which", ctypes.c_int), ("memory", _Handle))


class _StatusError(Exception):
    """A status of the library's other than success."""

    def __init__(self, status: int):
        super().__init__(f"status {status}")
        self.status = status


class _Library(NamedTuple):
    """The library, and what every use of it needs.

    Attributes:
      functions: its functions, called without releasing the interpreter's lock: they are quick, taking it back is not.
      computing: its functions, called without the lock.
      engine: the processor.
      stream: the queue of its computations.
      attributes: options of every computation.
    """

    functions: Any
    computing: Any
    engine: _Handle
    stream: _Handle
    attributes: _Handle

    @staticmethod
    def open(path: str) -> "_Library":
        """Returns the library for this processor.

        Raises:
          OSError: if it cannot be loaded.
          AttributeError: if it lacks a function.
          _StatusError: if it refuses.
        """
        functions = ctypes.PyDLL(path)
        functions.dnnl_primitive_desc_query_md.restype = _Handle
        functions.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        functions.dnnl_memory_set_data_handle.argtypes = (_Handle, _Handle)
        library = _Library(functions, ctypes.CDLL(path), _Handle(), _Handle(), _Handle())
        library.do("engine_create", ctypes.byref(library.engine), _CPU, ctypes.c_size_t(0))
        library.do("stream_create", ctypes.byref(library.stream), library.engine, _IN_ORDER)
        library.do("primitive_attr_create", ctypes.byref(library.attributes))
        # The library's own scratchpad belongs to the thread that prepared a computation; XLA calls from any thread.
        library.do("primitive_attr_set_scratchpad_mode", library.attributes, _USER_SCRATCHPAD)
        return library

    def do(self, function: str, *arguments: Any) -> None:
        """Calls a function of the library.

        Raises:
          _StatusError: if it fails.
        """
        if status := getattr(self.functions, f"dnnl_{function}")(*arguments):
            raise _StatusError(status)

    def make(self, function: str, *arguments: Any) -> _Handle:
        """Returns what a function of the library creates. It is kept for the life of the process, as programs are.

        Raises:
          _StatusError: if it fails.
        """
        made = _Handle()
        self.do(function, ctypes.byref(made), *arguments)
        return made

    def run(self, primitive: _Handle, arguments: "ctypes.Array[_Argument]") -> None:
        """Executes a primitive and waits for it."""
        if status := self.computing.dnnl_primitive_execute(primitive, self.stream, len(arguments), arguments):
            raise _StatusError(status)


@functools.cache
def _load() -> _Library:
    """Loads the library and registers the function that programs call.

    Raises:
      UnavailableError: if it cannot be used.
    """
    errors = []
    for path in (pathlib.Path(sys.prefix) / "lib" / _LIBRARY, _LIBRARY):  # pip's and conda's, the system's
        try:
            library = _Library.open(str(path))
            host_call.register(_NAME, _execute)
            return library
        except OSError as error:
            errors.append(str(error))
        except (AttributeError, RuntimeError, _StatusError) as error:  # another version, or another XLA
            raise UnavailableError(f"oneDNN ({path}) does not work here: {error}") from error
    if "libgomp" in errors[0]:  # oneDNN is there, but not OpenMP's library
        raise UnavailableError(f"oneDNN cannot be loaded ({errors[0]}): install libgomp1 (Debian, Ubuntu) or libgomp")
    raise UnavailableError(f'oneDNN is not found ({errors[0]}): pip install "ifm_jax[onednn]", for Linux on x86-64')


@functools.cache
def _prepare(key: tuple[int, ...]) -> "_Convolution | None":
    """Returns the prepared convolution of a key; None: the library has none that is made for this processor."""
    try:
        return _Convolution(_load(), Problem.from_key(key))
    except _StatusError as error:
        if error.status not in _UNIMPLEMENTED:
            raise
        return None


def _execute(key: tuple[int, ...], addresses: list[int]) -> None:
    """Computes, when a program asks for it."""
    prepared = _prepare(key)
    if prepared is None:
        raise UnavailableError(f"oneDNN does not have {Problem.from_key(key)} on this processor")
    with _lock:
        prepared(addresses)


# One convolution has all cores; a second one at the same time would only take them away. It also guards the workspace.
_lock = threading.Lock()


class _Convolution:
    """A convolution, prepared: the library's computation, and a copy of the kernel between its order and ours."""

    def __init__(self, library: _Library, problem: Problem):
        """Prepares it.

        Raises:
          _StatusError: if the library does not have it.
        """
        self._library = library
        dtype, of_kernel = DTYPES[problem.dtype], problem.computation == "kernel_gradient"
        x, y = _describe_images(library, problem.x, dtype), _describe_images(library, problem.output, dtype)
        given, free = _describe_kernel(library, problem.kernel, problem.groups, dtype)
        description, roles = _describe(library, problem, x, free, y)
        query = functools.partial(library.functions.dnnl_primitive_desc_query_md, description)
        preferred = _Handle(query(_QUERY_KERNEL_GRADIENT if of_kernel else _QUERY_KERNEL, 0))
        scratchpad = _Handle(query(_QUERY_SCRATCHPAD, 0))

        x, y, kernel, ordered, scratch = (
            library.make("memory_create", of, library.engine, _Handle()) for of in (x, y, given, preferred, scratchpad)
        )
        compute = library.make("primitive_create", description)
        arguments = _arguments((*zip(roles, (x, ordered, y), strict=True), (_SCRATCHPAD, scratch)))
        if of_kernel:
            self._steps = [(compute, arguments), _copy(library, (preferred, ordered), (given, kernel))]
        else:
            self._steps = [_copy(library, (given, kernel), (preferred, ordered)), (compute, arguments)]
        # As `compute` orders operands and result.
        self._given = {
            "output": (x, kernel, y),
            "input_gradient": (y, kernel, x),
            "kernel_gradient": (y, x, kernel),
        }[problem.computation]
        self._own = (ordered, scratch)
        self._own_sizes = [library.functions.dnnl_memory_desc_get_size(of) for of in (preferred, scratchpad)]

    def __call__(self, addresses: Sequence[int]) -> None:
        """Computes, with operands and result at these addresses; not in two threads at once."""
        places = (*addresses, *_reserve(self._own_sizes))
        for memory, address in zip((*self._given, *self._own), places, strict=True):
            self._library.do("memory_set_data_handle", memory, address)
        for primitive, arguments in self._steps:
            self._library.run(primitive, arguments)


def _describe(
    library: _Library, problem: Problem, x: _Handle, kernel: _Handle, y: _Handle
) -> tuple[_Handle, tuple[int, int, int]]:
    """Returns the description of a computation, and the names of its arguments: images, kernel, result.

    Raises:
      _StatusError: if the library does not have it in a form made for this processor.
    """
    ends = ([pair[end] for pair in problem.padding] for end in (0, 1))
    geometry = [_Sizes(*values) for values in (problem.strides, (0, 0), *ends)]
    create, last = "convolution_{}_primitive_desc_create", library.attributes
    forward = library.make(
        *(create.format("forward"), library.engine, _TRAINING, _DIRECT, x, kernel, None, y, *geometry, last)
    )
    if problem.computation == "output":
        found, roles = forward, (_X, _KERNEL, _RESULT)
    elif problem.computation == "input_gradient":
        found = library.make(
            *(create.format("backward_data"), library.engine, _DIRECT, x, kernel, y, *geometry, forward, last)
        )
        roles = (_X_GRADIENT, _KERNEL, _RESULT_GRADIENT)
    else:
        found = library.make(
            *(create.format("backward_weights"), library.engine, _DIRECT, x, kernel, None, y, *geometry, forward, last)
        )
        roles = (_X, _KERNEL_GRADIENT, _RESULT_GRADIENT)
    name = ctypes.c_char_p()
    library.do("primitive_desc_query", found, _QUERY_IMPLEMENTATION, 0, ctypes.byref(name))
    if (name.value or b"").startswith(b"ref"):  # a plain loop
        raise _StatusError(_UNIMPLEMENTED[0])
    return found, roles


def _describe_images(library: _Library, shape: Sequence[int], dtype: int) -> _Handle:
    """Describes an array `(N, H, W, C)` to the library, which names the axes in the order N, C, H, W."""
    n, h, w, c = shape
    sizes, strides = (n, c, h, w), (h * w * c, 1, w * c, c)
    return library.make("memory_desc_create_with_strides", 4, _Sizes(*sizes), dtype, _Sizes(*strides))


def _describe_kernel(library: _Library, shape: Sequence[int], groups: int, dtype: int) -> tuple[_Handle, _Handle]:
    """Describes a kernel `(k_h, k_w, in, out)` as it is, and in the order that the library will choose.

    Its axes are to the library: groups if there are some, out, in, k_h, k_w.
    """
    h, w, c_in, c_out = shape
    sizes, strides = [c_out // groups, c_in, h, w], [1, c_out, w * c_in * c_out, c_in * c_out]
    if groups > 1:
        sizes, strides = [groups, *sizes], [c_out // groups, *strides]
    axes, of_sizes = len(sizes), _Sizes(*sizes)
    given = library.make("memory_desc_create_with_strides", axes, of_sizes, dtype, _Sizes(*strides))
    return given, library.make("memory_desc_create_with_tag", axes, of_sizes, dtype, _ANY_LAYOUT)


def _copy(
    library: _Library, source: tuple[_Handle, _Handle], target: tuple[_Handle, _Handle]
) -> "tuple[_Handle, ctypes.Array[_Argument]]":
    """Returns the copy of an array into another order, and its arguments; each array: description and memory."""
    (here, array), (there, copy) = source, target
    description = library.make(*("reorder_primitive_desc_create", here, library.engine, there, library.engine, None))
    return library.make("primitive_create", description), _arguments(((_X, array), (_RESULT, copy)))


def _arguments(parts: Iterable[tuple[int, _Handle]]) -> "ctypes.Array[_Argument]":
    listed = [_Argument(which, memory) for which, memory in parts]
    return (_Argument * len(listed))(*listed)


_workspace = np.empty(0, np.uint8)


def _reserve(sizes: Sequence[int]) -> list[int]:
    """Returns aligned addresses of memory of these sizes, until the next call; all convolutions share it."""
    global _workspace
    ends = np.cumsum([-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]).tolist()
    if ends[-1] + _ALIGNMENT > _workspace.nbytes:
        _workspace = np.empty(ends[-1] + _ALIGNMENT, np.uint8)
    first = -(-_workspace.ctypes.data // _ALIGNMENT) * _ALIGNMENT
    return [first + start for start in (0, *ends[:-1])]
