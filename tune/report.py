"""A search's page, report.html; python -m tune.report DIR."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cifar_lab import cli, plots
from cifar_lab import report as run_report
from cifar_lab.files import write_atomically
from cifar_lab.recipe import InputError
from cifar_lab.report import note, percent, picture, section, table
from tune.space import SPACES, LogUniform


def searched(trials: pd.DataFrame) -> list[str]:
    """The searched fields: what stands between trial_id and epochs in trials.csv."""
    columns = list(trials.columns)
    return columns[1 : columns.index("epochs")]


def edges(recipe: dict[str, Any], fields: Sequence[str]) -> list[str]:
    """A warning for each searched field whose value in the recipe sits on the edge of its range."""
    space = SPACES[recipe["arch"]].search
    sides = {name: space[name].at_edge(recipe[name]) for name in fields if name in space}
    return [
        f"{name} {recipe[name]:g} sits on the {side} edge of its range ({space[name]}): better values may lie beyond."
        for name, side in sides.items()
        if side
    ]


def winner_section(folder: Path, best: dict[str, Any], fields: Sequence[str]) -> str:
    """Which settings won, against which other finalists, and whether they sit on an edge."""
    finalists = pd.read_csv(folder / "finalists.csv", dtype={"trial_id": str})
    groups = finalists.groupby("trial_id").val_acc
    rows = [
        (str(trial), percent(values.mean(), 2), percent(values.std(ddof=1), 2) if len(values) > 1 else "", len(values))
        for trial, values in sorted(groups, key=lambda group: -group[1].mean())
    ]
    seeds = ", ".join(percent(accuracy, 2) for accuracy in best["test_acc_seeds"])
    settings = table([(name, str(best["recipe"][name])) for name in fields], ("field", "value")) if fields else ""
    return section(
        f"Winner: {best['trial_id']}",
        settings,
        "".join(f"<p><strong>{text}</strong></p>" for text in edges(best["recipe"], fields)),
        note(
            "The best trials by val_acc were trained anew from scratch with new seeds; the highest mean val_acc wins, "
            f"and only its checkpoints were read on the test set, once each: {seeds}."
        ),
        table(rows, ("finalist", "mean val_acc", "std (ddof 1)", "seeds")),
    )


def trial_sections(
    folder: Path, trials: pd.DataFrame, fields: Sequence[str], arch: str, max_epochs: int, winner: str
) -> list[str]:
    """What the trials' settings did, and what stopping them saved."""
    measured = trials[trials.epochs > 0]
    counts = ", ".join(f"{n} {status}" for status, n in trials.status.value_counts().items())
    rungs = sorted({int(r) for reason in trials.reason.dropna() for r in re.findall(r"^rung (\d+)", reason)})
    trained, full = int(trials.epochs.sum()), len(trials) * max_epochs
    saved = percent(1 - trained / full, 0)
    plots.save(plots.stops(trials.epochs.tolist(), rungs, max_epochs), folder / "figures" / "stops.png")
    sections = [
        section(
            "What stopping saved",
            picture(folder / "figures" / "stops.png", "Trials under way after each epoch; rungs dashed"),
            note(f"{trained:,} epochs of the {full:,} that running all would take: {saved} saved. {counts}."),
        )
    ]
    if fields and len(measured):
        space = SPACES[arch].search
        logarithmic = {name: isinstance(space.get(name), LogUniform) for name in fields}
        plots.save(plots.slices(measured, fields, winner, logarithmic), folder / "figures" / "settings.png")
        text = (
            "A point a trial: green ran all epochs, grey was stopped, vermilion failed or diverged; the ring is the "
            "winner. The val_acc of a stopped trial is what it had reached by then."
        )
        sections.append(section("Settings against val_acc", picture(folder / "figures" / "settings.png", text)))
    ranked = trials.sort_values("val_acc", ascending=False)
    rows = [
        (
            r["trial_id"],
            *(f"{r[name]:.3g}" if isinstance(r[name], float) else str(r[name]) for name in fields),
            f"{r['epochs']:.0f}",
            "" if pd.isna(r["val_acc"]) else percent(r["val_acc"], 2),
            "" if pd.isna(r["best_epoch"]) else f"{r['best_epoch']:.0f}",
            r["status"],
            "" if pd.isna(r["reason"]) else r["reason"],
        )
        for r in ranked.to_dict("records")
    ]
    header = ("trial", *fields, "epochs", "val_acc", "best epoch", "status", "reason")
    return [*sections, section("All trials", table(rows, header))]


def write_report(folder: Path) -> None:
    """Write the page, and its figures, of a search whose trials.csv and curves.csv lie in the folder."""
    trials = pd.read_csv(folder / "trials.csv", dtype={"trial_id": str})
    fields = searched(trials)
    place = folder / "best.json"
    best = json.loads(place.read_text()) if place.exists() else None
    curves = run_report.curve_section(folder, "Every trial over epochs")
    if best is None:
        title, lead = f"{folder.name}: {len(trials)} trials with ASHA", "This search has not come to its end."
        write_atomically(folder / "report.html", run_report.page(title, lead, [curves]))
        return
    recipe = best["recipe"]
    sections = [
        *run_report.study_section(best),
        winner_section(folder, best, fields),
        *run_report.class_sections(folder, best),
        *trial_sections(folder, trials, fields, recipe["arch"], recipe["max_epochs"], best["trial_id"]),
        curves,
        run_report.recipe_section(best),
    ]
    title = f"{recipe['arch']} on {recipe['dataset']}: {len(trials)} trials with ASHA"
    lead = run_report.headline(best) + run_report.scale(best)
    write_atomically(folder / "report.html", run_report.page(title, lead, sections))


