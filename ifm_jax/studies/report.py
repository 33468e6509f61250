"""What a study found, in words, tables and pictures, from its results.json."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.markup
import rich.table

from ifm_jax import files
from ifm_jax.studies import pictures, statistics
from ifm_jax.studies.statistics import Rows
from ifm_jax.studies.study import MEAN, WORST, number_of

# What a row tells of its arm's config, with the words of the report.
_SETTINGS = {
    "method": "method",
    "objective": "objective",
    "epsilon": "epsilon",
    "alpha": "alpha",
    "temperature": "temperature",
    "beta": "beta",
    "optimizer": "optimizer",
    "lr": "learning rate",
    "batch_size": "batch size",
    "queue_size": "queue size",
    "steps": "steps",
}
_COMPARISON_COLUMNS = ("comparison", "source", "label", "mean", "s.e.", "95 % interval", "wins/pairs", "p", "Holm p")
_PICTURES = {
    "summary.png": "differences between arms in the mean and the worst label, with 95 % intervals",
    "effects.png": "differences between arms with 95 % intervals",
    "trade_offs.png": "readouts against temperature, beta and epsilon",
    "loss_error.png": "loss against the error of the readouts",
}


def markdown(results: Mapping[str, Any], shown: Sequence[str] = ()) -> str:
    """Returns the report of a study: every arm with its settings, every comparison, and what they were made with.

    Args:
      results: contents of results.json: `study`, `question`, `date`, `device`, `versions`, `commit`, `rows` and
        `comparisons`, the last from `statistics.compare`.
      shown: names of the pictures beside the report, which it then shows.
    """
    rows, comparisons = results["rows"], results["comparisons"]
    sources = _distinct(rows, "source")
    parts = [f"# {results['study']}", results["question"], _count(rows)]
    parts.append(
        "A readout is the held-out accuracy, in percent, of a linear classifier on the frozen backbone. `mean` is the "
        "mean over a run's labels, `worst` its lowest label. `loss` is the contrastive loss without IFM's shift at the "
        "run's own temperature and hardness, so that it compares only arms that share them. `acc1` is the contrast "
        "accuracy in percent; both are those of the end of training. `gradient norm` is the mean over the run. Entries "
        "are means over the runs ± their standard errors; a single run has none. The network before training is the "
        "first row."
    )
    if rows:
        parts.append("## Arms")
    for source in sources:
        of_source = [row for row in rows if row["source"] == source]
        shared, columns, lines = _settings(of_source)
        parts += [f"### {source}", _table(*_arms(of_source))]
        parts += [shared] if shared else []
        parts += [_table(columns, lines)] if len(columns) > 1 else []
    parts += ["## Comparisons", _comparison_text(comparisons)]
    if comparisons:
        ordered = statistics.confirmatory_first(comparisons)
        lines = _comparison_lines(ordered)
        for line, entry in zip(lines, ordered, strict=True):
            if entry["confirmatory"]:
                line[0] = f"**{line[0]}**"
        parts.append(_table(_COMPARISON_COLUMNS, lines, left=3))
    parts += [f"![{text}]({name})" for name, text in _PICTURES.items() if name in shown]
    parts += ["## Made with", _made_with(results)]
    return "\n\n".join(parts) + "\n"


def print_report(results: Mapping[str, Any], console: rich.console.Console | None = None) -> None:
    """Prints for each source its arms and its comparisons, with fewer columns than the Markdown has.

    Args:
      results: contents of results.json, as for `markdown`.
      console: where to print; None: the terminal.
    """
    console = console or rich.console.Console()
    rows, comparisons = results["rows"], results["comparisons"]
    console.print(_count(rows), markup=False, highlight=False)
    for source in _distinct(rows, "source"):
        columns, lines = _arms([row for row in rows if row["source"] == source])
        table = _rich_table(f"{source}: readouts in percent, mean±standard error over the runs", columns[:-1])
        for name, *cells in lines:
            short = [cell.replace(" ± ", "±") for cell in cells[:-3]] + [cell.split(" ")[0] for cell in cells[-3:-1]]
            table.add_row(rich.markup.escape(name), *short)
        console.print(table)
        console.print()
    ordered = statistics.confirmatory_first(comparisons)
    for source in dict.fromkeys(entry["source"] for entry in ordered):
        of_source = [entry for entry in ordered if entry["source"] == source]
        columns = [column for column in _COMPARISON_COLUMNS if column not in ("source", "s.e.")]
        table = _rich_table(f"{source}: differences in points, paired by seed; bold: confirmatory", columns)
        last = None
        for entry, (name, _, label, mean, _, *cells) in zip(of_source, _comparison_lines(of_source), strict=True):
            style = "bold" if entry["confirmatory"] else None
            table.add_row(rich.markup.escape(name if name != last else ""), label, mean, *cells, style=style)
            last = name
        console.print(table)
        console.print()


def write(results: Mapping[str, Any], directory: str | os.PathLike[str]) -> None:
    """Writes results.md, summary.png, effects.png, trade_offs.png and loss_error.png, each replaced atomically.

    A picture without contents, as trade_offs.png where no two arms differ in an axis alone, is not written, and an
    older one is removed.

    Args:
      results: contents of results.json, as for `markdown`.
      directory: an existing directory.

    Raises:
      OSError: if a file cannot be written.
    """
    directory = pathlib.Path(directory)
    rows = results["rows"]
    drawn = {
        "summary.png": pictures.draw_summary(rows, results["comparisons"], directory / "summary.png"),
        "effects.png": pictures.draw_effects(rows, results["comparisons"], directory / "effects.png"),
        "trade_offs.png": pictures.draw_trade_offs(rows, directory / "trade_offs.png"),
        "loss_error.png": pictures.draw_loss_against_error(rows, directory / "loss_error.png"),
    }
    for name in (name for name, is_drawn in drawn.items() if not is_drawn):
        (directory / name).unlink(missing_ok=True)
    with files.replacing(directory / "results.md") as temporary:
        text = markdown(results, [name for name, is_drawn in drawn.items() if is_drawn])
        temporary.write_text(text, encoding="utf-8")


def _distinct(rows: Rows, field: str) -> list[Any]:
    return list(dict.fromkeys(row[field] for row in rows))


def _count(rows: Rows) -> str:
    """Returns the sentences that count the runs, and name each source and arm."""
    if not rows:
        return "0 runs."
    sources, arms, seeds = (_distinct(rows, field) for field in ("source", "arm", "seed"))
    text = (
        f"{number_of(len(rows), 'run')}: {number_of(len(sources), 'source')} ({'; '.join(sources)}), "
        f"{number_of(len(arms), 'arm')} ({'; '.join(arms)}), "
        f"{number_of(len(seeds), 'seed')} ({_ranges(seeds)})."
    )
    missing = len(sources) * len(arms) * len(seeds) - len(rows)
    return text + (f" {missing} of {len(rows) + missing} combinations have no run." if missing > 0 else "")


def _ranges(seeds: Sequence[int]) -> str:
    """Returns `0 to 15, 20` for the seeds 0 ... 15 and 20."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in runs)


