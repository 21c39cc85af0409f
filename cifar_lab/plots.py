"""Figures, each a function from a table to a matplotlib figure."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm, Normalize, PowerNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from cifar_lab.gradient_table import BINS, EXPONENTS

PANELS = 24  # parameters that one figure of gradients has room for
HUMAN = 0.94  # accuracy of people on CIFAR-10, Karpathy 2011
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
VEHICLES = ("airplane", "automobile", "ship", "truck")
# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"
BLACK = "#000000"
LEADERS = (BLUE, VERMILION, GREEN, ORANGE, "#CC79A7", "#56B4E9", BLACK)
# Names of classes and runs are what they are: a $ in them begins no formula.
literal = mpl.rc_context({"text.parse_math": False})
WIDTH = 5.0  # inches: 480 pixels on a page, so that the text stays legible on a phone


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, as its name has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(svg(figure, path.stem))
    else:
        figure.savefig(path, dpi=130, bbox_inches="tight")


def svg(figure: Figure, name: str) -> str:
    """The figure as SVG: its texts are texts, it has no background, its ids are its own by `name`."""
    drawn = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", dpi=130, bbox_inches="tight", transparent=True, metadata=nothing)
    return drawn.getvalue()


def inline(drawn: str, alt: str) -> str:
    """What `svg` gave as an element of a page, which is read as `alt`."""
    element = themed(drawn[drawn.index("<svg") :])
    element = re.sub(r' xmlns(:xlink)?="[^"]*"| id="[\w.]+_\d+"', "", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)


def themed(drawn: str) -> str:
    """Black becomes the color of the page's text, blue the page's blue: light where the page is dark."""
    return drawn.replace(BLACK, "currentColor").replace(BLUE, "var(--blue)").replace(BLUE.lower(), "var(--blue)")


def percent_tick(share: float, place: float | None = None) -> str:
    """A fraction on an axis, in percent with the decimals that it has."""
    return f"{round(100 * share, 6):g}%"


def ranking(table: pd.DataFrame) -> pd.DataFrame:
    """A row a trial of curves.csv, the best val_acc first: its highest accuracies, its lowest losses, its color.

    The leaders have colors that can be told apart, the others are grey, paler the worse they were.
    """
    extremes = table.groupby("trial_id").agg(
        {"val_acc": "max", "train_acc": "max", "val_loss": "min", "train_loss": "min"}
    )
    extremes = extremes.sort_values("val_acc", ascending=False, kind="stable")
    others = len(extremes) - len(LEADERS)
    pale = [f"{GREY}{round(255 * alpha):02x}" for alpha in np.linspace(0.85, 0.4, max(0, others))]
    return extremes.assign(color=[*LEADERS, *pale][: len(extremes)])


@literal
def curves(table: pd.DataFrame, metric: str = "acc", *, legend: bool = True) -> Figure:
    """Every trial's validation curve bold and its training curve faint in the same colour, over epochs.

    Args:
        table: curves.csv: trial_id, epoch, train_acc, val_acc, train_loss, val_loss.
        metric: acc or loss.
        legend: whether the legend stands beside the axes.

    The legend, best trial first, gives each trial's best validation and training value: the maximum of an accuracy,
    the minimum of a loss; of one that did not validate, the latter only.
    """
    ranked = ranking(table)
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    for place, row in enumerate(ranked.reset_index().to_dict("records")):
        own = table[table.trial_id == row["trial_id"]]
        marker = "o" if len(own) == 1 else None
        parts = [part for part in ("val", "train") if own[f"{part}_{metric}"].notna().any()]
        label = "  ".join([row["trial_id"], *(f"{row[f'{part}_{metric}']:.3f}" for part in parts)])
        axes.plot(
            own.epoch, own[f"val_{metric}"], color=row["color"], lw=2, marker=marker, ms=4, label=label,
            zorder=3 - place / 100,
        )  # fmt: skip
        faint = to_rgba(row["color"], 0.4 * to_rgba(row["color"])[3])
        axes.plot(own.epoch, own[f"train_{metric}"], color=faint, lw=1, marker=marker, ms=2)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel({"acc": "accuracy", "loss": "loss (cross-entropy)"}[metric])
    if metric == "acc":
        axes.yaxis.set_major_formatter(percent_tick)
    axes.set_title("bold: validation, faint: training", fontsize=10)
    axes.grid(color=GREY, alpha=0.25)
    if legend:
        best = {"acc": "max", "loss": "min"}[metric]
        axes.legend(
            title=f"{'trial' if len(ranked) > 1 else 'run'}, {best} val, {best} train", title_fontsize=7,
            loc="upper left", bbox_to_anchor=(1.01, 1), ncols=1 + (len(ranked) - 1) // 32, frameon=False,
            prop={"family": "monospace", "size": 6},
        )  # fmt: skip
    return figure


def context(accuracy: float, interval: tuple[float, float], marks: Mapping[str, float]) -> Figure:
    """An accuracy with its interval on the scale from 0 to 100%, among others to compare it with, named in `marks`."""
    figure = Figure(figsize=(WIDTH, 1.3))
    axes = figure.add_axes((0.06, 0, 0.88, 1))
    axes.plot([0, 1], [0, 0], color=GREY, lw=1, zorder=1)
    axes.fill_between(interval, -0.5, 0.5, color=BLUE, alpha=0.35, lw=0)
    axes.plot([accuracy], [0], "o", color=BLUE, ms=8, zorder=3)
    axes.text(accuracy, 0.55, f"{accuracy:.1%}", color=BLUE, ha="center", weight="bold")
    height = lowest = -1.1
    before = 2.0
    for name, value in sorted(marks.items(), key=lambda mark: -mark[1]):
        height = height - 0.9 if before - value < 0.25 else -1.1  # a line lower, where there is no room beside it
        lowest, before = min(lowest, height), value
        axes.plot([value, value], [height + 0.5, 0.3], color=VERMILION, lw=1.2, ls="--", zorder=2)
        axes.text(value, height, f"{name} {100 * value:.3g}%", ha="center", fontsize=9)
    axes.set_xlim(0, 1)
    axes.set_ylim(lowest - 0.4, 1.4)
    axes.set_axis_off()
    return figure


@literal
def per_class(table: pd.DataFrame, *, human: bool = False) -> Figure:
    """Accuracy of each class with its Wilson interval, from per_class.csv; CIFAR-10's with the human 94%.

    Classes without images are left out.
    """
    ordered = table.dropna(subset="accuracy").sort_values("accuracy", ascending=True)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(ordered)))
    axes = figure.subplots()
    colors = np.where(ordered["class"].isin(ANIMALS), ORANGE, BLUE) if human else np.full(len(ordered), BLUE)
    errors = np.clip([ordered.accuracy - ordered.low, ordered.high - ordered.accuracy], 0, None)
    axes.barh(range(len(ordered)), ordered.accuracy, xerr=errors, color=colors, error_kw={"lw": 1.2, "capsize": 2.5})
    axes.set_yticks(range(len(ordered)), ordered["class"])
    for y, (accuracy, high, color) in enumerate(zip(ordered.accuracy, ordered.high, colors, strict=True)):
        # Inside its bar, where there is room.
        x, ink = (0.015, "#111111" if color == ORANGE else "#ffffff") if accuracy > 0.2 else (high + 0.02, BLACK)
        axes.text(x, y, f"{accuracy:.1%}", va="center", fontsize=9, color=ink, weight="bold")
    if human:
        axes.axvline(HUMAN, color=VERMILION, lw=1.2, ls="--")
        axes.text(HUMAN, len(ordered) - 0.35, "people 94%", color=VERMILION, fontsize=9, ha="center", va="bottom")
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(percent_tick)
    axes.set_xlabel("accuracy" + (" (orange: animals, blue: vehicles)" if human else ""))
    return figure


@literal
def confusion(table: pd.DataFrame) -> Figure:
    """What each class was taken for, from confusion.csv: percent of the true class's images."""
    counts = table.set_index("class")
    shares = counts.to_numpy() / counts.sum(axis=1).to_numpy().clip(1)[:, None]
    n = len(counts)
    figure = Figure(figsize=(1 + 0.42 * n, 1 + 0.34 * n))
    axes = figure.subplots()
    off_diagonal = np.where(np.eye(n, dtype=bool), np.nan, shares)
    shade = PowerNorm(0.5, 0, max(0.01, float(np.nanmax(off_diagonal))))
    axes.imshow(off_diagonal, cmap="cividis", norm=shade, aspect="auto")
    for i in range(n):
        for j in range(n):
            ink = BLACK if i == j else "#ffffff" if shade(shares[i, j]) < 0.6 else "#111111"
            axes.text(j, i, f"{shares[i, j]:.1%}"[:-1], ha="center", va="center", fontsize=8.5,
                      color=ink, weight="bold" if i == j else "normal")  # fmt: skip
    axes.set_xticks(range(n), counts.columns, rotation=45, ha="right")
    axes.set_yticks(range(n), counts.index)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure


