"""Experiment: what a search left on disk; trials, curves, winners."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from cifar_lab.checkpoint import CURVE_COLUMNS, Row, Run, best_row, discard_state, newest
from cifar_lab.files import PREVIOUS, read_csv, write_csv
from cifar_lab.recipe import InputError

Status = Literal["completed", "stopped", "diverged", "failed", "pending"]


@dataclass
class Trial:
    """A configuration and what became of it."""

    trial_id: str
    searched: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    status: Status = "pending"
    reason: str = ""
    judged: int = 0  # epochs after which an earlier driver had decided: trials.csv is written then, after curves.csv

    @property
    def best(self) -> Row | None:
        """The row of the best epoch, as `best_row` has it; None before the first epoch."""
        return best_row(self.rows) if self.rows else None

    @property
    def ranked(self) -> bool:
        """Whether the trial may win: it was measured, and neither diverged, failed nor is still under way."""
        return self.status in ("completed", "stopped") and bool(self.rows)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it: a failed one may still be tried again."""
        return self.status in ("completed", "stopped", "diverged")

    def row(self) -> dict[str, Any]:
        """The trial's row of trials.csv; the metrics are those of its best epoch."""
        best = self.best or {}
        metrics = {
            "epochs": len(self.rows),
            **{name: best.get(name) for name in ("val_acc", "val_loss", "val_macro_f1", "train_acc")},
            "best_epoch": best.get("epoch"),
            "seconds": sum(row["seconds"] for row in self.rows),
        }
        return {"trial_id": self.trial_id, **self.searched, **metrics, "status": self.status, "reason": self.reason}


@dataclass(frozen=True)
class Finalist:
    """A training of one of the best trials' recipe with a new seed; val_acc is 0 if it diverged."""

    trial_id: str
    seed: int
    best_epoch: int
    val_acc: float
    seconds: float


