"""Prepare: what a training needs is seen to be there before anything is made."""

from __future__ import annotations

import math

from cifar_lab.dataset import TrainingSet
from cifar_lab.layers import Network, WeightsError
from cifar_lab.models import build
from cifar_lab.recipe import InputError, Recipe

FEW_STEPS = 50


def prepare(recipe: Recipe) -> TrainingSet:
    """The recipe's images; to be called before folders are made, since it refuses what a training could not begin with.

    Raises:
        InputError: the images, or the weights that the architecture starts from, are absent or unreadable.
    """
    images = TrainingSet(recipe)
    begin(build(recipe, len(images.classes)), images)
    return images


def shortage(recipe: Recipe, images: int) -> str:
    """A note where accumulated batches leave too few steps to learn by, of so many training images; else empty."""
    batches = math.ceil(images / recipe.batch_size)
    steps = math.ceil(batches / recipe.accumulate) * recipe.max_epochs
    if recipe.accumulate == 1 or steps >= FEW_STEPS:
        return ""
    return (
        f"Note: this training has only {steps} steps: {batches} batches an epoch, {recipe.accumulate} to a step. "
        "A smaller --accumulate makes more."
    )


def begin(network: Network, images: TrainingSet) -> None:
    """Give a network the weights it starts from, where that is more than chance.

    Raises:
        InputError: they are absent or unreadable.
    """
    try:
        network.start(images.sample())
    except WeightsError as error:
        raise InputError(str(error)) from error
