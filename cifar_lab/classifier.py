"""ImageClassifier: the LightningModule that wraps every architecture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Dirichlet
from torch.optim.lr_scheduler import ReduceLROnPlateau

from cifar_lab import augment, optim
from cifar_lab.data import epoch_seed
from cifar_lab.dataset import normalise
from cifar_lab.layers import memory_format
from cifar_lab.models import build
from cifar_lab.recipe import Recipe


def macro_f1(confusion: Tensor) -> Tensor:
    """Mean over the classes of 2*tp / (2*tp + fp + fn), 0 for a class neither present nor predicted.

    `confusion` is (C, C), true classes in the rows.
    """
    hits = confusion.diagonal().double()
    seen = (confusion.sum(0) + confusion.sum(1)).double()
    return (2 * hits / seen.clamp_min(1)).mean()


class ImageClassifier(pl.LightningModule):
    """A recipe's network with its normalisation, loss, metrics and optimiser.

    Args:
        recipe: the Recipe's fields as a dict, so that a checkpoint's header holds primitives only.
        classes: class names in the order of the labels.
        mean: per-channel mean of pixels in 0..1.
        std: per-channel standard deviation.

    Logs, once an epoch: train_loss train_acc val_loss val_acc val_macro_f1. train_acc is of the augmented images as
    they were trained on; under mixup and cutmix a prediction counts when it hits the image's larger share.
    """

    mean: Tensor
    std: Tensor
    train_loss_sum: Tensor
    train_hits: Tensor
    val_loss_sum: Tensor
    confusion: Tensor

    def __init__(
        self, recipe: dict[str, Any], classes: Sequence[str], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            {"recipe": recipe, "classes": list(classes), "mean": list(mean), "std": list(std)}, logger=False
        )
        self.recipe = Recipe(**recipe)
        self.classes = tuple(classes)
        self.network = build(self.recipe, len(classes))
        self.memory_format = memory_format(self.network, self.recipe.memory_format)
        self.network = self.network.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.averaged = optim.MovingAverage(self.network, self.recipe.ema) if self.recipe.ema else None
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.metrics: dict[str, float] = {}
        counts = len(classes)
        self.register_buffer("train_loss_sum", torch.zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("train_hits", torch.zeros((), dtype=torch.int64), persistent=False)
        self.train_images = 0
        self.register_buffer("val_loss_sum", torch.zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("confusion", torch.zeros(counts, counts, dtype=torch.int64), persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes each hook that it calls, 45 times a step; a module's own way to an attribute is a long one.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def normalise(self, images: Tensor) -> Tensor:
        """Images (N, 3, 32, 32), uint8 or float in 0..1, as the network wants them."""
        images = normalise(images, self.mean, self.std)
        return images.contiguous(memory_format=self.memory_format)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, 32, 32), uint8 or float in 0..1, to logits (N, C); by the averaged weights, if any."""
        network = self.averaged if self.averaged is not None else self.network
        logits: Tensor = network(self.normalise(images)).float()
        return logits

    def on_train_epoch_start(self) -> None:
        # Dropout and mixing draw from the global generator: a function of (seed, epoch) too.
        torch.manual_seed(epoch_seed(self.recipe.seed ^ 0xD20, self.current_epoch))
        self.network.begin_epoch(self.current_epoch)
        self.train_loss_sum.zero_()
        self.train_hits.zero_()
        self.train_images = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        inputs = self.normalise(images)
        if self.current_epoch < self.recipe.small_epochs:
            inputs = augment.shrink(inputs, self.recipe.small_side)
        inputs, targets, main = self._mixed(inputs, labels)
        logits = self.network(inputs).float()
        if targets.ndim == 2:  # a network may have outputs that no class uses
            targets = F.pad(targets, (0, logits.shape[1] - targets.shape[1]))
        loss = F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)
        with torch.no_grad():
            self.train_loss_sum.add_(loss, alpha=len(labels))
            self.train_hits.add_((logits.argmax(1) == main).sum())
        self.train_images += len(labels)
        if (together := self.recipe.accumulate) > 1:
            # Lightning divides by as many also where an epoch's last step has fewer.
            left = int(self.trainer.num_training_batches) - batch_idx // together * together
            loss = loss * (together / min(together, left))
        return loss

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, targets and main label after mixup or cutmix, where the recipe has one of them."""
        recipe = self.recipe
        alpha = recipe.mixup or recipe.cutmix
        if not alpha:
            return images, labels, labels
        n, device = len(images), images.device
        partner = torch.randperm(n, device=device)
        # A Beta distribution. Whether numbers are legal would be asked of the device, and its answer waited for.
        both = torch.full((n, 2), alpha, device=device)
        share = Dirichlet(both, validate_args=False).sample()[:, 0]
        targets = (labels[:, None] == torch.arange(len(self.classes), device=device)).float()
        if recipe.mixup:
            images, targets = augment.mixup(images, targets, partner, share)
        else:
            y = torch.randint(images.shape[2], (n,), device=device)
            x = torch.randint(images.shape[3], (n,), device=device)
            images, targets = augment.cutmix(images, targets, partner, y, x, share)
        return images, targets, targets.argmax(1)

    def on_before_optimizer_step(self, *_: Any) -> None:
        if self.recipe.agc:
            optim.clip_adaptively(self.clipped, self.recipe.agc)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)

    # Two hooks for their cost a step: Lightning would look whether its Trainer clips, PyTorch whether it is profiled.

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        pass  # `on_before_optimizer_step` does

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def on_validation_epoch_start(self) -> None:
        self.val_loss_sum.zero_()
        self.confusion.zero_()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        self.val_loss_sum += F.cross_entropy(logits, labels, reduction="sum").double()
        cells = labels * len(self.classes) + logits.argmax(1)
        # bincount would make the host wait for the device.
        self.confusion.view(-1).scatter_add_(0, cells, torch.ones_like(cells))

    def on_validation_epoch_end(self) -> None:
        n = int(self.confusion.sum())
        self._publish(
            val_loss=float(self.val_loss_sum) / n,
            val_acc=int(self.confusion.diagonal().sum()) / n,
            val_macro_f1=float(macro_f1(self.confusion)),
        )
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                config.scheduler.step(self.metrics["val_loss"])

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # Lightning would step the plateau after the epoch's checkpoint is written, and skip that step on a resume.
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def on_train_epoch_end(self) -> None:
        n = self.train_images
        self._publish(train_loss=float(self.train_loss_sum) / n, train_acc=int(self.train_hits) / n)

    def _publish(self, **metrics: float) -> None:
        # Kept beside Lightning's own record, which rounds to float32.
        self.metrics.update(metrics)
        self.log_dict(metrics)

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Labels (B,) and probabilities (B, C)."""
        images, labels = batch
        return labels, self(images).softmax(1)

    def configure_optimizers(self) -> Any:
        made = optim.optimizer(self.recipe, self.network.parameters())
        *body, _last = filter(None, (list(layer.parameters(recurse=False)) for layer in self.network.modules()))
        self.clipped = [parameter for own in body for parameter in own]
        batches = len(self.trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        return [made], optim.schedulers(self.recipe, made, math.ceil(batches / self.recipe.accumulate))