def setting_curves(folder: Path, fields: Sequence[str]) -> pd.DataFrame:
    """curves.csv of a grid with a line a setting, named by its values where they are short, folds averaged."""
    curves = pd.read_csv(folder / "curves.csv", dtype={"trial_id": str})
    table_of_settings = pd.read_csv(folder / "settings.csv", dtype={"setting_id": str})
    names = {
        row["setting_id"]: f"{row['setting_id']} " + " ".join(f"{row[name]}" for name in fields)
        for row in table_of_settings.to_dict("records")
    }
    curves["trial_id"] = curves.trial_id.str.partition("-")[0].map(names).str[:30]
    return curves.groupby(["trial_id", "epoch"], as_index=False).mean()


def write_grid_report(folder: Path) -> None:
    """Write the page, and its figures, of a grid whose settings.csv and curves.csv lie in the folder."""
    made = pd.read_csv(folder / "settings.csv", dtype={"setting_id": str})
    fields = list(made.columns)[1 : list(made.columns).index("folds")]
    place = folder / "best.json"
    best = json.loads(place.read_text()) if place.exists() else None
    counts = ", ".join(f"{n} {status}" for status, n in made.status.value_counts().items())
    rows = [
        (
            r["setting_id"],
            *(str(r[name]) for name in fields),
            *("" if pd.isna(r[name]) else percent(r[name], 2) for name in ("val_acc", "val_acc_std", "train_acc")),
            *("" if pd.isna(r[name]) else f"{r[name]:.4f}" for name in ("val_loss", "val_macro_f1")),
            *("" if pd.isna(r[name]) else f"{r[name]:.0f}" for name in ("folds", "best_epoch", "seconds")),
            r["status"],
            "" if pd.isna(r["reason"]) else r["reason"],
        )
        for r in made.sort_values("val_acc", ascending=False).to_dict("records")
    ]
    header = (
        "setting", *fields, "val_acc", "std (ddof 1)", "train_acc", "val_loss", "val_macro_f1", "folds", "best epoch",
        "seconds", "status", "reason",
    )  # fmt: skip
    several = "means over the folds, at the epoch with the best mean val_acc"
    if made.folds.max() <= 1:
        several = "those of the epoch with the best val_acc"
    text = f"All figures are {several}. {counts}."
    places = [folder / "figures" / f"curves_{metric}.png" for metric in ("acc", "loss")]
    curves = setting_curves(folder, fields)
    for metric, figure in zip(("acc", "loss"), places, strict=True):
        plots.save(plots.curves(curves, metric), figure)
    sections = [
        section("Settings", note(text), table(rows, header)),
        section("Over epochs", *(picture(p, "Validation bold, training faint in the same color") for p in places)),
    ]
    varied = {r["setting_id"]: ", ".join(f"{name} {r[name]}" for name in fields) for r in made.to_dict("records")}
    for file in sorted((folder / "gradients").glob("*.csv")):
        told = f": {varied[file.stem]}" if varied.get(file.stem) else ""
        sections.append(run_report.gradient_section(folder, f"Gradients of {file.stem}{told}", file))
    if best is None:
        title, lead = folder.name, f"No setting has won yet: {counts}."
    else:
        recipe = best["recipe"]
        title = f"{recipe['arch']} on {recipe['dataset']}"
        if len(made) > 1:
            title += f": {len(made)} settings"
        chosen = ", ".join(f"{name} {recipe[name]}" for name in fields if name != "fold")
        interval = "" if best["val_low"] is None else f" ({percent(best['val_low'])} to {percent(best['val_high'])})"
        lead = f"Best: {chosen}. " if chosen else ""
        lead += f"Validation accuracy {percent(best['val_acc'], 2)}{interval} at "
        lead += f"epoch {best['epoch']}."
        if "test_acc" in best:
            lead += " " + run_report.headline(best)
        lead += run_report.scale(best)
        sections = [
            *run_report.study_section(best),
            *sections,
            *run_report.class_sections(folder, best),
            run_report.recipe_section(best),
        ]
    write_atomically(folder / "report.html", run_report.page(title, lead, sections))


def main(argv: Sequence[str]) -> int:
    """The command: write a search's or a grid's page again."""
    parser = cli.Parser(
        prog="python -m tune.report", description="Write a search's report.html again.", allow_abbrev=False
    )
    parser.add_argument("folder", help="what a search left: trials.csv, curves.csv, best.json, ...")
    folder = Path(parser.parse_args(list(argv)).folder)
    if (folder / "settings.csv").exists() and (folder / "curves.csv").exists():
        write_grid_report(folder)
    elif (folder / "trials.csv").exists() and (folder / "curves.csv").exists():
        write_report(folder)
    else:
        raise InputError(f"{folder}: no search lies there; curves.csv and trials.csv or settings.csv are needed.")
    print(os.path.relpath(folder / "report.html"))
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
