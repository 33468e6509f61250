"""Recipes: Python files with a function `get_config() -> Config`, found by path or by name."""

import ast
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
from typing import Any, TypeVar

from ifm_jax.config import Config, check_fields, shown
from ifm_jax.errors import UsageError

_HERE = pathlib.Path(__file__).resolve().parent
# The package's own recipes: inside an installed package, beside it in a checkout.
DIRECTORY = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"
# The default recipe of a command.
DEFAULT = str(DIRECTORY / "trifeature.py")
_EXAMPLE = "a recipe, for example trifeature (ifm-jax config --list)"
_PACKAGE, _BY_PATH = "ifm_jax.configs", "ifm_jax_recipe"


def name_of(recipe: str | os.PathLike[str]) -> str:
    """Returns the name of a recipe given by path or by name: `trifeature` for `configs/trifeature.py`."""
    return pathlib.Path(recipe).stem


def described() -> dict[str, str]:
    """Returns name -> first line of the docstring for the recipes of the package, and for its studies after them."""
    found = {}
    for folder in ("", "studies"):
        for path in sorted((DIRECTORY / folder).glob("*.py")):
            if path.stem != "__init__":
                text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
                found[f"{folder}/{path.stem}".lstrip("/")] = text.partition("\n")[0]
    return found


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
    config = load_from(recipe, "get_config", Config)
    try:
        check_fields(config)
    except UsageError as error:
        raise UsageError(f"--config={recipe}: {error}") from None
    return config


Made = TypeVar("Made")


def load_from(path: str | os.PathLike[str], function: str, kind: type[Made], example: str = _EXAMPLE) -> Made:
    """Returns what a function in a file of `configs/`, or in one like these, makes.

    Args:
      path: path or name of the file, as for `load`; the name of a study is `studies/confirmation`.
      function: name of the function, which takes no arguments.
      kind: expected type of its result.
      example: what the error for a missing file expects.

    Raises:
      UsageError: see `load`.
    """
    (found, by_name), flag = _find(path, example), f"--config={path}"
    expected = f"{kind.__module__}.{kind.__qualname__}"
    try:
        with _named(found) if by_name else _at(found) as module:
            make = getattr(module, function, None)
            if not callable(make):
                other = next((each for each in ("get_config", "get_study") if hasattr(module, each)), None)
                hint = f"; it has {other}()" if other else ""
                raise UsageError(f"{flag} has no function {function}(): expected one that returns an {expected}{hint}")
            if _needs_arguments(make):
                raise UsageError(f"{flag}: {function}() takes arguments: expected a function without arguments")
            made = make()
    except UsageError as error:
        text = str(error)
        raise UsageError(text if text.startswith("--config=") else f"{flag}: {text}") from None
    except (Exception, SystemExit) as error:
        raise UsageError(f"{flag}{_line(error, found)}: {_reason(error, function, expected)}") from None
    if not isinstance(made, kind):
        missing = (
            f": does it end with `return {kind.__name__.lower()}`?" if made is None else f", expected an {expected}"
        )
        raise UsageError(f"{flag}: {function}() returned {shown(made)}{missing}")
    return made


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[types.ModuleType]:
    """Yields a recipe of the package as its module."""
    if _PACKAGE not in sys.modules:  # in a checkout the import system does not find it
        loader = importlib.machinery.SourceFileLoader(_PACKAGE, str(DIRECTORY / "__init__.py"))
        sys.modules[_PACKAGE] = _new_module(_PACKAGE, loader)
        loader.exec_module(sys.modules[_PACKAGE])
    parts = path.relative_to(DIRECTORY).with_suffix("").parts
    yield importlib.import_module(".".join((_PACKAGE, *parts)))


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


def _find(recipe: str | os.PathLike[str], example: str) -> tuple[pathlib.Path, bool]:
    """Returns the file of a recipe and whether it was given by name."""
    given = pathlib.Path(recipe)
    try:
        if given.is_file():
            return given.absolute(), False  # a recipe finds its neighbors by its __file__
        named = DIRECTORY / f"{given}.py"
        if not given.is_absolute() and ".." not in given.parts and named.is_file():
            return named, True
        is_there = given.exists()
    except (OSError, ValueError):  # a name that no file can have
        is_there = False
    if is_there:
        raise UsageError(f"--config={recipe} is a directory: expected {example}")
    near = _near(given)
    hint = f": did you mean {near}?" if near else f": expected {example}"
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


def _reason(error: BaseException, function: str, expected: str) -> str:
    """Returns the message of a recipe's error in one line."""
    if isinstance(error, SystemExit):
        return f"it ends the process: expected {function}() to return an {expected}"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be read ({error.strerror})"
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}".removesuffix(": ")
