"""Figures, each a function from a table to a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from cifar_lab.gradients import BINS, EXPONENTS

PANELS = 24  # parameters that one figure of gradients has room for
HUMAN = 0.94  # accuracy of people on CIFAR-10, Karpathy 2011
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"
LEADERS = (BLUE, VERMILION, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def curves(table: pd.DataFrame, metric: str = "acc") -> Figure:
    """Every trial's validation curve bold and its training curve faint in the same colour, over epochs.

    Args:
        table: curves.csv: trial_id, epoch, train_acc, val_acc, train_loss, val_loss.
        metric: acc or loss.

    The legend, best trial first, gives each trial's best validation and training value: the maximum of an accuracy,
    the minimum of a loss.
    """
    best = "max" if metric == "acc" else "min"
    extremes = table.groupby("trial_id")[[f"val_{metric}", f"train_{metric}"]].agg(best)
    extremes = extremes.sort_values(f"val_{metric}", ascending=metric == "loss")
    # The leaders in colors that can be told apart, the others paler the worse they were.
    pale = mpl.colormaps["Greys"](np.linspace(0.65, 0.3, max(1, len(extremes) - len(LEADERS))))
    palette = [*LEADERS, *pale]
    columns = 1 + (len(extremes) - 1) // 32
    figure = Figure(figsize=(8 + 1.8 * columns, 5.2))
    axes = figure.subplots()
    for place, (trial, values) in enumerate(extremes.iterrows()):
        own = table[table.trial_id == trial]
        color = palette[place]
        marker = "o" if len(own) == 1 else None
        label = f"{trial}  {values.iloc[0]:.3f}  {values.iloc[1]:.3f}"
        axes.plot(
            own.epoch, own[f"val_{metric}"], color=color, lw=2, marker=marker, ms=4, label=label, zorder=3 - place / 100
        )
        axes.plot(own.epoch, own[f"train_{metric}"], color=color, lw=1, alpha=0.35, marker=marker, ms=2)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel({"acc": "accuracy", "loss": "loss (cross-entropy)"}[metric])
    if metric == "acc":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title("bold: validation, faint: training")
    axes.grid(alpha=0.3)
    axes.legend(
        title=f"{'trial' if len(extremes) > 1 else 'run'}, {best} val, {best} train",
        loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7, title_fontsize=8, ncols=columns, frameon=False,
        prop={"family": "monospace", "size": 7},
    )  # fmt: skip
    return figure


def per_class(table: pd.DataFrame, *, human: bool = False) -> Figure:
    """Accuracy of each class with its Wilson interval, from per_class.csv; CIFAR-10's with the human 94%."""
    ordered = table.sort_values("accuracy", ascending=True)
    figure = Figure(figsize=(7, 0.9 + 0.36 * len(ordered)))
    axes = figure.subplots()
    animals = ordered["class"].isin(ANIMALS)
    colors = np.where(animals, ORANGE, BLUE) if human else [BLUE] * len(ordered)
    errors = np.clip([ordered.accuracy - ordered.low, ordered.high - ordered.accuracy], 0, None)
    axes.barh(ordered["class"], ordered.accuracy, xerr=errors, color=colors, error_kw={"lw": 1, "capsize": 2})
    for y, accuracy in enumerate(ordered.accuracy):
        axes.text(0.01, y, f"{accuracy:.1%}", va="center", fontsize=8, color="white", weight="bold")
    if human:
        axes.axvline(HUMAN, color=VERMILION, lw=1.2, ls="--")
        axes.text(HUMAN, len(ordered) - 0.4, "human 94% ", color=VERMILION, fontsize=8, ha="right", va="bottom")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("accuracy" + (" (orange: animals, blue: vehicles)" if human else ""))
    return figure


