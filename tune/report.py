"""A search's page, report.html; python -m tune.report DIR."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cifar_lab import cli, plots
from cifar_lab import report as run_report
from cifar_lab.compare import compare
from cifar_lab.files import read_json, read_table, write_atomically
from cifar_lab.page import Section, facts, note, page, pair, percent, picture, section, table
from cifar_lab.recipe import InputError
from cifar_lab.report import points
from tune.importance import FEWEST, importance
from tune.view import duration

RUNG_COLUMNS = (
    "rung", "reached", "stopped", "kept", "cutoff_low", "cutoff_high", "best_stopped", "worst_kept",
)  # fmt: skip


def searched(trials: pd.DataFrame) -> list[str]:
    """The searched fields: what stands between trial_id and epochs in trials.csv."""
    columns = list(trials.columns)
    return columns[1 : columns.index("epochs")]


def logarithmic(values: pd.Series) -> bool:
    """Whether a field's values want a logarithmic axis: positive numbers that span a factor of ten or more."""
    numbers = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    return bool(numbers and values.min() > 0 and values.max() >= 10 * values.min())


def warnings(best: dict[str, Any]) -> str:
    """The winner's values that sit on the edge of what was tried."""
    return "".join(f'<p class="warning">{html.escape(text)}</p>' for text in best.get("edges", []))


def winner_section(folder: Path, best: dict[str, Any], fields: Sequence[str]) -> Section:
    """Which settings won, against which other finalists, and whether they sit on an edge."""
    finalists = read_table(folder / "finalists.csv", "trial_id")
    groups = finalists.groupby("trial_id").val_acc
    rows = [
        (str(trial), percent(values.mean(), 2), percent(values.std(ddof=1), 2) if len(values) > 1 else "", len(values))
        for trial, values in sorted(groups, key=lambda group: -group[1].mean())
    ]
    seeds = ", ".join(percent(accuracy, 2) for accuracy in best["test_acc_seeds"])
    return section(
        f"Winner: {best['trial_id']}",
        facts({name: str(best["recipe"][name]) for name in fields}),
        warnings(best),
        note(
            "The best trials by val_acc were trained anew from scratch with new seeds; the highest mean val_acc wins, "
            f"and only its checkpoints were read on the test set, once each: {seeds}."
        ),
        table(rows, ("finalist", "mean val_acc", "std (ddof 1)", "seeds")),
    )


