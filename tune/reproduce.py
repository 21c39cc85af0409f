"""A study is run, tested, and set beside what was published."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cifar_lab import cli, plots
from cifar_lab.dataset import TrainingSet
from cifar_lab.evaluate import Evaluation, accuracy_interval, evaluate, record_of_test, wilson
from cifar_lab.files import read_csv, read_json, read_table, write_csv, write_json
from cifar_lab.gradient_table import verdicts
from tune.experiment import Experiment
from tune.grid import Grid, Setting
from tune.grid_question import GridQuestion
from tune.published import Row, by_run, update
from tune.question import Question, SearchOptions, SearchQuestion
from tune.search import Search
from tune.study import UNSCALED, Figure, Study, settings_of, studies
from tune.trial import epoch_checkpoint

SMALL = (
    "settings.csv", "trials.csv", "curves.csv", "finalists.csv", "best.json", "per_class.csv", "confusion.csv",
    "test.csv", "test_readings.jsonl", "figures/*.png", "gradients/*.csv",
)  # fmt: skip
TEST_COLUMNS = ("setting_id", "epoch", "n", "test_acc", "low", "high", "test_loss", "test_macro_f1")
Value = tuple[float, float | None, float | None, int | None]  # a figure, its interval, the images behind it
Found = tuple[Value | None, str]  # and a remark that only the run itself can make


def reproduce(study: Study, question: Question, published_dir: Path, answers: list[dict[str, Any]]) -> int:
    """Run what the study asks, or go on with it; then test, copy the small files, write its rows. The exit status.

    `answers` is what --json prints of the variants that were run before; this one's is added.
    """
    campaign: Grid | Search
    if isinstance(question, GridQuestion):
        campaign = Grid(question)
    else:
        assert isinstance(question, SearchQuestion)
        campaign = Search(question)
    campaign.before = answers
    if status := campaign.run():
        answers.append(campaign.answer())
        return status
    rows = grid_rows(study, campaign) if isinstance(campaign, Grid) else search_rows(study, campaign.question)
    record(study, question.folder, rows)
    campaign.report()
    copy(question.folder, published_dir / study.name / study.variant)
    update(published_dir, declared(), rows)
    answers.append(campaign.answer())
    for row in [] if question.json else rows:
        beside = "" if row["published"] is None else f", published {row['published']:g}"
        print(f"{study.name} {study.variant}: {row['metric']} {_told(row['ours'])}{beside}")
    return cli.DONE


def _told(value: float | None) -> str:
    return "not run" if value is None else f"{value:.4f}"


def record(study: Study, folder: Path, rows: Sequence[Row]) -> None:
    """Note in best.json what the run's page says of the study."""
    figures = [{name: row[name] for name in ("metric", "published", "ours", "low", "high", "reason")} for row in rows]
    told = {"name": study.name, "variant": study.variant, "scale": rows[0]["scale"], "figures": figures}
    place = folder / "best.json"
    write_json(place, read_json(place) | {"study": told})


def declared() -> list[tuple[str, str, list[Row]]]:
    """Every study and variant, with its rows as long as it was not run."""
    return [(s.name, s.variant, unrun(s)) for variants in studies().values() for s in variants.values()]


def unrun(study: Study) -> list[Row]:
    """The rows of a study that was not run."""
    wants = study.wants and f"wants {study.wants}"
    return [
        _row(study, figure, None, reason=_joined("not run", wants, figure.note, study.note))
        for figure in study.published
    ]


def refresh(published_dir: Path) -> None:
    """Write the table anew after a declaration has changed, from the runs whose folders lie there; run nothing."""
    before, made = by_run(read_csv(published_dir / "published.csv")), list[Row]()
    for study in (study for variants in studies().values() for study in variants.values()):
        folder, told = published_dir / study.name / study.variant, before.get((study.name, study.variant), [])
        if folder.is_dir() and (ran := [row for row in told if row["ours"]]):
            rows = told_again(study, folder, ran)
            record(study, folder, rows)
            made += rows
    update(published_dir, declared(), made)


def told_again(study: Study, folder: Path, before: Sequence[Row]) -> list[Row]:
    """The rows of a run, from the small files that were copied and from what its rows said before."""
    if study.search is None:
        found = grid_found(study, folder, kept_settings(study, folder))
    else:
        found = search_found(study, folder, next(int(row["n"]) for row in before if row["metric"] == "val_acc"))
    cells = {name: before[0][name] for name in ("seed", "scale", "hardware", "command")}
    return rows_of(study, found, cells, small="scaled down: " in before[0]["reason"])