def reliability(bins: Sequence[Mapping[str, float]]) -> Figure:
    """Accuracy against confidence, a point a bin with its Wilson interval, from `calibration.reliability`."""
    figure = Figure(figsize=(WIDTH, 4.4))
    axes, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1), "hspace": 0.08})
    confidence, accuracy = (np.array([row[name] for row in bins]) for name in ("confidence", "accuracy"))
    errors = np.clip([[row["accuracy"] - row["low"] for row in bins], [row["high"] - row["accuracy"] for row in bins]],
                     0, None)  # fmt: skip
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="as sure as right")
    axes.errorbar(confidence, accuracy, errors, color=BLUE, marker="o", ms=5, lw=1.5, capsize=2.5, label="this model")
    axes.set_ylabel("share that is right")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    edges = [row["from"] for row in bins]
    below.bar(edges, [row["n"] for row in bins], bins[0]["to"] - bins[0]["from"], align="edge", color=BLUE, alpha=0.6)
    below.set_ylabel("images")
    below.set_xlabel("confidence: probability of the prediction")
    axes.set_ylim(0, 1)
    axes.set_xlim(0, 1)
    for axis in (axes.yaxis, below.xaxis):
        axis.set_major_formatter(percent_tick)
    axes.grid(color=GREY, alpha=0.25)
    return figure


