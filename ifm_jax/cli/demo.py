"""Pre-trains with InfoNCE and with IFM on the embedded images, and shows what each has learned and suppressed.

    ifm-jax demo                one pair of runs, a few minutes on two CPU cores
    ifm-jax demo --seeds=5      five pairs

Each difference stands beside that of the study (docs/studies.md), since a single pair is mostly noise. The workdir is
that of a study: results.json, results.md and pictures, and a workdir for each run. Finished runs are not repeated. In
a clone, make demo and python demo.py are the same.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ifm_jax.cli import command
from ifm_jax.cli.config_flag import ConfigFlag
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.cli.study import say_stopped
from ifm_jax.config import Group, field
from ifm_jax.errors import UsageError

_SOURCE = "trifeature"  # of the study
_LABELS = ("mean", "worst", "shape", "texture", "color")


@dataclasses.dataclass(slots=True)
class Options(Group):
    """The command's flags."""

    seeds: int = field(1, "Number of pairs of runs.", expected="an integer")
    workdir: str = field("runs/demo", "Directory for all results.")
    jobs: int = field(0, "Runs at a time; 0: as many as processors.", least=0, expected="a whole number of at least 0")


def flags() -> Flags:
    """Returns the flags of the command."""
    return Flags(Options, __doc__, ConfigFlag("ifm_simclr_trifeature"))


def main(given: Given) -> int:
    """Trains, reads out, reports; returns the exit status."""
    from ifm_jax.studies import Comparison, Study, findings, report, runner, study

    given.refuse_arguments()
    options = given.options
    if options.seeds < 1:
        raise UsageError(f"--seeds={options.seeds}: expected at least 1")
    begun = time.perf_counter()
    base, confirmation = given.config(), study.load(findings.STUDY)
    infonce, ifm = list(confirmation.arms)[:2]
    demo = Study(
        question="What does IFM change, in these runs and in the study's?",
        sources={_SOURCE: base},
        arms={name: confirmation.arms[name] for name in (infonce, ifm)},
        seeds=range(base.seed, base.seed + options.seeds),
        comparisons=[Comparison(ifm, infonce, labels=_LABELS)],
    )
    command.workdir(options.workdir)
    print("Draws images whose shape, texture and color vary independently, and pre-trains a small network on them.")
    try:
        results = runner.run(demo, "demo", options.workdir, jobs=options.jobs)
    except runner.Stopped as stopped:
        return say_stopped(stopped, options.workdir)
    report.write(results, options.workdir)
    print()
    _print_readouts(results["rows"])
    _print_differences(results["comparisons"], f"{ifm} less {infonce}")
    print(f"Written to {options.workdir}: results.md, results.json, pictures, and a workdir for each run with its")
    print("samples.png (images and their views), curves.png and metrics.jsonl.")
    print(f"Took {(time.perf_counter() - begun) / 60:.1f} minutes.")
    return 0


def _print_readouts(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the untrained network and each run."""
    from ifm_jax.evaluation import report
    from ifm_jax.evaluation.readout import Readouts

    first = rows[0]
    shown = [Readouts("untrained", 0, first["untrained"], first["seed"])]
    shown += [Readouts(f"{row['arm']}, seed {row['seed']}", row["steps"], row["readout"], row["seed"]) for row in rows]
    report.print_table(shown)


def _print_differences(comparisons: Sequence[Mapping[str, Any]], title: str) -> None:
    """Prints each difference beside that of the study."""
    import rich.console
    import rich.table

    from ifm_jax.studies import findings

    table = rich.table.Table(title=f"{title}, in points")
    for column in ("", "this pair" if comparisons[0]["pairs"] == 1 else "these pairs", "the study"):
        table.add_column(column, justify="left" if not column else "right")
    for here in comparisons:
        found = findings.find(here["a"], here["b"], here["source"], here["label"])
        table.add_row(here["label"], _shown(here), _shown(found) if found else "-")
    rich.console.Console().print(table)
    if not findings.read():
        print("The study's runs are not all done, so its column is empty.")
    print("In brackets: the 95 % interval of the mean over pairs of runs. A single pair has none, and is mostly noise:")
    print("another seed changes it by several points. What the study asks and has found: docs/studies.md.")


def _shown(found: Mapping[str, Any]) -> str:
    """Returns `+1.2 [+0.3, +2.1], 16 pairs`."""
    if found["ci95"] is None:
        return f"{found['mean']:+.1f}"
    low, high = found["ci95"]
    return f"{found['mean']:+.1f} [{low:+.1f}, {high:+.1f}], {found['pairs']} pairs"


def run() -> None:
    """Runs the command with the arguments of the process, and ends the process."""
    command.run(main, flags())