def kept_settings(study: Study, folder: Path) -> list[Setting]:
    """The settings of a grid's folder; a field of which settings.csv says nothing had been given, and not varied."""
    given = read_json(folder / "best.json")["recipe"].keys() - read_csv(folder / "settings.csv")[0].keys()
    trials = Experiment(folder, {row["trial_id"]: {} for row in read_csv(folder / "trials.csv")}).trials.values()
    return [
        Setting(f"G{i:02d}", varied, [t for t in trials if t.trial_id.partition("-")[0] == f"G{i:02d}"])
        for i, varied in enumerate(settings_of(study, given))
    ]


def _row(study: Study, figure: Figure, value: Value | None, **more: Any) -> Row:
    ours, low, high, n = value or (None, None, None, None)
    return {
        "study": study.name, "variant": study.variant, "metric": figure.label, "published": figure.value,
        "ours": ours, "low": low, "high": high, "n": n, **more,
    }  # fmt: skip


def _joined(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)


# What the run says


def scaled(study: Study, question: Question) -> list[str]:
    """What was done otherwise than the study has it, in words: 6 of 150 epochs, width 16."""
    base, told = question.base, []
    full = study.base()
    defaults = type(base)(**full)
    for name, value in question.given.items():
        meant = full.get(name, getattr(defaults, name))
        if name in UNSCALED or name == "limit_train":
            continue
        if name in study.grid:
            told.append(f"only {name} {value}")
            continue
        if value == meant:
            continue
        told.append(f"{value} of {meant} epochs" if name == "max_epochs" else f"{name} {value} instead of {meant}")
    if isinstance(question, GridQuestion) and (after := question.options.prune_after) is not None:
        kept, folds = question.options.keep, base.folds
        told.append(f"only the best {kept:.0%} of the settings beyond fold {after} of {folds}")
    if isinstance(question, SearchQuestion):
        declared = SearchOptions(**(study.search or {}))
        for name, what in (("num_samples", "trials"), ("finalists", "finalists"), ("finalist_seeds", "seeds")):
            if (was := getattr(question.options, name)) != getattr(declared, name):
                told.append(f"{was} of {getattr(declared, name)} {what}")
    return told


def shared_cells(question: Question, told: Sequence[str], images: int, seeds: str) -> dict[str, Any]:
    """The cells that all rows of a run have alike; `told` is what was scaled down, of `images` training images."""
    epochs = [] if any(text.endswith("epochs") for text in told) else [f"{question.base.max_epochs} epochs"]
    whole = "" if question.base.limit_train is None else " (limit_train)"
    return {
        "seed": seeds,
        "scale": "; ".join([f"{images:,} training images{whole}", *epochs, *told]),
        "hardware": read_json(question.folder / "best.json")["hardware"],
        "command": question.command,
    }


def rows_of(study: Study, found: Sequence[Found], cells: Mapping[str, Any], small: bool) -> list[Row]:
    """The rows of a run; remarks say what a figure is, whether and why it was scaled down, what the study does."""
    wants = f"scaled down: wants {study.wants}" if small else ""
    rows = []
    for figure, (value, note) in zip(study.published, found, strict=True):
        why = "" if value is not None else "not tested" if note else "not run: the value was left out"
        rows.append(_row(study, figure, value, **cells, reason=_joined(why, figure.note, note, wants, study.note)))
    return rows


# Grids


def grid_rows(study: Study, grid: Grid) -> list[Row]:
    """The rows of a grid, its checkpoints tested where a published figure is of the test set."""
    question, made = grid.question, grid.settings()
    if study.tta != "none" or any("test" in figure.metric for figure in study.published):
        read_test(question, grid.experiment, made, study.tta)
    told = scaled(study, question)
    images = len(TrainingSet(question.base).train_indices)
    cells = shared_cells(question, told, images, str(question.base.seed))
    small = bool(told) or question.base.limit_train is not None
    return rows_of(study, grid_found(study, question.folder, made), cells, small)


def grid_found(study: Study, folder: Path, made: Sequence[Setting]) -> list[Found]:
    """What a grid's folder says of each published figure."""
    best = read_json(folder / "best.json")
    return [grid_value(figure, folder, made, best) for figure in study.published]


