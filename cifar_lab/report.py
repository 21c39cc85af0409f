"""report.html: what a run found, on one page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cifar_lab import calibration, plots
from cifar_lab.compare import class_table, compare, read_answers
from cifar_lab.evaluate import accuracy_interval, confident_mistakes, times_read, wilson
from cifar_lab.files import read_json, read_table, write_atomically
from cifar_lab.gradient_table import verdicts
from cifar_lab.page import Section, drawn, facts, note, page, pair, percent, photograph, picture, section, table


def measured(best: dict[str, Any]) -> tuple[list[float], int, tuple[float, float]]:
    """Each seed's accuracy, on how many images, and the 95% interval: over seeds t, of one Wilson's; from best.json."""
    if own := best.get("images"):
        return [own["acc"]], own["n"], (own["low"], own["high"])
    seeds = best["test_acc_seeds"]
    interval = accuracy_interval(seeds) if len(seeds) > 1 else (best["test_low"], best["test_high"])
    return seeds, best["test_n"], interval


def headline(best: dict[str, Any]) -> str:
    """The accuracy with its interval, in a sentence, from best.json."""
    own = best.get("images")
    if not own and "test_acc" not in best and best["val_acc"] is None:
        return f"Trained without validation, to epoch {best['epoch']}; not tested."
    if not own and "test_acc" not in best:
        return f"Validation accuracy {percent(best['val_acc'], 2)} at epoch {best['epoch']}; not tested."
    seeds, n, interval = measured(best)
    reached = f"{percent(sum(seeds) / len(seeds), 2)} ({between(interval)}"
    if own:
        told = f"Accuracy {reached}, Wilson 95%, n = {n:,}) on {own['folder']}: not the test set."
    elif len(seeds) < 2:
        told = f"Test accuracy {reached}, Wilson 95%, n = {n:,}, one seed)."
    else:
        told = f"Test accuracy {reached}, t 95%, {len(seeds)} seeds, n = {n:,})."
    if tta := best.get("tta"):
        told += f" With test-time augmentation ({tta['name']}) {with_tta(tta)}."
    return told


def between(interval: tuple[float, float]) -> str:
    """An interval in percent."""
    return " to ".join(percent(end, 2) for end in interval)


def with_tta(tta: dict[str, Any]) -> str:
    """What test-time augmentation reaches, with its interval."""
    return f"{percent(tta['acc'], 2)} ({between((tta['low'], tta['high']))})"


def scale(best: dict[str, Any]) -> str:
    """What was scaled down, or nothing: of a study against the published one, else of the data."""
    if study := best.get("study"):
        return f" {study['name']}, {study['variant']}: {study['scale']}."
    limit = best["recipe"]["limit_train"]
    return f" Trained on {limit:,} images only (limit_train)." if limit else ""


def study_section(best: dict[str, Any]) -> list[Section]:
    """Published against ours, where the run reproduces a study."""
    if "study" not in best:
        return []
    figures = best["study"]["figures"]
    remarks, common = apart([f["reason"] for f in figures])
    rows = [
        (
            f["metric"],
            *("" if f[name] is None else f"{f[name]:.4f}" for name in ("published", "ours")),
            "" if f["low"] is None else f"{f['low']:.4f} to {f['high']:.4f}",
            own,
        )
        for f, own in zip(figures, remarks, strict=True)
    ]
    columns = ("metric", "published", "ours", "95% interval", "remarks")
    return [section("Published against ours", table(rows, columns), note(f"All: {common}.") if common else "")]


def apart(reasons: Sequence[str]) -> tuple[list[str], str]:
    """The remarks of each figure of a study that are its own, and those that all of its figures have."""
    remarks = [reason.split("; ") for reason in reasons]
    common = [remark for remark in remarks[0] if remark and all(remark in others for others in remarks)]
    return ["; ".join(remark for remark in own if remark not in common) for own in remarks], "; ".join(common)


def is_cifar10(classes: Iterable[str]) -> bool:
    """Whether the classes are CIFAR-10's, on which people were measured."""
    return set(classes) == {*plots.ANIMALS, *plots.VEHICLES}


