"""report.html: what a run found, on one page that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cifar_lab import plots
from cifar_lab.evaluate import t_interval
from cifar_lab.files import write_atomically
from cifar_lab.gradients import verdicts

CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #666; --line: #ddd; --card: #f6f7f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181a; --faint: #a0a0a0; --line: #3a3d40; --card: #202326 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper) }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .6rem 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem }
.headline { font-size: 1.25rem; padding: .8rem 1rem; border-left: .3rem solid #0072B2; background: var(--card) }
p.note, figcaption { color: var(--faint); font-size: .9rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child, td.text { text-align: left }
figure { margin: .8rem 0 } img { max-width: 100%; height: auto; background: #fff; border-radius: .3rem }
code { font-size: .85rem; overflow-wrap: anywhere }
@media print { body { max-width: none; font-size: 11pt } figure, table { break-inside: avoid } }
"""


def percent(value: float, decimals: int = 1) -> str:
    """A fraction in percent."""
    return f"{value:.{decimals}%}"


def headline(best: dict[str, Any]) -> str:
    """The test accuracy with its interval, in a sentence, from best.json."""
    if "test_acc" not in best:
        return f"Validation accuracy {percent(best['val_acc'], 2)} at epoch {best['epoch']}; not tested."
    seeds, n = best["test_acc_seeds"], best["test_n"]
    if len(seeds) < 2:
        low, high = best["test_low"], best["test_high"]
        reached = f"{percent(best['test_acc'], 2)} ({percent(low, 2)} to {percent(high, 2)}"
        return f"Test accuracy {reached}, Wilson 95%, n = {n:,}, one seed)."
    low, high = t_interval(seeds)
    mean = sum(seeds) / len(seeds)
    reached = f"{percent(mean, 2)} ({percent(low, 2)} to {percent(high, 2)}"
    return f"Test accuracy {reached}, t 95%, {len(seeds)} seeds, n = {n:,})."


def scale(best: dict[str, Any]) -> str:
    """What was scaled down, or nothing: of a study against the published one, else of the data."""
    if study := best.get("study"):
        return f" {study['name']}, {study['variant']}: {study['scale']}."
    limit = best["recipe"]["limit_train"]
    return f" Trained on {limit:,} images only (limit_train)." if limit else ""


def study_section(best: dict[str, Any]) -> list[str]:
    """Published against ours, where the run reproduces a study."""
    if "study" not in best:
        return []
    numbers = ("published", "ours", "low", "high")
    rows = [
        (f["metric"], *("" if f[name] is None else f"{f[name]:.4f}" for name in numbers), f["reason"])
        for f in best["study"]["figures"]
    ]
    return [section("Published against ours", table(rows, ("metric", "published", "ours", "low", "high", "remarks")))]


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """An HTML table; texts to the left, numbers to the right."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td class="text">{html.escape(c)}</td>' if isinstance(c, str) and not c[:1].isdigit()
                         else f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>"
        for row in rows
    )  # fmt: skip
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title: str, *parts: str) -> str:
    """A heading with what belongs under it."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def note(text: str) -> str:
    """A paragraph that explains."""
    return f'<p class="note">{html.escape(text)}</p>'


def picture(path: Path, caption: str) -> str:
    """A PNG, inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """The whole page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head><body>'
        f'<h1>{html.escape(title)}</h1><p class="headline">{html.escape(lead)}</p>{"".join(sections)}</body></html>\n'
    )