@literal
def mistakes(images: np.ndarray, captions: Sequence[str]) -> Figure:
    """Images (K, 32, 32, 3) uint8 in rows of four, each with its caption below."""
    rows = -(-len(images) // 4)
    figure = Figure(figsize=(WIDTH, 1.75 * rows), layout="constrained")
    grid = figure.subplots(rows, 4, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, caption in zip(grid, images, captions, strict=False):
        axes.imshow(image, interpolation="none")
        axes.set_title(caption, fontsize=9, y=-0.1, va="top")
    return figure


@literal
def rows(images: Mapping[str, np.ndarray]) -> Figure:
    """Rows of images (K, 3, 32, 32) uint8, each row with its name at the left, K the same in all."""
    count = max(len(row) for row in images.values())
    figure = Figure(figsize=(1.5 + 0.62 * count, 0.66 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 1, squeeze=False).ravel()
    for axes, (name, row) in zip(grid, images.items(), strict=True):
        padded = np.pad(row, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=255)
        axes.imshow(np.concatenate(list(padded.transpose(0, 2, 3, 1)), axis=1), interpolation="none")
        axes.set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    return figure


@literal
def one_factor(table: pd.DataFrame, field: str) -> Figure:
    """val_acc and val_loss over epochs, a color a value of one field: their mean, lowest and highest.

    Args:
        table: curves.csv with the field's column: epoch, val_acc, val_loss.
        field: the field whose values are told apart.
    """
    figure = Figure(figsize=(7.6, 2.8), layout="constrained")
    panels = figure.subplots(1, 2)
    groups = table.groupby(field)
    for color, (value, own) in zip(LEADERS * len(groups), groups, strict=False):
        for axes, metric in zip(panels, ("val_acc", "val_loss"), strict=True):
            across = own.groupby("epoch")[metric]
            mean = across.mean()
            axes.fill_between(mean.index, across.min(), across.max(), color=color, alpha=0.15, lw=0)
            axes.plot(mean.index, mean, color=color, lw=2, marker="o", ms=3, label=f"{field} {value}")
    for axes, metric in zip(panels, ("val_acc", "val_loss"), strict=True):
        axes.set_xlabel("epoch")
        axes.set_ylabel(metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=GREY, alpha=0.25)
    panels[0].yaxis.set_major_formatter(percent_tick)
    panels[0].legend(frameon=False, fontsize=9)
    return figure


@literal
def finalists(table: pd.DataFrame) -> Figure:
    """val_acc of each finalist, a dot a seed, its mean a bar, from finalists.csv; the best mean on top."""
    means = table.groupby("trial_id").val_acc.mean().sort_values()
    figure = Figure(figsize=(WIDTH, 0.9 + 0.4 * len(means)))
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(5))
    for y, (trial, mean) in enumerate(means.items()):
        accuracies = table.val_acc[table.trial_id == trial]
        axes.plot(accuracies, np.full(len(accuracies), y), "o", color=BLUE, ms=6, alpha=0.7)
        axes.plot([mean, mean], [y - 0.25, y + 0.25], color=VERMILION, lw=2.5)
    axes.set_yticks(range(len(means)), means.index)
    axes.set_ylim(-0.6, len(means) - 0.4)
    axes.xaxis.set_major_formatter(percent_tick)
    axes.set_xlabel("val_acc (a dot a seed; red: their mean)")
    axes.grid(color=GREY, alpha=0.25, axis="x")
    return figure


@literal
def differences(table: pd.DataFrame) -> Figure:
    """How many points the first network's accuracy lies above the second's, class by class, with 95% intervals.

    `table` is that of `cifar_lab.compare.class_table`. Filled: p_adjusted is below 0.05.
    """
    ordered = table.sort_values("difference")
    figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(ordered)))
    axes = figure.subplots()
    for y, row in enumerate(ordered.to_dict("records")):
        axes.plot([100 * row["low"], 100 * row["high"]], [y, y], color=BLUE, lw=1.5)
        face = BLUE if row["p_adjusted"] < 0.05 else "#ffffff"
        axes.plot([100 * row["difference"]], [y], "o", color=BLUE, mfc=face, ms=7)
    axes.axvline(0, color=BLACK, lw=0.8)
    axes.set_yticks(range(len(ordered)), ordered["class"])
    axes.set_xlabel("points of accuracy, first minus second (filled: p_adjusted < 0.05)")
    axes.grid(color=GREY, alpha=0.25, axis="x")
    return figure


