"""Data: the images of a training, served in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from cifar_lab.augment import Augmentation
from cifar_lab.dataset import ImageSet, TrainingSet
from cifar_lab.recipe import Recipe


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch: randomness is a function of (seed, epoch), so that a resumed run needs no saved state."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)


class Batches:
    """An epoch's batches: images (B, 3, 32, 32) uint8 and labels (B,), each one index operation on two tensors.

    Shuffled and augmented when it is given `seed`, by a generator which (seed, epoch) determines. The epoch is read
    when the first batch is drawn. All images are served, but for a lone last one in training: batch norm needs two.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.images, self.labels, self.indices = images, labels, indices
        self.batch_size = batch_size
        self.seed, self.epoch, self.augmentation = seed, epoch, augmentation

    def __len__(self) -> int:
        return len(self._starts())

    def _starts(self) -> range:
        lone = self.seed is not None and len(self.indices) > 1 and len(self.indices) % self.batch_size == 1
        return range(0, len(self.indices) - lone, self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, device = self.indices, self.images.device
        if self.seed is not None:
            epoch = self.epoch()
            generator = torch.Generator(device).manual_seed(epoch_seed(self.seed, epoch))
            order = order[torch.randperm(len(order), generator=generator, device=device)]
        for start in self._starts():
            chosen = order[start : start + self.batch_size]
            images = self.images.index_select(0, chosen)
            if self.augmentation is not None:
                images = self.augmentation(images, epoch, chosen, generator)
            yield images, self.labels[chosen]


class CIFAR10DataModule(TrainingSet, pl.LightningDataModule):
    """The recipe's training set, and its batches. On a GPU the whole of it moves there once.

    Args:
        recipe: which images, split and augmented how.
        images: the whole training set, where it is at hand already.
    """

    def __init__(self, recipe: Recipe, images: ImageSet | None = None) -> None:
        pl.LightningDataModule.__init__(self)
        TrainingSet.__init__(self, recipe, images)
        self.recipe = recipe

    def setup(self, stage: str) -> None:
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        self.images, self.labels = self.set.images.to(device), self.set.labels.to(device)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # it is where `setup` put the images

    def train_dataloader(self) -> Any:
        recipe = self.recipe
        fill = (self.mean * 255).round() if recipe.cutout_fill == "mean" else torch.zeros(3)
        augmentation = Augmentation(
            padding=recipe.crop,
            border=recipe.crop_border,
            flip=recipe.flip,
            degrees=recipe.rotate,
            cutout=recipe.cutout,
            fill=fill.to(self.images.device),
        )
        return Batches(
            self.images,
            self.labels,
            self.train_indices.to(self.images.device),
            recipe.batch_size,
            seed=recipe.seed,
            epoch=lambda: self.trainer.current_epoch if self.trainer is not None else 0,
            augmentation=augmentation if recipe.augment else None,
        )

    def val_dataloader(self) -> Any:
        return Batches(self.images, self.labels, self.val_indices.to(self.images.device), EVALUATION_BATCH)


EVALUATION_BATCH = 500