def _summary(values: Sequence[float | None], digits: int) -> str:
    """Returns mean ± standard error of those values that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, stderr = statistics.mean_and_stderr(known)
    return f"{mean:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _arms(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and the lines of a source's table of arms."""
    labels = [*dict.fromkeys(label for row in rows for label in row["readout"]), MEAN, WORST]
    columns = ["arm", "runs", *labels, "loss", "acc1", "gradient norm"]
    lines = []
    if any(row.get("untrained") for row in rows):
        # Arms with the same seed share the untrained network: it counts once.
        seeds = [[row for row in rows if row["seed"] == seed] for seed in _distinct(rows, "seed")]
        untrained = [
            _summary([_mean([statistics.value(row, label, "untrained") for row in of_seed]) for of_seed in seeds], 1)
            for label in labels
        ]
        lines.append(["untrained network", "-", *untrained, "-", "-", "-"])
    for arm in _distinct(rows, "arm"):
        runs = [row for row in rows if row["arm"] == arm]
        cells = [_summary([statistics.value(row, label) for row in runs], 1) for label in labels]
        for field, digits in (("loss_clean", 3), ("acc1", 1), ("grad_norm", 3)):
            cells.append(_summary([row.get(field) for row in runs], digits))
        lines.append([arm, str(len(runs)), *cells])
    return columns, lines


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _settings(rows: Rows) -> tuple[str, list[str], list[list[str]]]:
    """Returns a sentence about the settings that all arms share, and columns and lines of a table of the others."""
    arms = _distinct(rows, "arm")
    of_arms = {
        field: [" / ".join(dict.fromkeys(_setting(row, field) for row in rows if row["arm"] == arm)) for arm in arms]
        for field in _SETTINGS
        if any(_setting(row, field) != "-" for row in rows)
    }
    same = [f"{_SETTINGS[field]} {texts[0]}" for field, texts in of_arms.items() if len(set(texts)) == 1]
    columns = [field for field, texts in of_arms.items() if len(set(texts)) > 1]
    lines = [[arm, *(of_arms[field][number] for field in columns)] for number, arm in enumerate(arms)]
    sentence = f"All arms: {', '.join(same)}." if same else ""
    return sentence, ["arm", *(_SETTINGS[field] for field in columns)], lines