def importance(table: pd.DataFrame) -> Figure:
    """Bars, from `tune.importance`: field, mean, std; the most important field on top."""
    ordered = table.sort_values("mean")
    figure = Figure(figsize=(WIDTH, 0.8 + 0.3 * len(ordered)))
    axes = figure.subplots()
    axes.barh(ordered.field, ordered["mean"], xerr=ordered["std"], color=BLUE, error_kw={"lw": 1.2, "capsize": 2.5})
    axes.axvline(0, color=BLACK, lw=0.8)
    axes.xaxis.set_major_formatter(lambda share, _: percent_tick(share).rstrip("%"))
    axes.set_xlabel("points of val_acc that the error grows by")
    axes.grid(color=GREY, alpha=0.25, axis="x")
    return figure


def corruptions(table: pd.DataFrame, clean: float) -> Figure:
    """Accuracy on corrupted images, from corruptions.csv: a row a corruption, the worst last; percent.

    Severities and their mean are the columns; `clean`, the accuracy without corruption, is the bright end of the scale.
    """
    cells = table.pivot(index="corruption", columns="severity", values="accuracy")
    cells["mean"] = cells.mean(axis=1)
    cells = cells.sort_values("mean", ascending=False)
    values, (rows, columns) = cells.to_numpy(float), cells.shape
    figure = Figure(figsize=(WIDTH, 0.7 + 0.3 * rows))
    axes = figure.subplots()
    shade = Normalize(values.min(), max(clean, values.max()))
    axes.imshow(values, cmap="cividis", norm=shade, aspect="auto")
    for i in range(rows):
        for j in range(columns):
            ink = "#ffffff" if shade(values[i, j]) < 0.6 else "#111111"
            axes.text(j, i, f"{values[i, j]:.1%}"[:-1], ha="center", va="center", fontsize=9, color=ink)
    axes.set_xticks(range(columns), cells.columns)
    axes.set_yticks(range(rows), cells.index)
    axes.set_xlabel("severity")
    return figure


