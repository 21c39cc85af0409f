"""A grid under way: settings trained to their end, each once or once a fold, then compared."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cifar_lab.checkpoint import best_record
from cifar_lab.evaluate import accuracy_interval, wilson
from cifar_lab.files import read_json, size, write_csv, write_json
from cifar_lab.recipe import Recipe
from tune.campaign import Campaign
from tune.cluster import Job
from tune.experiment import Status, Trial
from tune.grid_question import GridQuestion
from tune.space import edges
from tune.view import duration, settings

METRICS = ("val_acc", "val_loss", "val_macro_f1", "train_acc", "train_loss")


@dataclass(frozen=True)
class Setting:
    """A setting and its trainings, one a fold."""

    setting_id: str
    varied: dict[str, Any]
    trainings: Sequence[Trial]

    @property
    def status(self) -> Status:
        """What became of it as a whole: of its trainings' states the one that matters most."""
        states = {t.status for t in self.trainings}
        order: tuple[Status, ...] = ("failed", "pending", "diverged", "stopped")
        return next((state for state in order if state in states), "completed")

    def at_best(self, folds: int | None = None) -> dict[str, Any]:
        """Means over the (first) folds at the epoch with the best mean val_acc, and how far the folds lie apart."""
        measured = [t for t in self.trainings if t.rows][:folds]
        if not measured:
            return {}
        curves = [t.rows for t in measured]
        epochs = range(min(map(len, curves)))
        means = [statistics.fmean(rows[e]["val_acc"] for rows in curves) for e in epochs]
        best = max(epochs, key=lambda e: (means[e] if math.isfinite(means[e]) else -1.0, -e))
        found = {name: statistics.fmean(rows[best][name] for rows in curves) for name in METRICS}
        accuracies = [rows[best]["val_acc"] for rows in curves]
        low, high = accuracy_interval(accuracies) if len(accuracies) > 1 else (None, None)
        return {
            "folds": len(measured),
            "best_epoch": best + 1,
            **found,
            "val_acc_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "low": low,
            "high": high,
            "seconds": sum(row["seconds"] for rows in curves for row in rows),
        }

    def row(self) -> dict[str, Any]:
        """The setting's row of settings.csv."""
        reason = next((t.reason for t in self.trainings if t.status == self.status), "")
        return {"setting_id": self.setting_id, **self.varied, **self.at_best(), "status": self.status, "reason": reason}


def best_setting(made: Sequence[Setting]) -> Setting | None:
    """The setting with the highest mean val_acc among those that came to their end; the earlier of two equals."""
    ended = [s for s in made if s.status == "completed"]
    return max(ended, key=lambda s: s.at_best()["val_acc"], default=None)


def survivors(means: Mapping[str, float], keep: float) -> list[str]:
    """The best `keep` of the settings, rounded up, by their mean val_acc; ties at the border survive together."""
    count = math.ceil(keep * len(means) - 1e-9)
    cutoff = sorted(means.values(), reverse=True)[count - 1]
    return [name for name, mean in means.items() if mean >= cutoff]


