"""Metrics: what a running trial tells Prometheus, by way of Ray, and Grafana draws."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from ray.util.metrics import Gauge

from cifar_lab.checkpoint import Row

# Ray puts "ray_" before a name. Its tags: trial, a job's id; search, the name of the folder.
DESCRIPTIONS = {
    "cifar_lab_epoch": "Epochs that the trial has ended",
    "cifar_lab_val_acc": "Validation accuracy of its last epoch, a fraction",
    "cifar_lab_images_per_second": "Training images of its last epoch over the epoch's seconds, validation included",
}
AGAIN = 5.0  # seconds; Ray sends what was set every 10, and takes a gauge that was not set anew for 20 as gone


class Gauges(Callback):
    """A trial's gauges: new values after every epoch, the same ones again as long as it makes steps.

    So they disappear within half a minute when the trial ends or hangs, and a process that trains one trial after
    another collects nothing. Where no agent of Ray's listens nothing happens.
    """

    def __init__(self, trial: str, search: str) -> None:
        self.tags = {"trial": trial, "search": search}
        self.values: dict[str, float] = {"cifar_lab_epoch": 0.0}
        self.images = 0
        self.last = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.images = len(trainer.datamodule.train_indices)  # type: ignore[attr-defined]
        self.show()

    def on_train_batch_end(self, *_: Any) -> None:
        self.refresh()

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.refresh()

    def heard(self, row: Row) -> None:
        """Show an epoch's row; of one trained before a resume, no throughput: this process has not seen it."""
        self.values = {"cifar_lab_epoch": row["epoch"], "cifar_lab_val_acc": row["val_acc"]}
        if self.images:
            self.values["cifar_lab_images_per_second"] = self.images / row["seconds"]
        self.show()

    def refresh(self) -> None:
        """Show the values again, if it is time to."""
        if time.monotonic() > self.last + AGAIN:
            self.show()

    def show(self) -> None:
        """Set the gauges."""
        self.last = time.monotonic()
        for name, value in self.values.items():
            _gauge(name).set(value, self.tags)


@functools.cache
def _gauge(name: str) -> Gauge:
    return Gauge(name, DESCRIPTIONS[name], tag_keys=("trial", "search"))
