"""Recipes: Python files with a function `get_config() -> Config`, found by path or by name."""

import contextlib
import difflib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from ifm_jax.config import Config, check_fields, shown
from ifm_jax.errors import UsageError

_HERE = pathlib.Path(__file__).resolve().parent
# The package's own recipes: inside an installed package, beside it in a checkout.
DIRECTORY = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"
# The default recipe of a command.
DEFAULT = str(DIRECTORY / "trifeature.py")
_PACKAGE, _BY_PATH = "ifm_jax.configs", "ifm_jax_recipe"


def name_of(recipe: str | os.PathLike[str]) -> str:
    """Returns the name of a recipe given by path or by name: `trifeature` for `configs/trifeature.py`."""
    return pathlib.Path(recipe).stem


def load(recipe: str | os.PathLike[str]) -> Config:
    """Returns a recipe's config.

    Args:
      recipe: path of a file, or the name of one of the package's recipes, such as `ifm_cifar10`. A named recipe is a
        module like `ifm_jax.configs.ifm_cifar10`; a file is read anew each time.

    Returns:
      The result of its `get_config()`.

    Raises:
      UsageError: if there is no such recipe, it cannot be run, or its result is no config, in one line that begins with
        `--config=`.
    """
    (path, by_name), flag = _find(recipe), f"--config={recipe}"
    try:
        with _named(path) if by_name else _at(path) as module:
            get_config = getattr(module, "get_config", None)
            if not callable(get_config):
                missing = "has no function get_config(): expected one that returns an ifm_jax.config.Config"
                raise UsageError(f"{flag} {missing}")
            if _needs_arguments(get_config):
                raise UsageError(f"{flag}: get_config() takes arguments: expected a function without arguments")
            config = get_config()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{flag}{_line(error, path)}: {_reason(error)}") from None
    if not isinstance(config, Config):
        missing = ": does it end with `return config`?" if config is None else ", expected an ifm_jax.config.Config"
        raise UsageError(f"{flag}: get_config() returned {shown(config)}{missing}")
    try:
        check_fields(config)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from None
    return config


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[types.ModuleType]:
    """Yields a recipe of the package as its module."""
    if _PACKAGE not in sys.modules:  # in a checkout the import system does not find it
        loader = importlib.machinery.SourceFileLoader(_PACKAGE, str(DIRECTORY / "__init__.py"))
        sys.modules[_PACKAGE] = _new_module(_PACKAGE, loader)
        loader.exec_module(sys.modules[_PACKAGE])
    yield importlib.import_module(f"{_PACKAGE}.{path.stem}")


@contextlib.contextmanager
def _at(path: pathlib.Path) -> Iterator[types.ModuleType]:
    """Yields the recipe in a file as a module, which the import system knows until the block ends."""
    loader = _Fresh(_BY_PATH, str(path))
    module, before = _new_module(_BY_PATH, loader), sys.modules.get(_BY_PATH)
    sys.modules[_BY_PATH] = module
    try:
        loader.exec_module(module)
        yield module
    finally:
        del sys.modules[_BY_PATH]
        if before is not None:  # a recipe may load another
            sys.modules[_BY_PATH] = before


def _new_module(name: str, loader: importlib.machinery.SourceFileLoader) -> types.ModuleType:
    """Returns a new module without executing it."""
    spec = importlib.util.spec_from_file_location(name, loader.path, loader=loader)
    assert spec is not None  # the loader is given
    return importlib.util.module_from_spec(spec)


class _Fresh(importlib.machinery.SourceFileLoader):
    """Compiles a file each time: bytecode cached less than a second ago may be older than the file."""

    def get_code(self, fullname: str) -> types.CodeType:
        """Returns the code of the file."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _find(recipe: str | os.PathLike[str]) -> tuple[pathlib.Path, bool]:
    """Returns the file of a recipe and whether it was given by name."""
    given = pathlib.Path(recipe)
    try:
        if given.is_file():
            return given.absolute(), False  # a recipe finds its neighbors by its __file__
        named = DIRECTORY / f"{given}.py"
        if given.name == str(given) and named.is_file():
            return named, True
        is_there = given.exists()
    except (OSError, ValueError):  # a name that no file can have
        is_there = False
    if is_there:
        raise UsageError(f"--config={recipe} is a directory: expected a recipe, for example configs/trifeature.py")
    near = _near(given)
    hint = f": did you mean {near}?" if near else ": expected a recipe, for example configs/trifeature.py"
    raise UsageError(f"--config={recipe} does not exist{hint}")


def _near(given: pathlib.Path) -> str | None:
    """Returns the recipe of the nearest name, in the form to give it: in the same folder, or by name."""
    for directory, beside in ((given.parent, True), (DIRECTORY, False)):
        try:
            stems = [path.stem for path in directory.glob("*.py") if path.stem != "__init__"]
        except (OSError, ValueError):
            continue
        for stem in difflib.get_close_matches(given.stem, stems, n=1):
            return str(given.with_name(f"{stem}.py")) if beside else stem
    return None


def _needs_arguments(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    except ValueError:  # a built-in without a signature: the call gives a better error
        pass
    return False


def _line(error: BaseException, path: pathlib.Path) -> str:
    """Returns `, line 3` for an error on that line of the recipe."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    return f", line {lines[-1]}" if lines and lines[-1] else ""


def _reason(error: BaseException) -> str:
    """Returns the message of a recipe's error in one line."""
    if isinstance(error, SystemExit):
        return "it ends the process: expected get_config() to return an ifm_jax.config.Config"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be read ({error.strerror})"
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}".removesuffix(": ")
