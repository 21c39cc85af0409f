"""Figures: names of classes and runs stand on them as they are."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from cifar_lab import plots
from cifar_lab.compare import class_table, compare
from cifar_lab.evaluate import Evaluation
from cifar_lab.gradient_table import COLUMNS
from cifar_lab.report import write_report

# The first is no formula, the second one that would be set as such.
NAMES = ("$^_$", "$x^2$", "5$", r"\$a\$")


def figures(folder: Path) -> dict[str, Figure]:
    """Each figure with a name from outside on it."""
    labels = np.arange(8) % 4
    for place, chances in (("a", np.eye(4)[labels]), ("b", np.eye(4)[labels[::-1]])):
        (folder / place).mkdir()
        Evaluation(labels, chances * 0.9 + 0.025, NAMES).write(folder / place)
    values = {"train_acc": 0.5, "val_acc": 0.5, "train_loss": 1.0, "val_loss": 1.0, "test_acc": 0.5, "test_loss": 1.0}
    runs = pd.DataFrame([{"trial_id": name, "setting_id": name, "epoch": 1, **values} for name in NAMES])
    pixels = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    return {
        "curves": plots.curves(runs),
        "per_class": plots.per_class(pd.read_csv(folder / "a" / "per_class.csv")),
        "confusion": plots.confusion(pd.read_csv(folder / "a" / "confusion.csv")),
        "mistakes": plots.mistakes(pixels, [f"{name}\nas {name}" for name in NAMES]),
        "rows": plots.rows(dict.fromkeys(NAMES, pixels.transpose(0, 3, 1, 2))),
        "one_factor": plots.one_factor(runs, "trial_id"),
        "finalists": plots.finalists(runs),
        "differences": plots.differences(class_table(compare(folder / "a", folder / "b")[1])),
        "tested": plots.tested(runs),
        "explained": plots.explained(pixels[0].transpose(2, 0, 1), {"gradcam": np.zeros((32, 32))}, " ".join(NAMES)),
    }


def texts(figure: Figure) -> str:
    """What can be read on a figure; a formula is in pieces."""
    return html.unescape(re.sub("<!--.*?-->", "", plots.svg(figure, "test"), flags=re.DOTALL))


def test_a_dollar_in_a_name_is_a_dollar(tmp_path: Path) -> None:
    for what, figure in figures(tmp_path).items():
        drawn = texts(figure)
        assert not [name for name in NAMES if name not in drawn], what
        plots.save(figure, tmp_path / f"{what}.png")


def test_powers_on_an_axis_are_still_powers() -> None:
    row = {"epoch": 1, "layer": "head.weight", "kind": "gradient", "n": 10, "zero": 0.0, "rms": 0.1, "b16": 10}
    table = pd.DataFrame([row], columns=COLUMNS).fillna(0)
    assert "$" not in texts(plots.gradients(table))


@pytest.mark.parametrize("names", [("$^_$", "$"), ("None", "NA"), ("null", "nan")])
def test_a_page_is_written_whatever_the_classes_and_the_run_are_called(names: tuple[str, str], tmp_path: Path) -> None:
    labels = np.array([0, 0, 1, 1])
    Evaluation(labels, np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]]), names).write(tmp_path)
    own = {"folder": "own", "acc": 0.75, "n": 4, "low": 0.3, "high": 0.95}
    (tmp_path / "best.json").write_text(json.dumps({"images": own, "tta": None}))
    (tmp_path / "test_predictions.csv").rename(tmp_path / "predictions.csv")
    (tmp_path / "curves.csv").write_text(
        "trial_id,epoch,train_loss,train_acc,val_loss,val_acc,val_macro_f1,lr,seconds\n"
        f"{names[0]},1,1.0,0.5,1.0,0.5,0.5,0.1,1\n{names[0]},2,nan,0.5,nan,0.25,0.5,0.1,1\n"
    )
    write_report(tmp_path)
    page = html.unescape((tmp_path / "report.html").read_text())
    for name in names:
        assert f'<td class="text">{name}</td>' in page and f">{name}</text>" in page
    assert f"{names[0]} <strong>50.0%</strong> 50.0%" in page and f"{names[0]} <strong>1.000</strong> 1.000" in page
