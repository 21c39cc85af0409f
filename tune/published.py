"""Published against ours: results/published.csv, and results/README.md, which is rendered from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from cifar_lab.files import read_csv, write_atomically, write_csv

COLUMNS = (
    "study", "variant", "metric", "published", "ours", "low", "high", "n", "seed", "scale", "hardware", "command",
    "reason",
)  # fmt: skip
Row = Mapping[str, Any]

INTRODUCTION = """# Results

Rendered by `python -m tune.study` from `published.csv`, which holds the same in fractions; do not edit: after a change
of `tune/studies`, `python -m tune.study --render` tells the runs that lie here anew. Accuracies are in percent. A study
selects by validation alone, unless its variant is `as_reported`. The interval is a 95% t interval over seeds or folds
where there are several, else the Wilson interval of n images. Where ours is empty the remarks say why. Each folder
`STUDY/VARIANT` holds a run's tables and figures; `python -m tune.report results/STUDY/VARIANT` writes its page. Each
reading of the test set is a line of its `test_readings.jsonl`; the runs of 000-final, 003-lr and, corrected,
001-classic-cnn are older than that log and have none. The folders `speed_cnn_94-seed-N` and `speed_cnn_96-seed-N` are
trainings of the presets of that name, which are no study: [LOG.md](LOG.md) tells them, and what did not work.
"""


def update(folder: Path, known: Iterable[tuple[str, str, Sequence[Row]]], made: Sequence[Row]) -> None:
    """Replace the rows of studies by what was made of them, and render.

    Args:
        folder: where published.csv and README.md lie.
        known: of every study and variant the rows of a run that did not take place, in the order of the table.
        made: the rows of studies and variants that were run, of each all of them.
    """
    place = folder / "published.csv"
    kept = {run: rows for run, rows in by_run(read_csv(place)).items() if any(row["ours"] for row in rows)}
    kept |= by_run(made)
    rows = [row for study, variant, unrun in known for row in kept.get((study, variant), unrun)]
    write_csv(place, COLUMNS, rows)
    render(folder)


def by_run(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each study and variant."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row["study"], row["variant"]), []).append(row)
    return runs


def render(folder: Path) -> None:
    """Write README.md from published.csv: a table a report, then how each of its studies was run."""
    from cifar_lab.report import apart

    parts = [INTRODUCTION]
    for report, of_report in groupby(read_csv(folder / "published.csv"), key=lambda row: row["study"].split("-")[0]):
        parts.append(f"## {report.capitalize()}\n")
        parts.append("| study | metric | published | ours | 95% interval | n | remarks |")
        parts.append("|---|---|---|---|---|---|---|")
        runs = []
        for (study, variant), found in groupby(of_report, key=lambda row: (row["study"], row["variant"])):
            rows = list(found)
            remarks, common = apart([row["reason"] for row in rows])
            name, place = f"{study}, {variant}", f"{study}/{variant}"
            label = f"[{name}]({place})" if (folder / place).is_dir() else name
            for row, own in zip(rows, remarks, strict=True):
                metric = row["metric"]
                interval = f"{shown(metric, row['low'])} to {shown(metric, row['high'])}" if row["low"] else ""
                figures = shown(metric, row["published"]), shown(metric, row["ours"])
                cells = label, metric, *figures, interval, row["n"], own
                parts.append(f"| {' | '.join(cells)} |")
            ran = next((row for row in rows if row["ours"]), None)
            how = ""
            if ran:
                how = f"{ran['scale']}; seed {ran['seed']}; {ran['hardware']}; `{ran['command']}`; "
            runs.append(f"- **{name}**: {how}{common}".rstrip("; ").rstrip(": "))
        parts += ["", *runs, ""]
    write_atomically(folder / "README.md", "\n".join(parts))


def shown(metric: str, value: str) -> str:
    """A figure of the table: accuracies in percent with one decimal, losses and scores with three, whole epochs."""
    if not value:
        return ""
    number = float(value)
    sign = "+" if " over " in metric and number > 0 else ""
    if "acc" in metric or "class_std" in metric:
        return f"{sign}{100 * number:.1f}"
    if metric == "class_var":  # of percentages, as published
        return f"{1e4 * number:.1f}"
    if "best_epoch" in metric:
        return f"{number:.0f}"
    return f"{sign}{number:.1f}" if "seconds" in metric else f"{sign}{number:.3f}"
