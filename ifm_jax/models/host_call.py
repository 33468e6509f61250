"""Python functions that a compiled program calls on a CPU with the addresses of its arrays, without copying them.

XLA calls such functions through a C interface, which it keeps compatible and which has a version (XLA's
xla/ffi/api/c_api.h, beside jaxlib). `jax.ffi` documents it for libraries written in C++; here the few structures that
a call needs are declared with ctypes, so that nothing is compiled when the package is installed. XLA checks the version
when a function is registered: an interface that this file does not know ends in an error there, not in wrong memory.
"""

import atexit
import contextlib
import ctypes
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

_MAJOR, _MINOR = 0, 3  # the version that is declared here; the interface of jaxlib 0.10 to 0.12 is 0.3 to 0.5
_METADATA = 1  # the extension that asks for the version
_EXECUTE = 3  # the stage at which arrays have values
_INTERNAL = 13  # error code
_QUIET = 0.2  # seconds without a call after which no program runs any more

Pointer = ctypes.c_void_p
Function = Callable[[tuple[int, ...], list[int]], None]


class _Structure(ctypes.Structure):
    """What most structures of the interface begin with; the fields of the others follow."""

    _fields_ = (("struct_size", ctypes.c_size_t), ("extension", Pointer))


class _Version(_Structure):
    _fields_ = (
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("version", _Version),
        ("traits", ctypes.c_uint32),
        ("state_type", ctypes.c_int64),
    )


class _Extension(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", Pointer),
        ("metadata", ctypes.POINTER(_Metadata)),
    )


class _Buffer(_Structure):
    _fields_ = (
        ("dtype", ctypes.c_int),
        ("data", Pointer),
        ("rank", ctypes.c_int64),
        ("sizes", Pointer),
    )


class _Buffers(_Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("types", Pointer),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _Array(ctypes.Structure):
    _fields_ = (("dtype", ctypes.c_int), ("size", ctypes.c_size_t), ("data", Pointer))


class _Attributes(_Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("types", Pointer),
        ("names", Pointer),
        ("values", ctypes.POINTER(ctypes.POINTER(_Array))),
    )


class _Error(_Structure):
    _fields_ = (
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


class _Interface(_Structure):
    _fields_ = (
        ("version", _Version),
        ("internal", Pointer),
        ("create_error", ctypes.CFUNCTYPE(Pointer, ctypes.POINTER(_Error))),
    )


class _Frame(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("interface", ctypes.POINTER(_Interface)),
        ("context", Pointer),
        ("stage", ctypes.c_int),
        ("operands", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


_Handler = ctypes.CFUNCTYPE(Pointer, ctypes.POINTER(_Frame))
_registered: list[Any] = []  # XLA keeps only their addresses
_running: set[int] = set()  # threads within a call
_last_call = float("-inf")  # its end


def register(name: str, function: Function) -> None:
    """Registers a function under a name for `call`, for the life of the process.

    JAX runs a program in a thread of its own, where Ctrl-C does not reach the function. It runs a program of next to no
    operations, or any with jax_cpu_enable_async_dispatch=False, in the thread that starts it: if that is the main one,
    Ctrl-C may end the function before it has filled the result.

    Args:
      name: unique name; it becomes part of compiled programs, and of those in the compilation cache.
      function: is called with the key of the call and the addresses of the operands and of the result; from any thread,
        and from several at once. An exception ends the program that called it, with the exception's text.

    Raises:
      jax.errors.JaxRuntimeError: if this jaxlib has another interface.
    """

    def handle(frame: Any) -> int | None:
        called: _Frame = frame.contents
        if called.extension and called.extension.contents.type == _METADATA:
            return _declare_version(called)
        if called.stage != _EXECUTE:
            return None
        global _last_call
        _running.add(threading.get_ident())
        try:
            array = called.attributes.values[0].contents
            key = tuple((ctypes.c_int64 * array.size).from_address(array.data))
            operands, results = called.operands, called.results
            addresses = [operands.buffers[i].contents.data for i in range(operands.count)]
            function(key, [*addresses, *(results.buffers[i].contents.data for i in range(results.count))])
        except BaseException:  # nothing may leave this function but an error of XLA's
            message = f"{name}: {traceback.format_exc()}".encode()
            error = _Error(ctypes.sizeof(_Error), None, message, _INTERNAL)
            return called.interface.contents.create_error(ctypes.byref(error))
        finally:
            _last_call = time.monotonic()
            _running.discard(threading.get_ident())
        return None

    # Registered before JAX has its CPU, a function is checked only then, and its error would be that of the CPU.
    jax.local_devices(backend="cpu")
    if not _registered:
        atexit.register(_wait_for_programs)
    handler = _Handler(handle)
    _registered.append(handler)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(ctypes.cast(handler, Pointer)), platform="cpu")


def call(name: str, operands: Sequence[jax.Array], result: jax.ShapeDtypeStruct, key: Sequence[int]) -> jax.Array:
    """Returns the array that a registered function fills; on one CPU device, without derivatives.

    Args:
      name: that of `register`.
      operands: arrays, which the function may only read; row-major.
      result: shape and dtype of the array.
      key: integers, passed to the function.
    """
    found = jax.ffi.ffi_call(name, result, vmap_method="sequential")(*operands, key=np.array(key, np.int64))
    assert isinstance(found, jax.Array)
    return found


def _wait_for_programs() -> None:
    """Waits for the programs that still run when Python ends.

    A Python that is ending takes no more calls: the thread of a program would end, and JAX would wait for it forever.
    """
    with contextlib.suppress(RuntimeError):
        for device in jax.local_devices(backend="cpu"):  # programs that one thread starts run one after the other
            jax.block_until_ready(jax.device_put(np.zeros(1, np.float32), device) + 1)
    for array in jax.live_arrays():
        with contextlib.suppress(RuntimeError):  # given away, or of a program that failed
            array.block_until_ready()
    while _running or time.monotonic() < _last_call + _QUIET:  # of another thread, which holds no result
        time.sleep(_QUIET / 4)


def _declare_version(called: _Frame) -> None:
    """Tells XLA which version of its interface this file is written for, if XLA's is not older."""
    version, theirs = called.extension.contents.metadata.contents.version, called.interface.contents.version
    version.major, version.minor = _MAJOR, min(_MINOR, theirs.minor)