def context(folder: Path, best: dict[str, Any]) -> str:
    """The headline on a scale with what to compare it with, then n, seeds, scale, hardware and command."""
    told, bar = {}, ""
    own = best.get("images")
    if own or "test_acc" in best:
        seeds, n, interval = measured(best)
        classes = read_table(folder / "per_class.csv", "class")["class"]
        marks = {"chance": 1 / len(classes)}
        if is_cifar10(classes) and not own:
            marks["people"] = plots.HUMAN
        for figure in best["study"]["figures"] if "study" in best and not own else []:
            if figure["metric"] == "test_acc" and figure["published"]:
                marks["published"] = figure["published"]
        mean = sum(seeds) / len(seeds)
        alt = f"Accuracy {percent(mean)}; " + ", ".join(f"{k} {percent(v)}" for k, v in marks.items())
        bar = drawn(plots.svg(plots.context(mean, interval, marks), "context"), alt, "")
        each = ", ".join(percent(accuracy, 2) for accuracy in seeds)
        images = f"image{'s' * (n > 1)} in {own['folder']}" if own else "test images"
        told["tested on"] = f"{n:,} {images}, by {len(seeds)} seed{'s' * (len(seeds) > 1)}: {each}"
        if "people" in marks:
            told["people"] = "about 94% on CIFAR-10 (Karpathy 2011)"
    if "recipe" in best:
        recipe = best["recipe"]
        limit = recipe["limit_train"]
        images = f"{limit:,} images only (limit_train)" if limit else "all training images"
        held_out = f"{recipe['val_fraction']:.0%} of the training set held out for validation"
        if not recipe["val_fraction"]:
            held_out = "none held out: the last epoch counts"
        if recipe.get("folds"):
            held_out = f"in {recipe['folds']} folds"
        told["trained on"] = f"{images}, {held_out}; at most {recipe['max_epochs']} epochs"
    told |= {name: best[name] for name in ("hardware", "command") if name in best}
    return pair(bar, facts(told, "long")) if bar else facts(told, "long")


def tested_sections(folder: Path, best: dict[str, Any], other: Path | None = None) -> list[Section]:
    """What the test files in the folder say; nothing where it was not tested.

    Args:
        folder: test_predictions.csv, or predictions.csv of images of one's own, per_class.csv, confusion.csv.
        best: best.json.
        other: the folder of another experiment to compare with.

    Raises:
        InputError: the other was tested on other images.
    """
    predictions = "predictions.csv" if "images" in best else "test_predictions.csv"
    if not (folder / predictions).exists():
        return []
    said, names = read_answers(folder, predictions)
    confusions = read_table(folder / "confusion.csv", "class")
    sections = [
        class_section(folder, best, said),
        confusion_section(folder, confusions),
        calibration_section(folder, said),
        mistake_section(folder, said, names),
        *corruption_section(folder, best),
    ]
    if other is not None:
        sections.append(comparison_section(folder, other))
    return sections


def class_facts(classes: pd.DataFrame, *, human: bool = False) -> dict[str, str]:
    """Mean and spread of the classes in per_class.csv; of CIFAR-10's animals against vehicles, beside people."""
    accuracy = classes.accuracy
    told = {
        "mean of the classes": percent(accuracy.mean()),
        "spread of the classes": f"{percent(accuracy.std(ddof=0))} (standard deviation, ddof 0)",
    }
    if human:
        animals = classes["class"].isin(plots.ANIMALS)
        told["animals"], told["vehicles"] = percent(accuracy[animals].mean()), percent(accuracy[~animals].mean())
        told["people"] = percent(plots.HUMAN, 0)
    return told