@literal
def explained(image: np.ndarray, maps: Mapping[str, np.ndarray], title: str) -> Figure:
    """An image (3, 32, 32) uint8, as the network saw it, beside its heat maps (32, 32) from `cifar_lab.predict`."""
    figure = Figure(figsize=(3 + 3.6 * len(maps), 3.4), layout="constrained")
    panels = figure.subplots(1, 1 + len(maps))
    panels[0].imshow(image.transpose(1, 2, 0))
    panels[0].set_xlabel("as the network saw it", fontsize=9)
    for axes, (name, heat) in zip(panels[1:], maps.items(), strict=True):
        if name == "occlusion":
            limit = max(float(np.abs(heat).max()), 1e-6)
            shown, label = (
                axes.imshow(heat, cmap="RdBu_r", vmin=-limit, vmax=limit),
                "fall of the probability if hidden",
            )
        else:
            shown, label = axes.imshow(heat, cmap="cividis", vmin=0, vmax=1), "relative importance"
        axes.set_xlabel(name, fontsize=9)
        bar = figure.colorbar(shown, ax=axes, shrink=0.8, format=percent_tick)
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=8)
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(title)
    return figure


@literal
def tested(table: pd.DataFrame, metric: str = "acc") -> Figure:
    """Accuracy or loss on the test set after every epoch, a line a setting: what was read after the end.

    `table` is test.csv: setting_id, epoch, test_acc, test_loss.
    """
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    for color, (setting, own) in zip(LEADERS * len(table), table.groupby("setting_id"), strict=False):
        axes.plot(own.epoch, own[f"test_{metric}"], color=color, lw=1.8, marker="o", ms=3, label=str(setting))
    axes.set_xlabel("epoch")
    axes.set_ylabel({"acc": "test accuracy", "loss": "test loss (cross-entropy)"}[metric])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=GREY, alpha=0.25)
    if metric == "acc":
        axes.yaxis.set_major_formatter(percent_tick)
    axes.legend(frameon=False, fontsize=9)
    return figure


