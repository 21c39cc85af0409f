"""Checkpoints: what a training left, read without Lightning."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cifar_lab import machine
from cifar_lab.files import DIGESTS, LAST, PREVIOUS, read_json, sha256
from cifar_lab.recipe import InputError, Recipe

Row = dict[str, float]
Record = dict[str, Any]
CURVE_COLUMNS = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_macro_f1", "lr", "seconds")


class CheckpointError(InputError):
    """A checkpoint is absent, unreadable, or holds more than tensors and primitives."""


@dataclass
class Run:
    """What a training left: a row of metrics an epoch, and its checkpoints."""

    recipe: Recipe
    folder: Path
    history: list[Row] = field(default_factory=list)
    diverged: bool = False

    @property
    def best(self) -> Row:
        """The row of the best epoch, as `best_row` has it."""
        return best_row(self.history)

    @property
    def best_checkpoint(self) -> Path:
        """The weights after the best epoch."""
        return self.folder / "best.ckpt"


def finite(row: Row) -> bool:
    """Whether the losses of an epoch are numbers; a diverged training can show a finite val_acc."""
    return all(math.isfinite(row[name]) for name in ("train_loss", "val_loss") if name in row)


def best_row(history: Sequence[Row]) -> Row:
    """The row of the first epoch with the highest val_acc, of the last one where nothing was validated.

    Diverged epochs count only where there is no other.
    """
    return max([row for row in history if finite(row)] or history, key=lambda row: row.get("val_acc", row["epoch"]))


def digests(folder: Path) -> dict[str, list[str]]:
    """The digests noted for the checkpoints in a folder, by name, the newest first; none where there is no note."""
    try:
        return read_json(folder / DIGESTS)
    except (OSError, ValueError):
        return {}


def discard_state(folder: Path) -> None:
    """Remove what only a resume needs, with what was begun and never whole."""
    for place in (folder / LAST, folder / PREVIOUS, *folder.glob(".*.part")):
        place.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, loaded without running any code in it.

    Raises:
        CheckpointError: no such file, it is no checkpoint of tensors and primitives, or not what was written there.
    """
    try:
        noted = digests(path.parent).get(LAST if path.name == PREVIOUS else path.name)
        if noted and sha256(path) not in noted:
            raise ValueError("its sha256 is not the one noted when it was written")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign pickle's protocol: what it is, is said below
            content = torch.load(path, map_location="cpu", weights_only=True)
        content["hyper_parameters"]["recipe"], content["state_dict"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint.") from None
    except Exception as error:
        raise refused(path, error) from error
    return dict(content)


def refused(path: Path, error: Exception) -> CheckpointError:
    """What is raised of a checkpoint that cannot be used, with the reason."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(f"{path} is no checkpoint of cifar_lab, or it is damaged ({reason[:120]}).")


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on with and its content: the last one, the one before where that is damaged.

    None where no training has left one.

    Raises:
        CheckpointError: there is one, but none that is whole.
    """
    if not (folder / LAST).exists() and not (folder / PREVIOUS).exists():
        return None
    try:
        return folder / LAST, read_checkpoint(folder / LAST)
    except CheckpointError as damaged:
        try:
            return folder / PREVIOUS, read_checkpoint(folder / PREVIOUS)
        except CheckpointError:
            raise CheckpointError(f"{damaged} To begin that training anew, remove {folder}.") from damaged


def recorded(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the Recorder kept in a checkpoint: history, diverged, finished.

    Raises:
        CheckpointError: the checkpoint holds weights only.
    """
    if "Recorder" not in content.get("callbacks", {}):
        raise CheckpointError(f"{path} holds weights only: it can be evaluated, but not gone on with.")
    state: dict[str, Any] = content["callbacks"]["Recorder"]
    return state


def ended_run(folder: Path) -> Run | None:
    """The run whose checkpoints lie in a folder, if it came to its end.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    found = newest(folder)
    if found is None:
        return None
    last, saved = found
    state = recorded(saved, last)
    if not state["finished"]:
        return None
    return Run(Recipe(**saved["hyper_parameters"]["recipe"]), folder, list(state["history"]), state["diverged"])


def difference(was: Recipe, asked: Recipe) -> str:
    """What two recipes differ in: 'lr was 0.1, asked 0.01; ...'."""
    before, after = was.to_dict(), asked.to_dict()
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return "; ".join(f"{name} was {before.get(name)}, asked {after.get(name)}" for name in names)


def best_record(
    recipe: Recipe, best: Row, checkpoint: Path | None, folder: Path, *, trial_id: str, command: str
) -> Record:
    """What best.json, in `folder`, says of a checkpoint before it is tested: what it is and how it came to be.

    `best` is the row of its epoch, of which epoch and val_acc, if any, are taken. Folds leave no checkpoint.
    """
    return {
        "recipe": recipe.to_dict(),
        "trial_id": trial_id,
        "epoch": int(best["epoch"]),
        "val_acc": best.get("val_acc"),
        "checkpoint": None if checkpoint is None else os.path.relpath(checkpoint, folder),
        "sha256": None if checkpoint is None else sha256(checkpoint),
        "seed": recipe.seed,
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "command": command,
    }