def class_section(folder: Path, best: dict[str, Any], said: pd.DataFrame) -> Section:
    """Accuracy class by class, with mean and spread; of CIFAR-10 animals against vehicles, beside people."""
    from sklearn.metrics import f1_score

    classes = read_table(folder / "per_class.csv", "class")
    own = "images" in best  # not the test set: it may lack classes, and people were not asked about it
    cifar10 = is_cifar10(classes["class"]) and not own
    correct = int((said.label == said.prediction).sum())
    told = {"accuracy": f"{percent(correct / len(said), 2)} ({between(wilson(correct, len(said)))})"}
    if tta := best.get("tta"):
        told[f"with TTA ({tta['name']})"] = with_tta(tta)
    told["macro F1"] = f"{f1_score(said.label, said.prediction, labels=said.label.unique(), average='macro'):.4f}"
    told |= class_facts(classes, human=cifar10)
    rows = [
        (
            r["class"], r["n"], r["correct"],
            *((percent(r["accuracy"]), f"{percent(r['low'])} to {percent(r['high'])}") if r["n"] else ("", "")),
        )
        for r in classes.to_dict("records")
    ]  # fmt: skip
    ordered = classes.dropna(subset="accuracy").sort_values("accuracy")["class"]
    alt = f"Accuracy of each class with its interval: worst {ordered.iloc[0]}, best {ordered.iloc[-1]}"
    several = len(measured(best)[0]) > 1
    whose = "All below is of one checkpoint, that of the best val_acc. " if several else ""
    times = max(best.get("test_readings", 0), times_read(folder))
    often = "once" if times == 1 else f"{times:,} times"
    read = f" The test set was read {often} for this run, corrupted or not." if times and not own else ""
    return section(
        "Class by class",
        note(f"{whose}Intervals are Wilson's, 95%.{read}"),
        facts(told),
        pair(
            picture(plots.per_class(classes, human=cifar10), folder / "figures" / "per_class.png", alt),
            table(rows, ("class", "n", "correct", "accuracy", "95% interval")),
        ),
    )


def confusion_section(folder: Path, confusions: pd.DataFrame) -> Section:
    """The confusion matrix as a heatmap, and its largest entries."""
    counts = confusions.set_index("class")
    pairs = [(int(counts.loc[a, b]), a, b) for a in counts.index for b in counts.columns if a != b]
    worst = sorted((pair for pair in pairs if pair[0]), reverse=True)[:8]
    rows = [(true, said, n, percent(n / counts.loc[true].sum())) for n, true, said in worst]
    most = "most often {} is taken for {}, {} times".format(*rows[0]) if rows else "no class is taken for another"
    return section(
        "What is taken for what",
        pair(
            picture(
                plots.confusion(confusions), folder / "figures" / "confusion.png",
                f"Confusion matrix; {most}",
                "Percent of the true class's images; the diagonal, bold, is right. Brighter: more often mistaken.",
            ),
            table(rows, ("true", "taken for", "images", "of the class")) if rows else "",
        ),
    )  # fmt: skip