class Experiment:
    """A search's folder. `trials.csv` and `curves.csv` are rewritten, atomically, after every epoch.

    Curves are written before trials, so that what a crash leaves can only lack a decision, which is then taken again
    from the same numbers.
    """

    def __init__(self, folder: Path, trials: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder = folder
        self.trials = {trial_id: Trial(trial_id, dict(searched)) for trial_id, searched in trials.items()}
        self.finalists: dict[tuple[str, int], Finalist] = {}
        self._read()

    def _read(self) -> None:
        """Take over what an earlier run of this search recorded."""
        for line in read_csv(self.folder / "curves.csv"):
            if trial := self.trials.get(line["trial_id"]):
                row = {name: float(line[name]) for name in CURVE_COLUMNS}
                trial.rows.append({**row, "epoch": int(row["epoch"])})
        for line in read_csv(self.folder / "trials.csv"):
            if trial := self.trials.get(line["trial_id"]):
                trial.status, trial.reason = line["status"], line["reason"]  # type: ignore[assignment]
                trial.judged = int(line["epochs"])
        for line in read_csv(self.folder / "finalists.csv"):
            numbers = int(line["seed"]), int(line["best_epoch"]), float(line["val_acc"]), float(line["seconds"])
            self.finalists[line["trial_id"], numbers[0]] = Finalist(line["trial_id"], *numbers)

    def record(self, trial_id: str, row: Row) -> None:
        """Add an epoch's row; one that is known already, repeated by a trial that goes on, changes nothing."""
        trial = self.trials[trial_id]
        if not trial.rows or row["epoch"] > trial.rows[-1]["epoch"]:
            trial.rows.append({name: row[name] for name in CURVE_COLUMNS} | {"epoch": int(row["epoch"])})
            self.save_curves()

    def conclude(self, trial_id: str, status: Status, reason: str = "") -> None:
        """Say what became of a trial."""
        trial = self.trials[trial_id]
        trial.status, trial.reason = status, reason
        self.save_trials()

    def save_curves(self) -> None:
        """Rewrite curves.csv."""
        rows = [{"trial_id": t.trial_id, **row} for t in self.trials.values() for row in t.rows]
        write_csv(self.folder / "curves.csv", ("trial_id", *CURVE_COLUMNS), rows)

    def save_trials(self) -> None:
        """Rewrite trials.csv."""
        rows = [trial.row() for trial in self.trials.values()]
        write_csv(self.folder / "trials.csv", list(rows[0]), rows)

    def leaders(self, count: int) -> list[Trial]:
        """The best trials by val_acc over their whole history, the earlier of two equals first."""
        ranked = [t for t in self.trials.values() if t.ranked]
        return sorted(ranked, key=lambda t: -(t.best or {"val_acc": -math.inf})["val_acc"])[:count]

    def pending(self) -> list[str]:
        """The trials that have not come to an end."""
        return [t.trial_id for t in self.trials.values() if t.status == "pending"]

    def reopen(self) -> None:
        """Give failed trials another try, write down all that is asked for, and withdraw an earlier conclusion."""
        for name in ("best.json", "report.html"):
            (self.folder / name).unlink(missing_ok=True)
        for trial in self.trials.values():
            if trial.status == "failed":
                trial.status, trial.reason = "pending", ""
        self.save_trials()

    def add_finalist(self, trial_id: str, run: Run) -> None:
        """Note a finalist's training; its last checkpoint is not needed any more."""
        best, seed = run.best, run.recipe.seed
        self.finalists[trial_id, seed] = Finalist(
            trial_id,
            seed,
            int(best["epoch"]),
            0.0 if run.diverged else best["val_acc"],
            sum(r["seconds"] for r in run.history),
        )
        self._save_finalists()
        discard_state(run.folder)

    def forget_finalist(self, finalist: Finalist) -> None:
        """Strike out a finalist's training, so that it is trained again."""
        del self.finalists[finalist.trial_id, finalist.seed]
        self._save_finalists()
        shutil.rmtree(self.checkpoints(finalist_id(finalist.trial_id, finalist.seed)), ignore_errors=True)

    def _save_finalists(self) -> None:
        columns = [f.name for f in fields(Finalist)]
        write_csv(self.folder / "finalists.csv", columns, [vars(f) for f in self.finalists.values()])

    def lineup(self, count: int, seeds: Sequence[int]) -> list[tuple[str, int]]:
        """The trainings that decide, as far as they are sure: the best `count` trials with each seed, seed by seed.

        Each trial that is still under way may overtake, so that of the others the best `count` less these are sure.
        """
        sure = self.leaders(max(0, count - len(self.pending())))
        return [(trial.trial_id, seed) for seed in seeds for trial in sure]

    def trained(self, count: int, seeds: Sequence[int]) -> bool:
        """Whether all trials have ended and all finalists are trained."""
        return not self.pending() and all(key in self.finalists for key in self.lineup(count, seeds))

    def finished(self, count: int, seeds: Sequence[int]) -> bool:
        """Whether nothing is left to do: best.json and report.html are of the winner of all that is asked for."""
        if any(t.status == "failed" for t in self.trials.values()) or not self.trained(count, seeds):
            return False
        return (self.folder / "best.json").exists() and (self.folder / "report.html").exists()

    def winner(self, count: int, seeds: Sequence[int]) -> list[Finalist]:
        """The finalist trainings of the trial with the highest mean val_acc over the seeds; none without a finalist."""
        by_trial: dict[str, list[Finalist]] = {}
        for key in self.lineup(count, seeds):
            by_trial.setdefault(key[0], []).append(self.finalists[key])
        return max(by_trial.values(), key=lambda runs: sum(run.val_acc for run in runs) / len(runs), default=[])

    def checkpoints(self, trial_id: str) -> Path:
        """The folder of a trial's checkpoints."""
        return self.folder / "checkpoints" / trial_id

    def check_states(self) -> None:
        """See that each training that was cut short can go on.

        Raises:
            CheckpointError: none of a training's checkpoints is whole.
        """
        for place in sorted(self.folder.glob("checkpoints/*")):
            newest(place)

    def tidy(self, keep: int) -> None:
        """Remove what no one will read again: last checkpoints of ended trials, all of those beyond the best `keep`.

        A failed trial keeps its best and last one: it may be tried again.
        """
        kept = {trial.trial_id for trial in self.leaders(keep)}
        for trial in self.trials.values():
            if trial.status == "failed":
                (self.checkpoints(trial.trial_id) / PREVIOUS).unlink(missing_ok=True)
            if trial.ended:
                discard_state(self.checkpoints(trial.trial_id))
                if trial.trial_id not in kept:
                    shutil.rmtree(self.checkpoints(trial.trial_id), ignore_errors=True)
        for key in self.finalists:
            discard_state(self.checkpoints(finalist_id(*key)))
        for place in self.folder.glob(f"checkpoints/{finalist_id('*', '*')}"):
            if place.name.partition("-")[0] not in kept:  # new trials have taken its place
                shutil.rmtree(place, ignore_errors=True)


def finalist_id(trial_id: str, seed: int | str) -> str:
    """The id of a finalist's training."""
    return f"{trial_id}-s{seed}"


def locked(folder: Path) -> AbstractContextManager[object]:
    """Hold the folder for this process.

    Raises:
        InputError: another search holds it.
    """
    try:
        return FileLock(folder / "ray" / "lock").acquire(timeout=0)
    except Timeout:
        raise InputError(f"name: another search is running in {folder}. Wait for it, or take another --name.") from None