def slices(table: pd.DataFrame, fields: Sequence[str], winner: str, ranges: Mapping[str, bool]) -> Figure:
    """Each searched field against val_acc, a point a trial; the winner is ringed.

    Args:
        table: trials.csv.
        fields: the searched fields.
        winner: its trial_id.
        ranges: whether a field's axis is logarithmic.
    """
    columns = min(2, len(fields))
    rows = -(-len(fields) // columns)
    figure = Figure(figsize=(WIDTH, 2.2 * rows + 0.4), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    marks = {
        "completed": (GREEN, "o", "ran all epochs"), "stopped": (GREY, "x", "stopped"),
        "diverged": (VERMILION, "v", "diverged"), "failed": (VERMILION, "^", "failed"),
        "pending": (ORANGE, "s", "pending"),
    }  # fmt: skip
    for axes, name in zip(grid, fields, strict=False):
        values = table[name]
        if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
            names = sorted(set(values.astype(str)))
            values = values.astype(str).map(names.index)
            axes.set_xticks(range(len(names)), names)
            axes.set_xlim(-0.5, len(names) - 0.5)
        for status, (color, marker, label) in marks.items():
            own = table.status == status
            if own.any():
                axes.scatter(values[own], table.val_acc[own], c=color, marker=marker, s=24, alpha=0.9, label=label)
        best = table.trial_id == winner
        axes.scatter(values[best], table.val_acc[best], s=120, facecolors="none", edgecolors=BLUE, lw=1.8,
                     zorder=3, label="winner")  # fmt: skip
        if ranges.get(name):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name)
        axes.grid(color=GREY, alpha=0.25)
        axes.yaxis.set_major_formatter(percent_tick)
    for axes in grid[len(fields) :]:
        axes.remove()
    for axes in grid[: len(fields) : columns]:
        axes.set_ylabel("best val_acc")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def stops(epochs: Sequence[int], rungs: Sequence[int], max_epochs: int) -> Figure:
    """How many trials were under way after each epoch, with ASHA's rungs, against running all of them to the end."""
    trained = np.asarray(epochs)
    axis = np.arange(1, max_epochs + 1)
    alive = [(trained >= epoch).sum() for epoch in axis]
    figure = Figure(figsize=(WIDTH, 2.4))
    axes = figure.subplots()
    edges = [*(axis - 0.5), max_epochs + 0.5]
    axes.stairs([len(trained)] * max_epochs, edges, fill=True, color=GREY, alpha=0.18, label="saved")
    axes.stairs(alive, edges, fill=True, color=BLUE, label="trained")
    for rung in rungs:
        axes.axvline(rung + 0.5, color=VERMILION, lw=1.2, ls="--", label="rung" if rung == rungs[0] else None)
    axes.set_xlim(0.5, max_epochs + 0.5)
    axes.set_ylim(0, len(trained))
    axes.set_xlabel("epoch")
    axes.set_ylabel("trials under way")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9, borderaxespad=0)
    return figure