def confidences(said: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Of the answers' file the probabilities (N, C), C 0 where they were not kept, and the predictions' own (N,)."""
    probabilities = said.filter(regex=r"^p\d+$").to_numpy()
    return probabilities, probabilities.max(1) if probabilities.size else said.probability.to_numpy()


def calibration_section(folder: Path, said: pd.DataFrame) -> Section:
    """Whether the network is as often right as it is sure; what a temperature would change."""
    probabilities, confidence = confidences(said)
    correct = (said.label == said.prediction).to_numpy()
    bins = calibration.reliability(confidence, correct)
    error = calibration.expected_error(bins)
    told = {
        "ECE": f"{percent(error, 2)} ({calibration.BINS} bins of equal width)",
        "mean confidence": percent(confidence.mean(), 2),
        "accuracy": percent(correct.mean(), 2),
    }
    if probabilities.size and len(said) > 1:
        labels = said.label.to_numpy()
        found = calibration.cross_fit(probabilities, labels)
        low, high = sorted(found.temperatures)
        told["temperature"] = f"{low:.3f} and {high:.3f}"
        told["ECE with it"] = percent(found.expected_error, 2)
        told["log loss"] = f"{calibration.log_loss(probabilities, labels):.4f}, with it {found.log_loss:.4f}"
        text = (
            "The temperature is fitted by log loss on one half of the images (every second one) and judged on the "
            "other, both ways round: two temperatures, and no image judged by one that was fitted on it. Above 1, "
            "the network is too sure."
        )
    elif probabilities.size:
        text = "The temperature needs two images, one to be fitted on, another to be judged on."
    else:
        text = (
            "The temperature needs the probabilities of all classes; the test_predictions.csv here keeps only that of "
            "the prediction."
        )
    verdict = "surer than it is right" if confidence.mean() > correct.mean() else "less sure than it is right"
    alt = f"Reliability diagram: on average the network is {verdict}"
    return section(
        "Calibration",
        pair(
            picture(plots.reliability(bins), folder / "figures" / "reliability.png", alt,
                    "Share that is right against confidence, with 95% Wilson intervals; below the diagonal the network "
                    "is too sure."),
            facts(told, "long")
            + note("ECE, the expected calibration error, is the mean gap between confidence and accuracy over the "
                   f"images. {text}"),
        ),
    )  # fmt: skip


def mistake_section(folder: Path, said: pd.DataFrame, names: Sequence[str]) -> Section:
    """The most confident mistakes: their images, where the evaluation left them here, else a table."""
    title, place = "The most confident mistakes", folder / "figures" / "mistakes.svg"
    confidence = confidences(said)[1]
    wrong = confident_mistakes(said.label.to_numpy(), said.prediction.to_numpy(), confidence)
    if not len(wrong):
        return section(title, note("None: every prediction is right."))
    first = str(said.columns[0])  # index in the test set, or file
    rows = [
        (str(said[first][i]), names[said.label[i]], names[said.prediction[i]], percent(confidence[i])) for i in wrong
    ]
    if place.exists():
        alt = "Images: " + "; ".join(f"{true} taken for {other}, {sure}" for _, true, other, sure in rows)
        return section(title, drawn(place.read_text(), alt, "The true class, what it was taken for, and how surely."))
    return section(
        title,
        note(f"Their images were not kept here; the {first} is that in the file of predictions."),
        table(rows, (first, "true", "taken for", "confidence")),
    )


def corruption_section(folder: Path, best: dict[str, Any]) -> list[Section]:
    """Accuracy on corrupted images, from corruptions.csv; nothing where none was asked for."""
    if "corruptions_acc" not in best:
        return []
    rows = read_table(folder / "corruptions.csv", "corruption")
    clean = best["images"]["acc"] if "images" in best else best["test_acc"]
    worst = min(rows.to_dict("records"), key=lambda row: row["accuracy"])
    severities = ", ".join(map(str, sorted(rows.severity.unique())))
    text = (
        f"Clean {percent(clean)}; corrupted {percent(best['corruptions_acc'])}, the mean over "
        f"{rows.corruption.nunique()} corruptions at severity {severities}, without test-time augmentation. "
        "The corruptions are generated here, in the manner of CIFAR-10-C (Hendrycks and Dietterich 2019): the figures "
        "cannot be compared with published ones digit for digit."
    )
    return [
        section(
            "Corrupted images",
            pair(
                picture(
                    plots.corruptions(rows, clean), folder / "figures" / "corruptions.png",
                    f"Accuracy by corruption and severity; lowest {percent(worst['accuracy'])}: "
                    f"{worst['corruption']}, severity {worst['severity']}",
                    "Accuracy in percent, the corruption that harms most last. Darker: lower.",
                ),
                note(text),
            ),
        )
    ]  # fmt: skip


def points(fraction: float) -> str:
    """A difference of accuracies in percentage points."""
    return f"{100 * fraction:+.2f}"


def comparison_section(folder: Path, other: Path) -> Section:
    """Against another experiment on the same test images, by McNemar's exact test."""
    whole, by_class = compare(folder, other)
    low, high = whole.interval
    told = {
        "this": percent(whole.first, 2),
        "other": percent(whole.second, 2),
        "difference": f"{points(whole.difference)} points ({points(low)} to {points(high)})",
        "only this right": f"{whole.only_first:,} of {whole.n:,} images",
        "only other right": f"{whole.only_second:,}",
        "McNemar": f"p {_p(whole.p_value)} (exact, two-sided)",
    }
    rows = [
        (
            r["class"], percent(r["first"]), percent(r["second"]), points(r["difference"]), r["only_first"],
            r["only_second"], _p(r["p_value"]), _p(r["p_adjusted"]),
        )
        for r in class_table(by_class).to_dict("records")
    ]  # fmt: skip
    header = ("class", "this", "other", "points", "only this", "only other", "p", "p adjusted")
    return section(
        f"Against {other}",
        facts(told, "long"),
        note(
            "Two checkpoints, this and the other, on the same test images; the interval is a 95% t interval of the "
            "images' paired differences. It does not tell how far seeds of the same recipe lie apart."
        ),
        table(rows, header),
        note(
            f"{len(rows)} classes are {len(rows)} tests, and some p come out small by chance. p adjusted is Benjamini "
            "and Hochberg's: of the classes where it is below 0.05, at most 5% are expected not to differ."
        ),
    )


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.0001 else "< 0.0001"


def recipe_section(best: dict[str, Any]) -> Section:
    """How to make the result again."""
    made = ", ".join(f"{name} {version}" for name, version in best["versions"].items())
    return section(
        "The recipe",
        facts({name: str(value) for name, value in best["recipe"].items()}),
        note(f"Made with {made}. Checkpoint {best['checkpoint']}, sha256 {best['sha256']}."),
    )


def legend(curves: pd.DataFrame, metric: str) -> str:
    """The trials of curves.csv in their colors, the best first, with their best validation and training value.

    A list, not a part of the figure: thirty trials can be read on a phone.
    """
    shown = percent if metric == "acc" else "{:.3f}".format
    items = []
    for row in plots.ranking(curves).reset_index().to_dict("records"):
        swatch = f'<i style="background:{plots.themed(row["color"])}"></i>'
        best = row[f"val_{metric}"]
        validated = "" if math.isnan(best) else f"<strong>{shown(best)}</strong> "
        values = f"{validated}{shown(row[f'train_{metric}'])}"
        items.append(f"<li>{swatch}{html.escape(row['trial_id'])} {values}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def curve_section(folder: Path, title: str, curves: pd.DataFrame | None = None) -> Section:
    """Accuracy and loss over epochs, from curves.csv or from a table like it."""
    if curves is None:
        curves = read_table(folder / "curves.csv", "trial_id")
    parts = []
    for metric, name, extreme in (("acc", "Accuracy", "highest"), ("loss", "Loss", "lowest")):
        plots.save(plots.curves(curves, metric), folder / "figures" / f"curves_{metric}.png")
        figure = plots.svg(plots.curves(curves, metric, legend=False), f"curves_{metric}")
        caption = f"{name}; below, of each {extreme} validation value bold, then the {extreme} training value."
        alt = f"{name} of {curves.trial_id.nunique()} trainings over epochs; the list below has their best values"
        parts.append(drawn(figure, alt, caption) + legend(curves, metric))
    return section(title, pair(*parts))


def gradient_section(folder: Path, title: str, file: Path | None = None) -> Section:
    """Gradients over epochs and what died, from the folder's gradients.csv or from another such file."""
    table_of_gradients = read_table(file or folder / "gradients.csv", "layer")
    place = folder / "figures" / ("gradients.png" if file is None else f"gradients_{file.stem}.png")
    plots.save(plots.gradients(table_of_gradients), place)
    said = " ".join(verdicts(table_of_gradients))
    caption = "Gradients over epochs: blue their sizes, orange, at the bottom, the share that was exactly zero"
    return section(title, photograph(place, f"Sizes of the gradients. {said}", caption), note(said))


def write_report(folder: Path, other: Path | None = None) -> None:
    """Write the page of a training that `cifar_lab.train` left in the folder, compared with the other folder's."""
    best = read_json(folder / "best.json")
    sections = tested_sections(folder, best, other)
    if (folder / "curves.csv").exists():
        sections.append(curve_section(folder, "Over epochs"))
    if (folder / "gradients.csv").exists():
        sections.append(gradient_section(folder, "Gradients"))
    title, lead = "Evaluation", headline(best)
    if "recipe" in best:
        sections.append(recipe_section(best))
        title, lead = f"{best['recipe']['arch']} on {best['recipe']['dataset']}", lead + scale(best)
    if "images" in best:
        title += f": images in {best['images']['folder']}"
    write_atomically(folder / "report.html", page(title, lead, context(folder, best), sections))
