"""One trial: a config becomes a Recipe, which is fitted, with a report after every epoch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ray.tune

from cifar_lab.recipe import Recipe


def run_trial(config: dict[str, Any]) -> None:
    """Fit `config["job"]`: a recipe in a folder, going on after its last checkpoint if it has one.

    Ray waits for the scheduler's decision in each report, so that a stopped trial trains no epoch in vain. The first
    report of a trial that goes on repeats its last epoch: the driver may have died before it heard of it.
    """
    from cifar_lab.fit import Row, fit
    from cifar_lab.gradients import GradientWatch
    from tune.heartbeat import watched

    job = config["job"]
    folder = Path(job["folder"])

    def on_epoch(row: Row) -> None:
        if job["every_epoch"]:
            shutil.copyfile(folder / "last.ckpt", epoch_checkpoint(folder, int(row["epoch"])))
        ray.tune.report(dict(row))

    watches = [GradientWatch(Path(job["gradients"]))] if job["gradients"] else []
    with watched(folder, job["patience"]) as heartbeat:
        fit(Recipe(**job["recipe"]), folder, resume=True, on_epoch=on_epoch, callbacks=[heartbeat, *watches])


def epoch_checkpoint(folder: Path, epoch: int) -> Path:
    """Where an epoch's checkpoint is kept, if every epoch's is."""
    return folder / f"epoch-{epoch}.ckpt"