def simulation(table: pd.DataFrame) -> Figure:
    """What a replayed search takes and finds, over the number of workers, a line a policy.

    `table` is simulation.csv. Points are means, of the middle panel medians; bars are where 95% of the orders lie. One
    that leaves the middle panel at its top belongs to orders that never reach the target.
    """
    colors = {"ASHA": BLUE, "median stopping": GREEN, "random search": ORANGE}
    panels = (
        ("wall_seconds", 60, "wall time, minutes"),
        ("epochs_to_target", 1, f"epochs until val_acc {table.target[0]:.2%}"),
        ("val_acc", 1, "best val_acc"),
    )
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (name, unit, label) in zip(figure.subplots(1, 3), panels, strict=True):
        values = table[[name, f"{name}_low", f"{name}_high"]].to_numpy(float) / unit
        top = 1.1 * values[np.isfinite(values)].max()
        for i, (policy, color) in enumerate(colors.items()):
            own = (table.policy == policy).to_numpy()
            middle, low, high = np.minimum(values[own], 2 * top).T
            # Side by side, or bars would hide each other.
            x = table.workers[own] * 1.15 ** (i - 1)
            errors = np.clip([middle - low, high - middle], 0, None)
            axes.errorbar(x, middle, errors, color=color, lw=1.4, marker="o", ms=4, capsize=2,
                          label=policy)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(table.workers)), sorted(set(table.workers)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("workers")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if name == "wall_seconds":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.legend(frameon=False, fontsize=8)
        elif name == "epochs_to_target":
            axes.set_ylim(0, top)
        else:
            axes.axhline(table.target[0], color=GREY, lw=1, ls="--")
            axes.yaxis.set_major_formatter(percent_tick)
    return figure


def gradients(table: pd.DataFrame) -> Figure:
    """Each parameter's |gradient| over epochs, a panel each: weights first, biases in rows of their own.

    Args:
        table: gradients.csv, its columns as in `cifar_lab.gradient_table`.

    Blue is the share of the entries in each half decade, orange, at the bottom, the share that was exactly zero. Of
    more than PANELS parameters only those of `shown_parameters` are drawn.
    """
    table = table[table.kind == "gradient"]
    names, choice = shown_parameters(table)
    biases = [name for name in names if name.endswith("bias")]
    weights = [name for name in names if name not in biases]
    columns = min(6, max(len(weights), len(biases)))
    places = [name for group in (weights, biases) for name in [*group, *[""] * (-len(group) % columns)]]
    rows = len(places) // columns

    epochs = np.arange(table.epoch.min(), table.epoch.max() + 1)
    step = EXPONENTS[1] - EXPONENTS[0]
    edges = np.array([EXPONENTS[0] - step, *EXPONENTS, EXPONENTS[-1] + step])
    shares, zeros = {}, {}
    for name in names:
        own = table[table.layer == name].set_index("epoch").reindex(epochs)
        bins = own[list(BINS)].div(own.n, axis=0).to_numpy(float).T
        zeros[name] = own.zero.to_numpy(float)[None]
        bins = np.concatenate([bins[:1] - zeros[name], bins[1:]])
        shares[name] = np.ma.masked_less(np.ma.masked_invalid(bins), 1e-9)  # what the subtraction leaves of nothing
    filled = [i for i in range(len(BINS)) if any(share[i].count() for share in shares.values())]
    low, high = (filled[0], filled[-1] + 1) if filled else (0, len(BINS))
    top, foot = edges[high], edges[low]
    band = max(1.0, 0.12 * (top - foot))

    figure = Figure(figsize=(1.8 + 2.1 * columns, 1.2 + 1.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    sides = np.append(epochs, epochs[-1] + 1) - 0.5
    shade = LogNorm(1e-3, 1)
    for i, (axes, name) in enumerate(zip(grid, places, strict=True)):
        if not name:
            axes.set_axis_off()
            continue
        blue = axes.pcolormesh(sides, edges[low : high + 1], shares[name][low:high], cmap="Blues", norm=shade)
        orange = axes.pcolormesh(sides, [foot - band, foot], zeros[name], cmap="Oranges", vmin=0, vmax=1)
        axes.axhline(foot, color=GREY, lw=0.6)
        axes.set_title(name, fontsize=7)
        last = i + columns >= len(places) or not places[i + columns]
        axes.tick_params(labelsize=7, labelbottom=last)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    powers = [power for power in range(-10, 2, 2) if foot <= power <= top]
    grid[0].set_yticks([foot - band / 2, *powers], ["0", *(f"$10^{{{power}}}$" for power in powers)])
    for image, label in ((blue, "share of the entries"), (orange, "share exactly zero")):
        bar = figure.colorbar(image, ax=grid.tolist(), shrink=min(1, 1.6 / rows), aspect=15, pad=0.01)
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("|gradient|", fontsize=9)
    if choice:
        figure.suptitle(choice, fontsize=9)
    return figure


def shown_parameters(table: pd.DataFrame) -> tuple[list[str], str]:
    """The parameters that gradients.csv's figure has room for, in their order, and in words what was left out.

    Those of norms go first (a norm has as many biases as weights), then the biases, then all but evenly spaced ones.
    """
    sizes = {str(name): int(n) for name, n in table.groupby("layer", sort=False).n.max().items()}
    names = list(sizes)
    left_out: list[str] = []
    pairs = [(name, name.removesuffix("bias") + "weight") for name in names if name.endswith("bias")]
    norms = {name for pair in pairs if sizes.get(pair[1]) == sizes[pair[0]] for name in pair}
    biases = {bias for bias, _ in pairs}
    for group, what in ((norms, "the norms"), (biases, "the biases")):
        kept = [name for name in names if name not in group]
        if len(names) > PANELS and 0 < len(kept) < len(names):
            names, left_out = kept, [*left_out, what]
    if len(names) > PANELS:
        left_out.append(f"{len(names) - PANELS} spread evenly")
        names = [names[i] for i in np.linspace(0, len(names) - 1, PANELS).round().astype(int)]
    return names, f"{len(names)} of {len(sizes)} parameters; left out: {', '.join(left_out)}" if left_out else ""
