"""TensorBoard's event files: they say what curves.csv and the recipe say, whatever was interrupted."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

from cifar_lab.board import Board
from cifar_lab.checkpoint import CURVE_COLUMNS, Row
from cifar_lab.recipe import Recipe
from cifar_lab.train import main

WORDS = (
    "--arch classic_cnn --width 3 --dataset digits --limit_train 100 --optimizer adam --lr 0.003 --max_epochs 4 --json"
)
RECIPE = Recipe(arch="classic_cnn")


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def scalars(folder: Path) -> list[Row]:
    """The rows that the event files hold, a step each; every column is known at the same steps."""
    found = read(folder)
    columns = {name: found.Scalars(name) for name in CURVE_COLUMNS[1:]}
    steps = [event.step for event in columns["val_acc"]]
    assert all([event.step for event in events] == steps for events in columns.values())
    return [
        {"epoch": step, **{name: events[i].value for name, events in columns.items()}} for i, step in enumerate(steps)
    ]


def fields(folder: Path) -> tuple[str, dict[str, Any]]:
    """What HPARAMS shows of a training: its name and its recipe."""
    content = read(folder).SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    told = parse_session_start_info_plugin_data(content)
    return told.group_name, {name: getattr(v, v.WhichOneof("kind")) for name, v in told.hparams.items()}


def curve(folder: Path) -> list[Row]:
    """curves.csv, in single precision as TensorBoard keeps it."""
    with (folder / "curves.csv").open() as file:
        return [{name: float(np.float32(row[name])) for name in CURVE_COLUMNS} for row in csv.DictReader(file)]


def row(epoch: int, value: float) -> Row:
    return {**dict.fromkeys(CURVE_COLUMNS, value), "epoch": epoch}


def best(folder: Path) -> list[float]:
    return [event.value for event in read(folder).Scalars("best_val_acc")]


def test_a_training_shows_its_curve_and_its_recipe_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words, folder = [*WORDS.split(), "--results_dir", str(tmp_path), "--name", "one"], tmp_path / "one"
    add = Board.add

    def interrupt(board: Board, last: Row) -> None:
        add(board, last)
        if last["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Board, "add", interrupt)
    assert main(words) == 1
    told = json.loads(capfd.readouterr().out)
    assert told["status"] == {"pending": 1} and told["folder"] == str(folder) and "--json" in told["resume"].split()
    assert [step["epoch"] for step in scalars(folder / "tensorboard")] == [1, 2]
    monkeypatch.undo()
    monkeypatch.setattr(os, "getpid", lambda: 1)  # another process has a file of its own
    assert told["resume"].split()[3:] == [*words, "--resume"]
    assert main([*words, "--resume"]) == 0
    assert len(list((folder / "tensorboard").iterdir())) == 2
    assert scalars(folder / "tensorboard") == curve(folder)
    accuracies = [epoch["val_acc"] for epoch in curve(folder)]
    assert best(folder / "tensorboard") == list(np.maximum.accumulate(accuracies))
    told = json.loads(capfd.readouterr().out)
    recipe = {name: "unset" if value is None else value for name, value in told["recipe"].items()}
    assert fields(folder / "tensorboard") == ("one", recipe)


def test_an_epoch_that_is_told_again_is_written_once(tmp_path: Path) -> None:
    board = Board(tmp_path, RECIPE, "a")
    for epoch in (1, 2, 2, 1, 3):
        board.add(row(epoch, epoch / 4))
    assert scalars(tmp_path) == [row(1, 0.25), row(2, 0.5), row(3, 0.75)]


def test_a_resumed_training_replaces_the_epochs_that_it_trains_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Board(tmp_path, RECIPE, "a")
    for epoch in (1, 2, 3):
        first.add(row(epoch, epoch / 4))
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-5])  # killed while it wrote
    monkeypatch.setattr(time, "time", lambda: 0.0)  # on another machine, whose clock is wrong
    second = Board(tmp_path, RECIPE, "a")
    for epoch in (2, 3, 4):
        second.add(row(epoch, 0.125))
    assert scalars(tmp_path) == [row(1, 0.25), *(row(epoch, 0.125) for epoch in (2, 3, 4))]
    assert best(tmp_path) == [0.25] * 4
    third = Board(tmp_path, RECIPE, "a")
    third.add(row(4, 0.5))
    assert scalars(tmp_path)[-1] == row(4, 0.5) and best(tmp_path) == [0.25, 0.25, 0.25, 0.5]


def test_a_diverged_epoch_is_shown_and_is_not_the_best(tmp_path: Path) -> None:
    board = Board(tmp_path, RECIPE, "a")
    board.add(row(1, 0.25))
    board.add(row(2, 0.5) | {"val_loss": math.nan})
    assert [event.step for event in read(tmp_path).Scalars("best_val_acc")] == [1]
    assert math.isnan(scalars(tmp_path)[1]["val_loss"])


def test_what_cannot_be_written_ends_the_training_with_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cifar_lab.board.RecordWriter.write", full)
    assert main([*WORDS.split(), "--results_dir", str(tmp_path), "--name", "one"]) == 1
    out, err = capfd.readouterr()
    assert err.startswith("error: [Errno 28] No space left on device. What was reached is kept.")
    assert "Traceback" not in err and json.loads(out)["resume"].endswith("--name one --resume")