def grid_value(figure: Figure, folder: Path, made: Sequence[Setting], best: dict[str, Any]) -> Found:
    """A figure's value in a grid, and a remark: which setting it is of, where that is open, and what died."""
    setting = _matching(made, figure.at, best)
    if setting is None or not setting.at_best():
        return None, ""
    value = setting_value(figure.metric, folder, setting, best)
    note = ""
    if not figure.at and setting.varied:
        note = "best setting: " + ", ".join(f"{k} {v}" for k, v in setting.varied.items())
    if setting.status != "completed":
        note = _joined(note, f"{setting.status}: {setting.row()['reason']}")
    if figure.metric == "val_acc":
        note = _joined(note, died(folder / "gradients" / f"{setting.setting_id}.csv"))
    if figure.over and value is not None:
        other = _matching(made, figure.over, best)
        beside = setting_value(figure.metric, folder, other, best) if other and other.at_best() else None
        value = beside and (value[0] - beside[0], None, None, value[3])
    return value, note


def died(gradients: Path) -> str:
    """What a setting's gradients tell, where they were kept: what died, how much of each layer's gradient was zero."""
    if not gradients.exists():
        return ""
    table = read_table(gradients, "layer")
    last = table[(table.epoch == table.epoch.max()) & table.layer.str.endswith(".weight")]
    zero = ", ".join(f"{row['layer']} {row['zero']:.1%}" for row in last.to_dict("records"))
    said = [sentence for sentence in verdicts(table) if "may help" not in sentence]  # advice is no result
    return f"{' '.join(said)} Gradients of the last epoch exactly zero: {zero}"


def _matching(made: Sequence[Setting], at: dict[str, Any], best: dict[str, Any]) -> Setting | None:
    """The setting with these values, or the best one where none are given; a field that was fixed must agree."""
    if not at:
        return next(s for s in made if s.setting_id == best["trial_id"])
    for setting in made:
        if all({**best["recipe"], **setting.varied}[name] == value for name, value in at.items()):
            return setting
    return None


def setting_value(metric: str, folder: Path, setting: Setting, best: dict[str, Any]) -> Value | None:
    """A metric of a setting: at its best epoch by val_acc, or first, last, lowest (min), highest (max) of its epochs.

    None for a figure of the test set where the setting did not come to its end: it was not tested.
    """
    found, n = setting.at_best(), int(best["val_n"])
    if metric == "epoch_seconds":
        return found["seconds"] / sum(len(t.rows) for t in setting.trainings), None, None, None
    if metric == "best_epoch":
        return found["best_epoch"], None, None, None
    if metric == "tta_acc":
        tta = best.get("tta") if setting.setting_id == best["trial_id"] else None
        return (tta["acc"], tta["low"], tta["high"], best["test_n"]) if tta else None
    if metric.startswith("test"):
        rows = [row for row in read_csv(folder / "test.csv") if row["setting_id"] == setting.setting_id]
        if not rows:
            return None
        name, pick = _picked(metric)
        chosen = _chosen(rows, name, pick, found["best_epoch"])
        interval = (float(chosen["low"]), float(chosen["high"])) if name == "test_acc" else (None, None)
        return float(chosen[name]), *interval, int(chosen["n"])
    name, pick = _picked(metric)
    if pick:
        curves = [_chosen(t.rows, name, pick, 0)[name] for t in setting.trainings]
        value = sum(curves) / len(curves)
    else:
        value = found[name]
    if name != "val_acc":
        return value, None, None, n if name.startswith("val") else None
    low, high = (found["low"], found["high"]) if found["folds"] > 1 else wilson(round(value * n), n)
    return value, low, high, n


def _chosen(rows: Sequence[Mapping[str, Any]], name: str, pick: str, best_epoch: int) -> Mapping[str, Any]:
    """The row of the highest, lowest, first or last value; else the one of the best epoch."""
    if pick in ("first", "last"):
        return rows[-1 if pick == "last" else 0]
    if pick:
        return {"max": max, "min": min}[pick](rows, key=lambda row: float(row[name]))
    return next(row for row in rows if int(row["epoch"]) == best_epoch)


def _picked(metric: str) -> tuple[str, str]:
    name, _, pick = metric.rpartition("_")
    return (name, pick) if pick in ("max", "min", "first", "last") else (metric, "")


