"""Reads a PyTorch or safetensors file: dicts, numbers, strings, and NumPy arrays for tensors.

Nothing in a file is executed: a PyTorch file is read only with `torch.load(weights_only=True)`, and all sizes that it
claims are checked against the file's size. PyTorch is imported only for PyTorch files.
"""

import os
import pathlib
import re
import warnings
import zipfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ifm_jax.errors import UsageError

_DEPTH = 8  # nesting of dicts and lists that are searched for tensors


class Unusable(NamedTuple):
    """A tensor that cannot become an array.

    Attributes:
      what: the reason, in words.
    """

    what: str


def read(path: str | os.PathLike[str]) -> Any:
    """Returns the content of a file.

    Arrays of a file in PyTorch's current (zip) format stay on disk until they are used. bfloat16 becomes JAX's
    bfloat16.

    Args:
      path: path of a file from `torch.save` or safetensors. The latter's tensors are in `state_dict`, beside its
        metadata.

    Returns:
      The content, every tensor a NumPy array of its type, or `Unusable`.

    Raises:
      UsageError: if the file cannot be read without executing code.
    """
    path = pathlib.Path(path)
    try:
        if not path.exists():
            raise UsageError(f"{path} does not exist: expected a .pth.tar or the workdir of a run")
        if not path.is_file():  # opening a pipe would wait for someone to write into it
            raise UsageError(f"{path} is not a regular file: expected a .pth.tar or the workdir of a run")
        size = path.stat().st_size
        with open(path, "rb") as file:
            begin = file.read(9)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    is_zip = begin.startswith(b"PK")
    if not is_zip and (path.suffix == ".safetensors" or begin[8:] == b"{"):
        return _read_safetensors(path)
    return _without_tensors(_load(path, size), size, {})


def _read_safetensors(path: pathlib.Path) -> dict[str, Any]:
    try:
        import safetensors
    except ImportError:
        raise UsageError(f"{path}: reading .safetensors requires its library: pip install safetensors") from None
    tensors: dict[str, Any] = {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (no dict)
                try:
                    tensors[name] = file.get_tensor(name)
                except (AttributeError, TypeError):  # a type that NumPy lacks
                    tensors[name] = Unusable(file.get_slice(name).get_dtype())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # SafetensorError, or any error from a malformed header
        raise UsageError(
            f"{path} is not a complete .safetensors file ({' '.join(str(error).split())[:100]}): download or copy it "
            "again if it should be one"
        ) from None
    return metadata | {"state_dict": tensors}


def _load(path: pathlib.Path, size: int) -> Any:
    """Calls `torch.load`; reports every failure in one line."""
    torch = import_torch()
    try:
        # Files in the format from before PyTorch 1.6 cannot be mapped into memory.
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_sizes(path, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's warnings about pickles; failures are reported below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a malformed pickle can fail in any way
        if forbidden := re.search(r"(?:GLOBAL|global|class) ([\w.]+\.[\w.]+)", str(error)):
            raise UsageError(
                f"{path}: loading it would run code ({forbidden[1]}) and is refused: expected only tensors, numbers "
                "and strings; if you trust it, load it in PyTorch and save only its state_dict"
            ) from None
        raise UsageError(
            f"{path} is not a complete PyTorch checkpoint ({type(error).__name__}): expected a file written by "
            "torch.save; download or copy it again if it should be one"
        ) from None


def import_torch():
    """Returns the module.

    Raises:
      UsageError: if it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UsageError("reading and writing PyTorch checkpoints requires PyTorch: pip install torch") from None
    return torch


def _check_sizes(path: pathlib.Path, size: int) -> None:
    """Rejects an archive whose parts are larger than itself: unpacked, they could have any size."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    claimed = sum(part.file_size for part in parts)
    if claimed > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise UsageError(
            f"{path} is compressed ({claimed} bytes in a file of {size}), which torch.save never does, and is refused: "
            "if you trust it, load it in PyTorch and save it again"
        )


def _without_tensors(value: Any, size: int, known: dict[int, Any], depth: int = 0) -> Any:
    """Returns dicts and lists with arrays in place of tensors; `known` holds all objects seen so far, by identity."""
    import torch

    if isinstance(value, torch.Tensor):
        return _array(value, size)
    if not isinstance(value, (dict, list)) or depth == _DEPTH:
        return value
    if id(value) not in known:
        if isinstance(value, dict):
            made: dict[Any, Any] = {}
            known[id(value)] = made
            for key, each in value.items():
                made[key] = _without_tensors(each, size, known, depth + 1)
        else:
            items: list[Any] = []
            known[id(value)] = items
            items += [_without_tensors(each, size, known, depth + 1) for each in value]
    return known[id(value)]


def _array(tensor: Any, size: int) -> np.ndarray | Unusable:
    """Returns a view of a tensor."""
    import torch

    try:
        for what in ("sparse" if tensor.layout != torch.strided else "", "quantized" if tensor.is_quantized else ""):
            if what:
                return Unusable(f"{what} {tensor.dtype}")
        if tensor.is_meta:
            return Unusable("meta, without values")
        if tensor.numel() * tensor.element_size() > size:  # strides can repeat one number at will
            return Unusable(f"{tuple(tensor.shape)}, more numbers than the file holds")
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
        if tensor.dtype.itemsize == 1 and tensor.is_floating_point():  # NumPy has no float8
            tensor = tensor.float()
        return tensor.resolve_conj().resolve_neg().numpy()
    except (RuntimeError, TypeError, AttributeError):  # other kinds of tensors
        return Unusable(f"a kind of {tensor.dtype} that is not an array")