class Grid(Campaign[GridQuestion]):
    """A grid under way."""

    WHAT = "grid"
    AFTERWARDS = ("sklearn.metrics", "tune.report")

    def recipes(self) -> list[Recipe]:
        return [self.question.base.replace(**setting) for setting in self.question.settings]

    def checkpoints_kept(self) -> int:
        if self.question.base.folds is not None:
            return 0
        return len(self.question.settings) * (self.question.base.max_epochs if self.question.every_epoch else 1)

    def plan(self) -> str:
        question, base = self.question, self.question.base
        count, folds = len(question.settings), base.folds
        images = len(self.data.train_indices)
        fields = sorted({name for setting in question.settings for name in setting})
        what = f"{count} settings of {', '.join(fields)}" if fields else "one setting"
        times = f", {folds} folds each" if folds else ""
        return (
            f"{base.arch} on {base.dataset}, {images:,} training images: {what}{times}, {base.max_epochs} epochs. "
            f"{self.concurrent} at once, {self.takes['CPU']:g} CPU and {self.takes['GPU']:g} GPU each. Expected: about "
            f"{duration(self.seconds_left())}, {size(self.bytes_needed())} of disk at most. Results: {self.place()}."
        )

    def seconds_left(self) -> float:
        pending = [t for t in self.experiment.trials.values() if t.status == "pending"]
        epochs = sum(self.question.base.max_epochs - len(t.rows) for t in pending)
        return max(0, epochs) * self.epoch_seconds() / self.concurrent

    def job(self, job_id: str, recipe: Recipe) -> Job:
        made = super().job(job_id, recipe)
        gradients = self.folder / "gradients" / f"{job_id}.csv" if self.question.gradients else None
        return dataclasses.replace(made, gradients=gradients, every_epoch=self.question.every_epoch)

    def settings(self) -> list[Setting]:
        """The settings with their trainings, as they stand."""
        trials = self.experiment.trials.values()
        return [
            Setting(name, varied, [t for t in trials if t.trial_id.partition("-")[0] == name])
            for name, varied in self.question.by_id.items()
        ]

    def trained(self) -> bool:
        return not any(t.status in ("pending", "failed") for t in self.experiment.trials.values())

    def finished(self) -> bool:
        return self.trained() and all((self.folder / name).exists() for name in ("best.json", "report.html"))

    def work(self) -> None:
        first = self.question.options.prune_after
        if first is not None:
            self.train([t for t in self.experiment.pending() if fold_of(t) < first], f"first {first} folds")
            if any(fold_of(t) < first for t in self.experiment.pending()):
                return
            self.prune(first)
        self.train(self.experiment.pending(), "grid")

    def train(self, trial_ids: Sequence[str], title: str) -> None:
        """Train these, stopping none."""
        kept = 0 if self.question.base.folds is not None else len(self.experiment.trials)
        tasks = self.trial_tasks(trial_ids, lambda *_: "", lambda: self.experiment.tidy(kept))
        self.run_tasks(lambda: tasks, self.view(lambda: title))

    def prune(self, folds: int) -> None:
        """Give up the settings that were poorest over the first folds."""
        # A diverged setting takes no sound one's place; a failed one may still be tried again.
        means: dict[str, float] = {}
        made = self.settings()
        for setting in made:
            states = {t.status for t in setting.trainings if fold_of(t.trial_id) < folds}
            if "failed" not in states:
                means[setting.setting_id] = -1.0 if "diverged" in states else setting.at_best(folds)["val_acc"]
        kept = survivors(means, self.question.options.keep)
        cutoff = min(means[name] for name in kept)
        for setting in made:
            mean = means.get(setting.setting_id)
            if mean is not None and setting.setting_id not in kept:
                reason = f"pruned: mean val_acc {mean:.4f} after {folds} folds, below {cutoff:.4f}"
                for trial in setting.trainings:
                    if trial.status == "pending":
                        self.experiment.conclude(trial.trial_id, "stopped", reason)

    def settle(self) -> None:
        best = best_setting(self.settings())
        if best is None:
            self.faults.append("no setting came to its end with finite losses")
            return
        recipe = self.question.base.replace(**best.varied)
        found = best.at_best()
        checkpoint = self.experiment.checkpoints(best.setting_id) / "best.ckpt"
        n = len(self.data.val_indices)
        low, high = (found["low"], found["high"]) if recipe.folds else wilson(round(found["val_acc"] * n), n)
        made = best_record(
            recipe,
            {"epoch": found["best_epoch"], "val_acc": found["val_acc"]},
            None if recipe.folds else checkpoint,
            self.folder,
            trial_id=best.setting_id,
            command=self.question.command,
        )
        made["edges"] = edges(self.question.space, recipe.to_dict())
        write_json(self.folder / "best.json", made | {"val_n": n, "val_low": low, "val_high": high})

    def report(self) -> None:
        rows = [setting.row() for setting in self.settings()]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        columns.sort(key=lambda name: name in ("status", "reason"))  # a setting without an epoch lacks the metrics
        write_csv(self.folder / "settings.csv", columns, rows)
        from tune.report import write_grid_report

        write_grid_report(self.folder)

    def result(self) -> str:
        place = self.folder / "best.json"
        if not place.exists():
            return self.state()
        found = read_json(place)
        chosen = settings(self.question.by_id[found["trial_id"]])
        spread = f"{found['val_low']:.4f} to {found['val_high']:.4f}" if found["val_low"] is not None else ""
        kind = f"t 95% over {self.question.base.folds} folds" if self.question.base.folds else "Wilson 95%"
        return (
            f"Best: {found['trial_id']} ({chosen or 'as given'}), val_acc {found['val_acc']:.4f} ({spread}, {kind}) at "
            f"epoch {found['epoch']}. Not tested. Report: {self.place()}/report.html"
        )


def fold_of(trial_id: str) -> int:
    """The fold that a training validates on."""
    return int(trial_id.partition("-f")[2] or 0)
