"""Runs a study: settings x seeds, compared in pairs.

    ifm-jax study --config=studies/confirmation --workdir=DIR [--jobs=N]
    ifm-jax study --workdir=DIR --report               tables and pictures anew, from results.json

Finished runs are not repeated and stopped ones go on, so the same command resumes a study, and one with more seeds adds
to it.
"""

import dataclasses
from typing import TYPE_CHECKING

from ifm_jax import recipes
from ifm_jax.cli import command
from ifm_jax.cli.flags import Flags, Given
from ifm_jax.config import Group, field
from ifm_jax.errors import UsageError

if TYPE_CHECKING:
    from ifm_jax.studies import runner


@dataclasses.dataclass(slots=True)
class Options(Group):
    """The command's flags."""

    config: str = field("", "File with the study, or a study of the package, such as studies/confirmation.")
    workdir: str = field("", "Directory of the study.")
    jobs: int = field(
        0,
        "Runs at a time, each on its own processor; 0: as many as processors, or 4 on an accelerator.",
        least=0,
        expected="a whole number of at least 0",
    )
    report: bool = field(False, "Run nothing: draw tables and pictures anew from results.json.")


def flags() -> Flags:
    """Returns the flags of the command."""
    return Flags(Options, __doc__)


def main(given: Given) -> int:
    """Runs the study or reports it; returns the exit status."""
    given.refuse_arguments()
    options = given.options
    if not options.workdir:
        raise UsageError("no --workdir given: expected the directory of the study")
    if not options.config and not options.report:
        raise UsageError("no --config given: expected a study, for example studies/confirmation")
    command.workdir(options.workdir)
    from ifm_jax.studies import runner, study

    if options.report:
        from ifm_jax.studies import report

        report.write(runner.read_results(options.workdir), options.workdir)
        return 0
    name = recipes.name_of(options.config)
    try:
        results = runner.run(study.load(options.config), name, options.workdir, jobs=options.jobs)
    except runner.Stopped as stopped:
        return say_stopped(stopped, options.workdir)
    from ifm_jax.studies import report

    report.print_report(results)
    report.write(results, options.workdir)
    return 0


def say_stopped(stopped: "runner.Stopped", workdir: str) -> int:
    """Tells how to resume a study that a signal stopped; returns the exit status."""
    print(
        f"Stopped by {stopped.signal.name} after {stopped.done} of {stopped.total} runs; those under way are saved in "
        f"{workdir}. The same command resumes the study."
    )
    return 128 + stopped.signal


def run() -> None:
    """Runs the command with the arguments of the process, and ends the process."""
    command.run(main, flags())