def confusion(table: pd.DataFrame) -> Figure:
    """What each class was taken for, from confusion.csv: percent of the true class's images."""
    counts = table.set_index("class")
    shares = counts.to_numpy() / counts.sum(axis=1).to_numpy().clip(1)[:, None]
    n = len(counts)
    figure = Figure(figsize=(1.8 + 0.55 * n, 1.4 + 0.5 * n))
    axes = figure.subplots()
    off_diagonal = np.where(np.eye(n, dtype=bool), np.nan, shares)
    limit = max(0.01, float(np.nanmax(off_diagonal)))
    image = axes.imshow(off_diagonal, cmap="cividis", vmin=0, vmax=limit)
    for i in range(n):
        for j in range(n):
            dark = i != j and shares[i, j] < 0.6 * limit
            axes.text(j, i, f"{shares[i, j]:.1%}"[:-1], ha="center", va="center", fontsize=7,
                      color="white" if dark else "black", weight="bold" if i == j else "normal")  # fmt: skip
    axes.set_xticks(range(n), counts.columns, rotation=45, ha="right")
    axes.set_yticks(range(n), counts.index)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(
        image,
        ax=axes,
        shrink=0.8,
        format=PercentFormatter(1, decimals=0),
        label="mistaken for, share of the true class",
    )
    return figure


def tested(table: pd.DataFrame) -> Figure:
    """Accuracy and loss on the test set after every epoch, a line a setting: what was read after the end.

    `table` is test.csv: setting_id, epoch, test_acc, test_loss.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, name, label in zip(
        figure.subplots(1, 2), ("test_acc", "test_loss"), ("test accuracy", "test loss (cross-entropy)"), strict=True
    ):
        for color, (setting, own) in zip(LEADERS * len(table), table.groupby("setting_id"), strict=False):
            axes.plot(own.epoch, own[name], color=color, lw=1.8, marker="o", ms=3, label=str(setting))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if name == "test_acc":
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.legend(frameon=False, fontsize=8)
    return figure


def slices(table: pd.DataFrame, fields: Sequence[str], winner: str, ranges: Mapping[str, bool]) -> Figure:
    """Each searched field against val_acc, a point a trial; the winner is ringed.

    Args:
        table: trials.csv.
        fields: the searched fields.
        winner: its trial_id.
        ranges: whether a field's axis is logarithmic.
    """
    columns = min(3, len(fields))
    rows = -(-len(fields) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * rows), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    colors = {"completed": GREEN, "stopped": GREY, "diverged": VERMILION, "failed": VERMILION, "pending": ORANGE}
    for axes, name in zip(grid, fields, strict=False):
        values = table[name]
        if values.dtype.kind in "OUSTb" or isinstance(values.dtype, pd.StringDtype):
            values = values.astype(str)
        axes.scatter(values, table.val_acc, c=[colors[s] for s in table.status], s=16, alpha=0.85, zorder=2)
        best = table.trial_id == winner
        axes.scatter(values[best], table.val_acc[best], s=110, facecolors="none", edgecolors=BLUE, lw=1.8, zorder=3)
        if ranges.get(name):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in grid[len(fields) :]:
        axes.remove()
    grid[0].set_ylabel("best val_acc")
    return figure


def stops(epochs: Sequence[int], rungs: Sequence[int], max_epochs: int) -> Figure:
    """How many trials were under way after each epoch, with ASHA's rungs, against running all of them to the end."""
    trained = np.asarray(epochs)
    axis = np.arange(1, max_epochs + 1)
    alive = [(trained >= epoch).sum() for epoch in axis]
    figure = Figure(figsize=(7, 2.6))
    axes = figure.subplots()
    axes.fill_between(axis, len(trained), step="mid", color=GREY, alpha=0.18, label="saved")
    axes.fill_between(axis, alive, step="mid", color=BLUE, alpha=0.85, label="trained")
    for rung in rungs:
        axes.axvline(rung + 0.5, color=VERMILION, lw=1, ls="--", label="rung" if rung == rungs[0] else None)
    axes.set_xlim(0.5, max_epochs + 0.5)
    axes.set_ylim(0, len(trained))
    axes.set_xlabel("epoch")
    axes.set_ylabel("trials")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    return figure


def gradients(table: pd.DataFrame) -> Figure:
    """Each parameter's |gradient| over epochs, a panel each: weights first, biases in rows of their own.

    Args:
        table: gradients.csv, its columns as in `cifar_lab.gradients`.

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
