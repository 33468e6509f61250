"""Actions that the hosts of a run do together: all of them succeed, or all of them end."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from ifm_jax import sharding
from ifm_jax.errors import UsageError

Answer = TypeVar("Answer")


def together(action: Callable[[], Answer], facts: Callable[[Answer], Mapping[str, Any]] = lambda _: {}) -> Answer:
    """Does a part of the start on every host; ends all of them if one fails or if their facts differ.

    Args:
      action: what this host does.
      facts: returns the facts about the answer on which all hosts must agree, by name, as JSON.

    Returns:
      This host's answer.

    Raises:
      UsageError: the error of this or another host, or one that names the facts that differ.
    """
    if jax.process_count() == 1:
        return action()
    try:
        answer = action()
        mine = {"facts": dict(facts(answer))}
    except (UsageError, OSError) as error:
        sharding.gather_text(json.dumps({"error": str(error)}))  # for the others
        raise UsageError(str(error)) from None
    every = [json.loads(text) for text in sharding.gather_text(json.dumps(mine))]
    differing: list[str] = []
    for number, other in enumerate(every):
        if "error" in other:
            raise UsageError(f"process {number} cannot start: {other['error']}")
        theirs, ours = other["facts"], every[0]["facts"]
        differing += [
            f"{name}: {ours.get(name)!r} on process 0, {theirs.get(name)!r} on process {number}"
            for name in ours | theirs
            if ours.get(name) != theirs.get(name)
        ]
    if differing:
        more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UsageError(
            f"the processes differ in {'; '.join(differing[:5])}{more}: start all of them with the same command, code "
            "and images"
        )
    return answer
