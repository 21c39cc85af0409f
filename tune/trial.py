"""One trial: a config becomes a Recipe, which is fitted, with a report after every epoch."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.trainable import wrap_function

from cifar_lab.recipe import Recipe

# Seconds for which a worker waits until a stopped trial has unwound; of one that takes longer than Ray's own two
# seconds, on a busy machine, Ray forgets the next trial.
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")


def run_trial(config: dict[str, Any]) -> None:
    """Fit `config["job"]`: a recipe in a folder, going on after its last checkpoint if it has one.

    Ray waits for the scheduler's decision in each report, so that a stopped trial trains no epoch in vain. The first
    report of a trial that goes on repeats its last epoch: the driver may have died before it heard of it.
    """
    gc.set_threshold(100_000)  # as `cli.run` has it: a worker too imports Lightning
    from cifar_lab import machine
    from cifar_lab.checkpoint import Row
    from cifar_lab.data import CIFAR10DataModule
    from cifar_lab.dataset import received
    from cifar_lab.files import LAST
    from cifar_lab.fit import fit
    from cifar_lab.gradients import GradientWatch
    from tune.heartbeat import watched
    from tune.metrics import Gauges
    from tune.storage import Mirror

    job, images = config["job"], config["images"]
    recipe, gauges = Recipe(**job["recipe"]), Gauges(job["job_id"], config["search"])
    with contextlib.ExitStack() as stack:
        mirror = None
        folder = Path(job["folder"])
        if job["storage"]:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cifar_lab-")))
            mirror = Mirror(job["storage"], folder)
            mirror.pull()
        gradients = folder / GRADIENTS if mirror else job["gradients"] and Path(job["gradients"])

        def on_epoch(row: Row) -> None:
            if job["every_epoch"]:
                shutil.copyfile(folder / LAST, epoch_checkpoint(folder, int(row["epoch"])))
            if mirror:
                mirror.push()
            gauges.heard(row)
            # One that is stopped stays in there until there is another job for this process.
            with heartbeat.waiting():
                ray.tune.report({**row, "gpu_share": machine.gpu_share()})

        watches = [GradientWatch(gradients)] if job["gradients"] else []
        data = CIFAR10DataModule(recipe, received(images["name"], lambda: ray.get(images["held"]))) if images else None
        heartbeat = stack.enter_context(watched(folder, job["patience"]))
        fit(recipe, folder, resume=True, on_epoch=on_epoch, callbacks=[heartbeat, gauges, *watches], data=data)


GRADIENTS = "gradients.csv"  # beside the checkpoints, while they lie in a storage


class Training(wrap_function(run_trial)):  # type: ignore[misc]
    """A process that runs trials; Ray's dashboard keeps the name that it has when it begins."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> ray.tune.PlacementGroupFactory:
        return ray.tune.PlacementGroupFactory([config["takes"]])

    def __repr__(self) -> str:
        return str(self.config["job"]["job_id"] if self.config["alone"] else self.config["search"])


def epoch_checkpoint(folder: Path, epoch: int) -> Path:
    """Where an epoch's checkpoint is kept, if every epoch's is."""
    return folder / f"epoch-{epoch}.ckpt"
