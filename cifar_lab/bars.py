"""StepBar: how far a Trainer is in an epoch, or in a prediction, batch by batch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from cifar_lab.progress import Bar


class StepBar(Callback):
    """A bar an epoch, over its training and its validation batches, or one over the batches of a prediction.

    It knows the batches' number only: to show a loss the host would have to wait for the device.
    """

    bar: Bar | None = None

    def begin(self, what: str, total: float) -> None:
        """Start anew."""
        self.done = 0
        self.bar = Bar(what, int(total))

    def step(self) -> None:
        """Say that a batch was made."""
        if self.bar is not None:
            self.done += 1
            self.bar.reached(self.done)

    def end(self) -> None:
        """Take the bar away, before anything is printed."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = trainer.num_training_batches + sum(trainer.num_val_batches)
        self.begin(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", batches)

    def on_train_batch_end(self, *_: Any) -> None:
        self.step()

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.step()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.end()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin("evaluating", sum(trainer.num_predict_batches))

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        self.step()

    def on_predict_end(self, *_: Any) -> None:
        self.end()

    def on_exception(self, *_: Any) -> None:
        self.end()
