"""Code shared by the benchmarks: a table on the terminal and a JSON file."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from ifm_jax.errors import UsageError

OWN = ("ifm_jax", "jax", "jaxlib", "flax", "optax", "numpy")  # distributions that every benchmark runs on

_WIDTH = 120  # of a table in characters, where there is no terminal to ask


def report(benchmark: str, results: Sequence[dict], summary: dict[str, Any], others: Sequence[str] = ()) -> dict:
    """Returns what the JSON file holds.

    Args:
      benchmark: its name.
      results: rows; they need not have the same fields.
      summary: ratios of medians from one run, and the like.
      others: distributions whose versions count too, where they are installed.
    """
    return {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "device": device(),
        "versions": {"python": platform.python_version()} | _versions((*OWN, *others)),
        "results": list(results),
        "summary": summary,
    }


def device() -> str:
    """Returns what JAX computes on here, how many processors there are, and which: ratios depend on their vectors."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} processors ({processor()})"


def processor(described: str | None = None) -> str:
    """Returns the processor's architecture, model, and widest vectors, such as "x86_64, AMD EPYC 7B13, AVX2".

    Args:
      described: text like that of /proc/cpuinfo; None: this machine's, of which only the architecture is known where
        there is no such file.
    """
    if described is None:
        cpuinfo = pathlib.Path("/proc/cpuinfo")
        described = cpuinfo.read_text() if cpuinfo.exists() else ""
    fields = dict(re.findall(r"^(\w[\w ]*?)\s*: (.*)$", described, re.MULTILINE))
    named, flags = [platform.machine()], set(fields.get("flags", "").split())
    if model := re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b", "", fields.get("model name", "")):
        named.append(" ".join(model.split()))
    if flags:
        vectors = ((name, label) for name, label in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if name in flags)
        named.append(next(vectors, ("", "no AVX2"))[1])
        named.append("bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "no bfloat16")
    return ", ".join(named)


def check_path(path: str | None, flag: str = "json") -> None:
    """Checks, before minutes are spent on it, that a report can be written there.

    Args:
      path: of the file; None: none is wanted.
      flag: name of the flag that gave it.

    Raises:
      UsageError: if it cannot.
    """
    if path is None:
        return
    folder = pathlib.Path(path).absolute().parent
    if not folder.is_dir() or pathlib.Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"--{flag}={path} cannot be written: expected a file in an existing, writable folder")


def write(made: dict, path: str | None) -> None:
    """Writes a report.

    Args:
      made: by `report`.
      path: of the JSON file; None: none is wanted.
    """
    if path is not None:
        pathlib.Path(path).write_text(json.dumps(made, indent=1) + "\n")


def print_table(title: str, rows: Sequence[dict], columns: Mapping[str, str | Callable[[Any], str]]) -> None:
    """Prints rows; a value that a row lacks, or that is None, is left out.

    Args:
      title: over the table.
      rows: of a report.
      columns: the fields to show, each with how it is written: a format specification, or a function.
    """
    table = Table(title=title, title_justify="left")
    for name, written in columns.items():
        table.add_column(name.replace("_", " "), justify="left" if written == "" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_written(row.get(name), written) for name, written in columns.items()))
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)


def _written(value: Any, written: str | Callable[[Any], str]) -> str:
    if value is None:
        return ""
    return written(value) if callable(written) else format(value, written)


def _versions(distributions: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
