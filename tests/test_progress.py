"""Bars: drawn on a terminal while work takes long, gone when it ends, and never anywhere else."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cifar_lab import cli, progress
from cifar_lab.dataset import DataError, load
from cifar_lab.evaluate import evaluate
from cifar_lab.fit import fit
from cifar_lab.recipe import Recipe

RECIPE = Recipe(arch="classic_cnn", width=3, dataset="digits", limit_train=100, max_epochs=2, precision="32")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def attached(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in the place of stdout, on which bars are drawn at every step."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    monkeypatch.setattr(progress, "quiet", False)
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    return made


def erased(terminal: Terminal) -> bool:
    """Whether the cursor is shown again after the last bar, on a line that was cleared."""
    rest = terminal.getvalue().rpartition("━")[2]
    return "\x1b[?25h" in rest and rest.endswith("\x1b[2K")


def test_training_and_evaluation_have_bars_over_all_their_batches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    terminal = attached(monkeypatch)
    printed: list[bool] = []
    fit(RECIPE, tmp_path, on_epoch=lambda _: printed.append(erased(terminal)))
    text = terminal.getvalue()
    assert "epoch 1/2" in text and "epoch 2/2" in text
    assert all(f"{share}%" in text for share in (33, 67, 100)), "2 training batches and 1 of validation"
    assert printed == [True, True], "the line of an epoch has the screen for itself"
    evaluate(tmp_path / "best.ckpt")
    assert "evaluating" in terminal.getvalue() and erased(terminal)


def test_an_interrupted_training_leaves_no_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = attached(monkeypatch)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cifar_lab.classifier.ImageClassifier.validation_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(RECIPE, tmp_path)
    assert "epoch 1/2" in terminal.getvalue() and erased(terminal)


@pytest.mark.usefixtures("fresh_cache")
def test_decoding_has_a_bar_that_an_unreadable_image_ends(
    monkeypatch: pytest.MonkeyPatch, make_tree: Callable[..., Path]
) -> None:
    terminal = attached(monkeypatch)
    images = make_tree()
    recipe = RECIPE.replace(dataset="folder", data_dir=str(images), limit_train=None)
    load(recipe, "test")
    assert "decoding test" in terminal.getvalue() and erased(terminal)
    (images / "train" / "pear" / "009.png").write_bytes(b"no image")
    with pytest.raises(DataError):
        load(recipe, "train")
    assert "decoding train" in terminal.getvalue() and erased(terminal)


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_a_quiet_command_has_no_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str) -> None:
    terminal = attached(monkeypatch)
    parser = cli.Parser(prog="x", allow_abbrev=False)
    parser.add_argument(flag, action="store_true")
    parser.parse_args([flag])
    fit(RECIPE.replace(max_epochs=1), tmp_path)
    assert terminal.getvalue() == ""
    parser.parse_args([])
    assert progress.shown()


def test_without_a_terminal_nothing_is_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich alone would take this for a terminal
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    fit(RECIPE.replace(max_epochs=1), tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_bar_draws_a_few_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = attached(monkeypatch)
    monkeypatch.setattr(progress, "INTERVAL", 0.25)
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress.Bar("counting", 1000) as bar:
        for i in range(1000):
            now = i / 1000
            bar.reached(i)
    assert terminal.getvalue().count("counting") <= 5