def by_rung(trials: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """A row a rung that stopped a trial, from the reasons in trials.csv and the val_acc after the rung in curves.csv.

    Its columns are RUNG_COLUMNS: rung in epochs; cutoffs of those stopped, since whoever was kept has none on record;
    best_stopped, worst_kept: val_acc; fractions.
    """
    told = trials.reason.str.extract(r"^rung (?P<rung>\d+): below the cutoff (?P<cutoff>[\d.]+)").astype(float)
    told.index = pd.Index(trials.trial_id)
    diverged = trials.trial_id[trials.status == "diverged"]
    rows = []
    for rung in sorted(told.rung.dropna().astype(int).unique()):
        stopped = told[told.rung == rung]
        there = curves[curves.epoch == rung].set_index("trial_id").val_acc
        kept = there.drop(stopped.index).drop(diverged, errors="ignore")
        rows.append(
            {
                "rung": rung, "reached": len(there), "stopped": len(stopped), "kept": len(kept),
                "cutoff_low": stopped.cutoff.min(), "cutoff_high": stopped.cutoff.max(),
                "best_stopped": there[stopped.index].max(), "worst_kept": kept.min(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=RUNG_COLUMNS)


def stop_section(folder: Path, trials: pd.DataFrame, max_epochs: int) -> Section:
    """Where ASHA stopped the trials, rung by rung, and what that saved against running all of them."""
    curves = read_table(folder / "curves.csv", "trial_id")
    rungs = by_rung(trials, curves).to_dict("records")
    rows = [
        (
            r["rung"], r["reached"], r["stopped"], r["kept"],
            " to ".join(dict.fromkeys((percent(r["cutoff_low"]), percent(r["cutoff_high"])))),
            percent(r["best_stopped"]), percent(r["worst_kept"]) if r["kept"] else "",
            f"{r['stopped'] * (max_epochs - r['rung']):,}",
        )
        for r in rungs
    ]  # fmt: skip
    header = ("after epoch", "reached", "stopped", "kept", "cutoffs", "best stopped", "worst kept", "epochs saved")
    trained, full = int(trials.epochs.sum()), len(trials) * max_epochs
    stopped = trials[trials.status == "stopped"]  # others may have ended early too, which ASHA has not saved
    saved = len(stopped) * max_epochs - int(stopped.epochs.sum())
    left = (stopped.seconds / stopped.epochs * (max_epochs - stopped.epochs)).sum()
    counts = ", ".join(f"{n} {status}" for status, n in trials.status.value_counts().items())
    text = (
        f"{trained:,} epochs of the {full:,} that running all would take; stopping saved {saved:,} "
        f"({percent(saved / full, 0)}), about {duration(left)} of training at each trial's own pace. {counts}."
    )
    if (folder / "finalists.csv").exists():
        again = read_table(folder / "finalists.csv").seconds.sum()
        text += f" Training the finalists anew took {duration(again)} on top."
    figure = plots.stops(trials.epochs.tolist(), [r["rung"] for r in rungs], max_epochs)
    alt = f"Trials under way after each epoch: {trained:,} epochs of {full:,} were trained"
    caption = "Trials under way after each epoch; what lies between a dashed rung and the end was saved."
    explained = note(
        "A rung judges a trial once, after its epoch: below the cutoff it stops. The cutoff is the val_acc that it "
        "takes to be among the best of those there before it, a third unless reduction_factor says otherwise. It moves "
        "as trials arrive, and the first has nothing to be below: one that was stopped may lie above one that was kept."
    )
    drawn = picture(figure, folder / "figures" / "stops.png", alt, caption)
    beside = note(text) + (explained if rows else "")
    return section("What stopping saved", pair(drawn, beside), table(rows, header) if rows else "")


def settings_section(folder: Path, trials: pd.DataFrame, fields: Sequence[str], winner: str) -> list[Section]:
    """Each field against val_acc, and how much a forest makes of it; nothing where no field was varied."""
    measured = trials[trials.val_acc.notna()]
    if not fields or measured.empty:
        return []
    figures, stopped = folder / "figures", int((measured.status == "stopped").sum())
    caution = f"{stopped} were stopped: their val_acc is what they had reached by then. " if stopped else ""
    slices = picture(
        plots.slices(measured, fields, winner, {name: logarithmic(measured[name]) for name in fields}),
        figures / "settings.png",
        f"val_acc against each of {', '.join(fields)}",
        f"A point each of {len(measured)}. {caution}The ring is the winner.",
    )  # fmt: skip
    found = importance(measured, fields)
    if found is None:
        asked = note(f"Which field matters most is not asked of fewer than {FEWEST} of them.")
    else:
        ranks = ", ".join(f"{r['field']} {points(r['mean'])}" for r in found.table.to_dict("records"))
        verdict = (
            f"On trials held out it is off by {100 * found.error:.1f} points on average, guessing their mean by "
            f"{100 * found.guess:.1f}."
        )
        if found.error >= found.guess:
            verdict += " It has learned nothing: do not read the bars."
        long = " and how long a trial lived" if stopped else ""
        asked = (
            picture(plots.importance(found.table), figures / "importance.png",
                    f"Importance in points of val_acc: {ranks}",
                    "Importance of each field, with the standard deviation over folds and shuffles.")
            + note(
                "Permutation importance (scikit-learn): a random forest predicts val_acc from the fields; a bar is by "
                f"how much its error grows when that field is shuffled, five-fold cross-validated. {verdict} "
                f"n = {found.n} trials: a rough hint. It mixes how good a setting is{long} with what was drawn by "
                "chance, and fields that only matter together share what they matter."
            )
        )  # fmt: skip
    return [section("Settings against val_acc", pair(slices, asked))]


def all_trials_section(trials: pd.DataFrame, fields: Sequence[str]) -> Section:
    """A row a trial, the best first."""
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
    return section("All trials", table(rows, header))


def write_report(folder: Path, other: Path | None = None) -> None:
    """Write the page, and its figures, of a search whose trials.csv and curves.csv lie in the folder.

    Raises:
        InputError: the other experiment, to compare with, was tested on other images.
    """
    trials = read_table(folder / "trials.csv", "trial_id", "reason")
    fields = searched(trials)
    place = folder / "best.json"
    best = read_json(place) if place.exists() else None
    curves = run_report.curve_section(folder, "Every trial over epochs")
    if best is None:
        title, lead = f"{folder.name}: {len(trials)} trials with ASHA", "This search has not come to its end."
        write_atomically(folder / "report.html", page(title, lead, "", [curves, all_trials_section(trials, fields)]))
        return
    recipe = best["recipe"]
    sections = [
        *run_report.study_section(best),
        winner_section(folder, best, fields),
        *run_report.tested_sections(folder, best, other),
        stop_section(folder, trials, recipe["max_epochs"]),
        *settings_section(folder, trials, fields, best["trial_id"]),
        curves,
        all_trials_section(trials, fields),
        run_report.recipe_section(best),
    ]
    title = f"{recipe['arch']} on {recipe['dataset']}: {len(trials)} trials with ASHA"
    lead = run_report.headline(best) + run_report.scale(best)
    write_atomically(folder / "report.html", page(title, lead, run_report.context(folder, best), sections))


def setting_curves(folder: Path, fields: Sequence[str]) -> pd.DataFrame:
    """curves.csv of a grid with a line a setting, named by its values where they are short, folds averaged."""
    curves = read_table(folder / "curves.csv", "trial_id")
    table_of_settings = read_table(folder / "settings.csv", "setting_id", "reason")
    names = {
        row["setting_id"]: f"{row['setting_id']} " + " ".join(f"{row[name]}" for name in fields)
        for row in table_of_settings.to_dict("records")
    }
    curves["trial_id"] = curves.trial_id.str.partition("-")[0].map(names).str[:30]
    return curves.groupby(["trial_id", "epoch"], as_index=False).mean()


def test_curve_section(folder: Path, tested: pd.DataFrame) -> Section:
    """Accuracy and loss on the test set after every epoch, where a study asks for them, from test.csv."""
    parts = [
        picture(
            plots.tested(tested, metric), folder / "figures" / f"test_{metric}.png",
            f"{name} on the test set after every epoch of {tested.setting_id.nunique()} settings",
        )
        for metric, name in (("acc", "Accuracy"), ("loss", "Loss"))
    ]  # fmt: skip
    text = "Read after all was trained: nothing was chosen by it."
    return section("On the test set after every epoch", pair(*parts), note(text))


def write_grid_report(folder: Path, other: Path | None = None) -> None:
    """Write the page, and its figures, of a grid whose settings.csv and curves.csv lie in the folder.

    Raises:
        InputError: the other experiment, to compare with, was tested on other images.
    """
    made = read_table(folder / "settings.csv", "setting_id", "reason")
    fields = list(made.columns)[1 : list(made.columns).index("folds")]
    place = folder / "best.json"
    best = read_json(place) if place.exists() else None
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
    sections = [
        section("Settings", warnings(best or {}), note(text), table(rows, header)),
        run_report.curve_section(folder, "Over epochs", setting_curves(folder, fields)),
    ]
    if (folder / "test.csv").exists() and (tested := read_table(folder / "test.csv", "setting_id")).epoch.nunique() > 1:
        sections.append(test_curve_section(folder, tested))
    varied = {r["setting_id"]: ", ".join(f"{name} {r[name]}" for name in fields) for r in made.to_dict("records")}
    for file in sorted((folder / "gradients").glob("*.csv")):
        told = f": {varied[file.stem]}" if varied.get(file.stem) else ""
        sections.append(run_report.gradient_section(folder, f"Gradients of {file.stem}{told}", file))
    context = ""
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
        context = run_report.context(folder, best)
        varied_settings = made.rename(columns={"setting_id": "trial_id"})
        sections = [
            *run_report.study_section(best),
            *sections,
            *settings_section(folder, varied_settings, fields, best["trial_id"]),
            *run_report.tested_sections(folder, best, other),
            run_report.recipe_section(best),
        ]
    write_atomically(folder / "report.html", page(title, lead, context, sections))


def main(argv: Sequence[str]) -> int:
    """The command: write a search's, a grid's or a training's page again."""
    parser = cli.Parser(
        prog="python -m tune.report", description="Write report.html of what was run again.", allow_abbrev=False
    )
    parser.add_argument("folder", help="what a search, a grid, a study or a training left: curves.csv, best.json, ...")
    parser.add_argument(
        "--compare", metavar="OTHER", help="the folder of another experiment, tested on the same images"
    )
    asked = parser.parse_args(list(argv))
    folder, other = Path(asked.folder), Path(asked.compare) if asked.compare else None
    if other is not None:
        compare(folder, other)
    if (folder / "settings.csv").exists() and (folder / "curves.csv").exists():
        write_grid_report(folder, other)
    elif (folder / "trials.csv").exists() and (folder / "curves.csv").exists():
        write_report(folder, other)
    elif (folder / "best.json").exists():
        run_report.write_report(folder, other)
    else:
        raise InputError(
            f"{folder}: nothing that was run lies there; best.json is needed, or curves.csv and trials.csv."
        )
    print(os.path.relpath(folder / "report.html"))
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
