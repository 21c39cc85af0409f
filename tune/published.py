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

Rendered by `python -m tune.study` from `published.csv`, which holds the same in fractions; do not edit. Accuracies are
in percent. A study selects by validation alone, unless its variant is `as_reported`. The interval is a 95% t interval
over seeds or folds where there are several, else the Wilson interval of n images. Where ours is empty the remarks say
why. Each folder `STUDY/VARIANT` holds a run's tables and figures; `python -m tune.report results/STUDY/VARIANT` writes
its page. What did not work is in [LOG.md](LOG.md).
"""


def update(folder: Path, known: Iterable[tuple[str, str, Sequence[Row]]], made: Sequence[Row]) -> None:
    """Replace a study's rows by what was made of them, and render.

    Args:
        folder: where published.csv and README.md lie.
        known: of every study and variant the rows of a run that did not take place, in the order of the table.
        made: the rows of one study and variant.
    """
    place = folder / "published.csv"
    kept: dict[tuple[str, str], list[Row]] = {}
    for row in [*read_csv(place), *made]:
        kept.setdefault((row["study"], row["variant"]), []).append(row)
    for row in made:
        kept[row["study"], row["variant"]] = list(made)
    rows = [row for study, variant, unrun in known for row in kept.get((study, variant), unrun)]
    write_csv(place, COLUMNS, rows)
    render(folder)


def render(folder: Path) -> None:
    """Write README.md from published.csv."""
    rows = read_csv(folder / "published.csv")
    parts = [INTRODUCTION]
    for report, of_report in groupby(rows, key=lambda row: row["study"].partition("-")[0]):
        parts.append(f"\n## {report.capitalize()}\n")
        parts.append("| study | metric | published | ours | 95% interval | n | scale, seed | remarks |")
        parts.append("|---|---|---|---|---|---|---|---|")
        commands: dict[str, str] = {}
        for row in of_report:
            name = f"{row['study']}, {row['variant']}"
            place = f"{row['study']}/{row['variant']}"
            label = f"[{name}]({place})" if (folder / place).is_dir() else name
            metric = row["metric"]
            interval = f"{shown(metric, row['low'])} to {shown(metric, row['high'])}" if row["low"] else ""
            scale = "; ".join(filter(None, (row["scale"], f"seed {row['seed']}" if row["seed"] else "")))
            cells = (
                label, metric, shown(metric, row["published"]), shown(metric, row["ours"]), interval, row["n"], scale,
                row["reason"],
            )  # fmt: skip
            parts.append(f"| {' | '.join(cells)} |")
            if row["ours"]:
                commands[name] = f"`{row['command']}` on {row['hardware']}"
        if commands:
            parts.append("")
            parts += [f"- {name}: {command}" for name, command in commands.items()]
    write_atomically(folder / "README.md", "\n".join(parts) + "\n")


def shown(metric: str, value: str) -> str:
    """A figure of the table: accuracies in percent with one decimal, losses and scores with three."""
    if not value:
        return ""
    number = float(value)
    sign = "+" if " over " in metric and number > 0 else ""
    if "acc" in metric or "class_std" in metric:
        return f"{sign}{100 * number:.1f}"
    return f"{sign}{number:.1f}" if "seconds" in metric else f"{sign}{number:.3f}"
