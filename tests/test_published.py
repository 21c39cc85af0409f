"""Published against ours: whose rows are replaced, in which order, how the figures are written for people."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cifar_lab.files import read_csv
from tune.published import COLUMNS, Row, shown, update


def row(study: str, variant: str, metric: str, **cells: Any) -> dict[str, Any]:
    return {"study": study, "variant": variant, "metric": metric, **cells}


def ours(study: str, variant: str, metric: str, value: float | None, **cells: Any) -> dict[str, Any]:
    made = {"scale": "all of it", "seed": "0", "hardware": "a machine", "command": f"run {study} {variant}"}
    return row(study, variant, metric, ours=value, **made, **cells)


KNOWN: list[tuple[str, str, list[Row]]] = [
    (
        study,
        variant,
        [row(study, variant, metric, published=0.7, reason="not run; wants an hour") for metric in metrics],
    )
    for study, variant, metrics in (
        ("000-a", "corrected", ("val_acc", "val_loss")),
        ("000-a", "as_reported", ("val_acc",)),
        ("002-b", "corrected", ("test_acc",)),
        ("beyond-c", "corrected", ("test_acc",)),
    )
]


def table(folder: Path) -> list[tuple[str, str, str, str]]:
    return [(r["study"], r["variant"], r["metric"], r["ours"]) for r in read_csv(folder / "published.csv")]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_columns_are_the_promised_ones() -> None:
    promised = "study variant metric published ours low high n seed scale hardware command reason"
    assert promised.split() == list(COLUMNS)


def test_a_studys_rows_replace_its_own_and_leave_the_others(tmp_path: Path) -> None:
    update(tmp_path, KNOWN, [ours("002-b", "corrected", "test_acc", 0.5)])
    unrun = [("000-a", "corrected", "val_acc", ""), ("000-a", "corrected", "val_loss", "")]
    first = [*unrun, ("000-a", "as_reported", "val_acc", ""), ("002-b", "corrected", "test_acc", "0.5")]
    assert table(tmp_path) == [*first, ("beyond-c", "corrected", "test_acc", "")]
    made = [ours("000-a", "corrected", "val_acc", 0.25), ours("000-a", "corrected", "val_loss", 1.5)]
    for _ in range(2):  # the same again changes nothing
        update(tmp_path, KNOWN, made)
        again = [("000-a", "corrected", "val_acc", "0.25"), ("000-a", "corrected", "val_loss", "1.5"), *first[2:]]
        assert table(tmp_path) == [*again, ("beyond-c", "corrected", "test_acc", "")]
    update(tmp_path, KNOWN, [ours("002-b", "corrected", "test_acc", 0.75)])
    assert table(tmp_path)[3] == ("002-b", "corrected", "test_acc", "0.75") and len(table(tmp_path)) == 5


def test_the_order_is_the_declared_one_whatever_was_run_first(tmp_path: Path) -> None:
    for study, variant, rows in reversed(KNOWN):
        update(tmp_path, KNOWN, [ours(study, variant, r["metric"], 0.5) for r in rows])
    assert [line[:2] for line in table(tmp_path)] == [(s, v) for s, v, rows in KNOWN for _ in rows]
    assert {line[3] for line in table(tmp_path)} == {"0.5"}


def test_a_study_that_was_not_run_is_told_as_it_is_declared_now(tmp_path: Path) -> None:
    update(tmp_path, KNOWN, [ours("002-b", "corrected", "test_acc", 0.5)])
    changed = [row("beyond-c", "corrected", m, reason="not run; wants two hours") for m in ("test_acc", "val_acc")]
    update(tmp_path, [*KNOWN[:-1], ("beyond-c", "corrected", changed)], [ours("002-b", "corrected", "test_acc", 0.5)])
    assert [r["reason"] for r in read_csv(tmp_path / "published.csv")][-2:] == ["not run; wants two hours"] * 2


def test_figures_are_kept_in_full_and_shown_rounded(tmp_path: Path) -> None:
    value = 0.1234567890123
    update(
        tmp_path, KNOWN, [ours("002-b", "corrected", "test_acc", value, low=0.11, high=0.14, n=360, published=0.725)]
    )
    assert table(tmp_path)[3][3] == str(value)
    page = (tmp_path / "README.md").read_text()
    line = next(cells(line) for line in page.splitlines() if line.startswith("| 002-b, corrected"))
    assert line[:6] == ["002-b, corrected", "test_acc", "72.5", "12.3", "11.0 to 14.0", "360"]
    assert "run 002-b corrected" in page and "a machine" in page and "seed 0" in page and "all of it" in page
    assert "run 000-a" not in page, "what was not run has no command"
    assert "not run; wants an hour" in page


def test_the_page_has_a_section_a_report_and_a_whole_line_a_row(tmp_path: Path) -> None:
    (tmp_path / "002-b" / "corrected").mkdir(parents=True)
    update(tmp_path, KNOWN, [ours("002-b", "corrected", "test_acc", 0.5)])
    page = (tmp_path / "README.md").read_text()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == ["000", "002", "Beyond"]
    lines = [line for line in page.splitlines() if line.startswith("|")]
    header = next(line for line in lines if line.startswith("| study"))
    assert {len(cells(line)) for line in lines} == {len(cells(header))}
    assert sum(cells(line)[0].startswith(("000-a", "beyond-c", "[002-b")) for line in lines) == 5
    assert "| [002-b, corrected](002-b/corrected) |" in page and "](000-a" not in page, "a link where there is a folder"


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("test_acc", "", ""),
        ("test_acc", "0.9237", "92.4"),
        ("val_acc_last at lr 0.001", "0.7", "70.0"),
        ("test_acc at class bird", "1.0", "100.0"),
        ("class_std", "0.108", "10.8"),
        ("val_loss_min at lr 0.001", "0.905", "0.905"),
        ("test_macro_f1_max", "0.72", "0.720"),
        ("val_acc at activation elu over activation relu", "0.015", "+1.5"),
        ("val_acc at mixup 0.2 over mixup 0.0", "-0.0123", "-1.2"),
        ("val_acc at mixup 0.2 over mixup 0.0", "0.0", "0.0"),
        ("epoch_seconds at activation elu over activation relu", "2.34", "+2.3"),
        ("epoch_seconds", "12.0", "12.0"),
        ("class_var", "0.00369", "36.9"),
        ("best_epoch", "27", "27"),
        ("tta_acc", "0.94", "94.0"),
        ("test_loss_first at lr 0.01", "2.0", "2.000"),
    ],
)
def test_accuracies_are_shown_in_percent_differences_with_their_sign(metric: str, value: str, text: str) -> None:
    assert shown(metric, value) == text