def _setting(row: Mapping[str, Any], field: str) -> str:
    """Returns a field of an arm's config, or - where it plays no part."""
    value = row.get(field)
    unused = {"infonce": ("epsilon", "alpha"), "ifm_only": ("alpha",)}.get(row["objective"], ())
    if value is None or field in unused:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _comparison_text(comparisons: Sequence[Mapping[str, Any]]) -> str:
    if not comparisons:
        return "No two arms have a run of the same seed, or the study asks for no comparison."
    confirmatory = sum(bool(entry["confirmatory"]) for entry in comparisons)
    return (
        "Each line is a difference in points between two arms, in pairs of runs of the same seed: mean, standard "
        "error (s.e.), interval and p of the paired t test; a single pair has neither. Wins are the pairs above 0. "
        f"{confirmatory} of {number_of(len(comparisons), 'line')} belong{'s' if confirmatory == 1 else ''} to "
        "confirmatory comparisons, fixed before the runs, in bold. Holm p is p corrected for the number of these; the "
        "other lines are exploratory and not corrected."
    )


def _comparison_lines(comparisons: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns the lines of a table with `_COMPARISON_COLUMNS`."""
    lines: list[list[str]] = []
    for entry in comparisons:
        low, high = entry["ci95"] or (None, None)
        lines.append(
            [
                entry["name"],
                entry["source"],
                entry["label"],
                f"{entry['mean']:+z.2f}",
                "-" if entry["stderr"] is None else f"{entry['stderr']:.2f}",
                "-" if low is None else f"{low:+z.2f} to {high:+z.2f}",
                f"{entry['positive']}/{entry['pairs']}",
                _p(entry["p"]),
                _p(entry["p_holm"]),
            ]
        )
    return lines


def _p(value: float | None) -> str:
    return (
        "-" if value is None else "< 0.0001" if value < 0.0001 else f"{value:.4f}" if value < 0.01 else f"{value:.2f}"
    )


def _made_with(results: Mapping[str, Any]) -> str:
    if not results["rows"]:
        return "No run is finished yet."
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    text = f"{results['date']}, on {results['device']}, with {versions}, "
    # Runs of an earlier session keep what they were made with.
    commits = [commit for commit in dict.fromkeys(row.get("commit") for row in results["rows"]) if commit]
    if not commits or commits == [results["commit"]]:
        return text + f"at commit {results['commit']}."
    counts = [sum(row.get("commit") == commit for row in results["rows"]) for commit in commits]
    each = ", ".join(f"{commit} ({number_of(n, 'run')})" for commit, n in zip(commits, counts, strict=True))
    return text + f"at the commits {each}."


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns a table in Markdown; all but the first columns are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in (columns, rule, *lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def _rich_table(title: str, columns: Sequence[str]) -> rich.table.Table:
    """Returns an empty table; all but the first column are aligned to the right."""
    table = rich.table.Table(title=rich.markup.escape(title), box=rich.box.SIMPLE_HEAD, padding=0, show_edge=False)
    for number, column in enumerate(columns):
        name = rich.markup.escape(column)
        if number:
            table.add_column(name, justify="right", overflow="fold")
        else:
            table.add_column(name, overflow="fold", min_width=16)
    return table