def class_sections(folder: Path, best: dict[str, Any]) -> list[str]:
    """Per-class accuracy and confusion, from the test files in the folder; nothing where it was not tested."""
    if not (folder / "per_class.csv").exists():
        return []
    classes = pd.read_csv(folder / "per_class.csv", dtype={"class": str})
    confusions = pd.read_csv(folder / "confusion.csv", dtype={"class": str})
    cifar10 = best.get("recipe", {}).get("dataset") == "cifar10"
    plots.save(plots.per_class(classes, human=cifar10), folder / "figures" / "per_class.png")
    plots.save(plots.confusion(confusions), folder / "figures" / "confusion.png")
    accuracy = classes.accuracy
    spread = f"{percent(accuracy.std(ddof=0))} (population standard deviation, ddof 0)"
    text = f"Mean {percent(accuracy.mean())}, spread {spread}."
    if cifar10:
        animals = classes["class"].isin(plots.ANIMALS)
        text += f" Animals {percent(accuracy[animals].mean())}, vehicles {percent(accuracy[~animals].mean())}."
        text += " People reach about 94%."
    counts = confusions.set_index("class")
    pairs = [(int(counts.loc[a, b]), a, b) for a in counts.index for b in counts.columns if a != b]
    worst = "; ".join(f"{a} taken for {b}, {n} times" for n, a, b in sorted(pairs, reverse=True)[:3])
    rows = [
        (r["class"], r["n"], r["correct"], percent(r["accuracy"]), percent(r["low"]), percent(r["high"]))
        for r in classes.to_dict("records")
    ]
    return [
        section(
            "Class by class",
            note(text + " Of the seed with the best val_acc; bars and low to high: 95% Wilson intervals."),
            picture(folder / "figures" / "per_class.png", "Test accuracy of each class"),
            table(rows, ("class", "n", "correct", "accuracy", "low", "high")),
        ),
        section(
            "What is taken for what",
            picture(
                folder / "figures" / "confusion.png", "Percent of the true class's test images; the diagonal is right"
            ),
            note(f"Most often: {worst}."),
        ),
    ]


def recipe_section(best: dict[str, Any]) -> str:
    """How to make the result again."""
    recipe = table([(k, str(v)) for k, v in best["recipe"].items()], ("field", "value"))
    made = ", ".join(f"{name} {version}" for name, version in best["versions"].items())
    return section(
        "How it was made",
        f"<p><code>{html.escape(best['command'])}</code></p>",
        note(f"On {best['hardware']}. {made}. Checkpoint {best['checkpoint']}, sha256 {best['sha256']}."),
        recipe,
    )


def curve_section(folder: Path, title: str) -> str:
    """Accuracy and loss over epochs, from curves.csv."""
    table_of_curves = pd.read_csv(folder / "curves.csv", dtype={"trial_id": str})
    pictures = []
    for metric, caption in (("acc", "Accuracy"), ("loss", "Loss")):
        place = folder / "figures" / f"curves_{metric}.png"
        plots.save(plots.curves(table_of_curves, metric), place)
        pictures.append(picture(place, f"{caption} over epochs: validation bold, training faint in the same color"))
    return section(title, *pictures)


def gradient_section(folder: Path, title: str, file: Path | None = None) -> str:
    """Gradients over epochs and what died, from the folder's gradients.csv or from another such file."""
    table_of_gradients = pd.read_csv(file or folder / "gradients.csv", dtype={"layer": str})
    place = folder / "figures" / ("gradients.png" if file is None else f"gradients_{file.stem}.png")
    plots.save(plots.gradients(table_of_gradients), place)
    caption = "Gradients over epochs: blue their sizes, orange, at the bottom, the share that was exactly zero"
    return section(title, picture(place, caption), note(" ".join(verdicts(table_of_gradients))))


def write_report(folder: Path) -> None:
    """Write the page of a training that `cifar_lab.train` left in the folder."""
    place = folder / "best.json"
    best = json.loads(place.read_text()) if place.exists() else {}
    sections = class_sections(folder, best)
    if (folder / "curves.csv").exists():
        sections.append(curve_section(folder, "Over epochs"))
    if (folder / "gradients.csv").exists():
        sections.append(gradient_section(folder, "Gradients"))
    if "recipe" in best:
        sections.append(recipe_section(best))
        title = f"{best['recipe']['arch']} on {best['recipe']['dataset']}"
        lead = headline(best) + scale(best)
    else:
        title, lead = "Evaluation", headline(best)
    write_atomically(folder / "report.html", page(title, lead, sections))
