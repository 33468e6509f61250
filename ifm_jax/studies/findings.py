"""What the package's own study found: the comparisons of docs/studies/confirmation, shipped for the demo."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

STUDY = "studies/confirmation"
PATH = pathlib.Path(__file__).with_name("findings.json")


def read() -> list[dict[str, Any]]:
    """Returns the comparisons, as `statistics.compare` makes them, of the confirmation."""
    return json.loads(PATH.read_text())["comparisons"]


def find(a: str, b: str, source: str, label: str) -> Mapping[str, Any] | None:
    """Returns the comparison of two arms in a label of a source, or None if the study has none."""
    for each in read():
        if (each["a"], each["b"], each["source"], each["label"]) == (a, b, source, label):
            return each
    return None