def read_test(question: GridQuestion, experiment: Experiment, made: Sequence[Setting], tta: str = "none") -> None:
    """Read the test set with each setting's best checkpoint, or with every epoch's; leave test.csv."""
    folder = question.folder
    if (folder / "test.csv").exists():
        return
    best = read_json(folder / "best.json")
    rows: list[dict[str, Any]] = []
    for setting in made:
        if setting.status != "completed":
            continue
        place, found = experiment.checkpoints(setting.setting_id), setting.at_best()
        epochs = range(1, len(setting.trainings[0].rows) + 1) if question.every_epoch else [found["best_epoch"]]
        for epoch in epochs:
            chosen = epoch == found["best_epoch"]
            file = place / "best.ckpt" if chosen else epoch_checkpoint(place, epoch)
            answer = evaluate(file, data_dir=question.base.data_dir, tta=tta)
            rows.append({"setting_id": setting.setting_id, "epoch": epoch, **test_row(answer)})
            if chosen and setting.setting_id == best["trial_id"]:
                answer.write(folder)
                write_json(folder / "best.json", best | record_of_test(answer, [answer.accuracy]))
    write_csv(folder / "test.csv", TEST_COLUMNS, rows)
    for file in folder.glob("checkpoints/*/epoch-*.ckpt"):
        file.unlink()


def test_row(answer: Evaluation) -> dict[str, Any]:
    """What an evaluation says in a line of test.csv."""
    from sklearn.metrics import f1_score

    low, high = answer.interval
    own = answer.probabilities[range(len(answer.labels)), answer.labels].astype("float64")
    return {
        "n": len(answer.labels),
        "test_acc": answer.accuracy,
        "low": low,
        "high": high,
        "test_loss": float(-np.log(own.clip(1e-30)).mean()),
        "test_macro_f1": f1_score(answer.labels, answer.predictions, average="macro"),
    }


# Searches


def search_rows(study: Study, question: SearchQuestion) -> list[Row]:
    """The rows of a search: of its winner, over the seeds."""
    data, told = TrainingSet(question.base), scaled(study, question)
    seeds = " ".join(row["seed"] for row in winner_rows(question.folder))
    cells = shared_cells(question, told, len(data.train_indices), seeds)
    small = bool(told) or question.base.limit_train is not None
    return rows_of(study, search_found(study, question.folder, len(data.val_indices)), cells, small)


def winner_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of finalists.csv that are the winner's, one a seed."""
    winner = read_json(folder / "best.json")["trial_id"]
    return [row for row in read_csv(folder / "finalists.csv") if row["trial_id"] == winner]


def search_found(study: Study, folder: Path, val_n: int) -> list[Found]:
    """What a search's folder says of each published figure; `val_n` images validated."""
    best = read_json(folder / "best.json")
    accuracies = [float(row["val_acc"]) for row in winner_rows(folder)]
    classes = {row["class"]: row for row in read_csv(folder / "per_class.csv")}
    spread = float(pd.Series([float(row["accuracy"]) for row in classes.values()]).std(ddof=0))
    alone: dict[str, Value] = {
        "test_acc": over_seeds(best["test_acc_seeds"], best["test_n"], (best["test_low"], best["test_high"])),
        "val_acc": over_seeds(accuracies, val_n, None),
        "best_epoch": (best["epoch"], None, None, None),
        "class_std": (spread, None, None, None),
        "class_var": (spread**2, None, None, None),
    }
    return [
        (class_value(str(figure.at["class"]), classes) if "class" in figure.at else alone[figure.metric], "")
        for figure in study.published
    ]


def over_seeds(accuracies: Sequence[float], n: int, alone: tuple[float, float] | None) -> Value:
    """Mean with its t interval; of one seed with the interval of its images."""
    mean = sum(accuracies) / len(accuracies)
    low, high = accuracy_interval(accuracies) if len(accuracies) > 1 else alone or wilson(round(mean * n), n)
    return mean, low, high, n


def class_value(name: str, classes: dict[str, dict[str, str]]) -> Value | None:
    """The test accuracy of a class, or of the animals or vehicles as the mean of theirs."""
    if name in classes:
        row = classes[name]
        return float(row["accuracy"]), float(row["low"]), float(row["high"]), int(row["n"])
    group = [r for r in classes.values() if (r["class"] in plots.ANIMALS) == (name == "animals")]
    if not group:
        return None
    return sum(float(r["accuracy"]) for r in group) / len(group), None, None, sum(int(r["n"]) for r in group)


# What is committed


def copy(source: Path, target: Path) -> None:
    """Copy the small files; of test_predictions.csv the label, the prediction and its probability."""
    shutil.rmtree(target, ignore_errors=True)
    for pattern in SMALL:
        for file in sorted(source.glob(pattern)):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    if predictions := read_csv(source / "test_predictions.csv"):
        kept = [{**row, "probability": f"{float(row['p' + row['prediction']]):.4f}"} for row in predictions]
        write_csv(target / "test_predictions.csv", ("index", "label", "prediction", "probability"), kept)
