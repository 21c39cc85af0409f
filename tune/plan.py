"""What a search will take: time, disk."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from cifar_lab.recipe import Recipe
from tune.scheduler import Rungs
from tune.space import Choice, Domain

MEASURED_STEPS = 2
PLAYED = 30  # simulated searches behind an estimate
OPTIMIZER_COPIES = {"sgd": 1, "adam": 2, "adamw": 2, "muon": 1}


@functools.cache
def expected_epochs(max_epochs: int, grace_period: int, reduction_factor: int, trials: int) -> float:
    """Epochs that ASHA gives a trial, on average: the rungs played by trials of unchanging rank, in random order.

    More than the powers of reduction_factor suggest, since the first to arrive at a rung pass unjudged.
    """
    reached = []
    for seed in range(PLAYED):
        rungs = Rungs(grace_period, max_epochs, reduction_factor)
        for trial, rank in enumerate(np.random.default_rng(seed).permutation(trials)):
            stops = (epoch for epoch in rungs.values if rungs.decide(str(trial), epoch, float(rank)).stop)
            reached.append(next(stops, max_epochs))
    return float(np.mean(reached))


def sizes(base: Recipe, space: dict[str, Domain]) -> list[Recipe]:
    """The recipes to measure: the base with each searched depth or width."""
    varied = {name: space[name] for name in ("depth", "width") if isinstance(space.get(name), Choice)}
    recipes = [base]
    for name, domain in varied.items():
        assert isinstance(domain, Choice)
        recipes = [recipe.replace(**{name: value}) for recipe in recipes for value in domain.values]
    return recipes


def seconds_per_image(recipes: Sequence[Recipe], threads: int) -> float:
    """Mean seconds that a step of a whole training costs an image, on `threads` threads, from two batches of noise."""
    from cifar_lab.layers import FEWEST
    from cifar_lab.machine import settle, step_seconds

    settle()
    # Few images, yet so many that a convolution goes the way that it goes in a training.
    batch = min(FEWEST, recipes[0].batch_size)
    seconds = 0.0
    for recipe in recipes:
        small = recipe.small_epochs / recipe.max_epochs
        for side, share in ((32, 1 - small), (recipe.small_side, small)):
            if share:
                seconds += share * step_seconds(
                    recipe, recipe.precision, batch=batch, side=side, threads=threads, repeats=MEASURED_STEPS
                )
    return seconds / (batch * len(recipes))


def record_bytes(trials: int, max_epochs: int) -> int:
    """Bytes of all that is no checkpoint, on the safe side: page, figures, predictions, tables, boards, Ray's files."""
    return 5_000_000 + trials * (50_000 + 1_000 * max_epochs)


def checkpoint_bytes(recipes: Sequence[Recipe], num_classes: int) -> tuple[int, int]:
    """Bytes of the largest network's best (weights) and last (with optimiser and average) checkpoint."""
    from cifar_lab.models import build

    weights = max(
        sum(t.numel() * t.element_size() for t in build(recipe, num_classes).state_dict().values())
        for recipe in recipes
    )
    average = weights if recipes[0].ema else 0
    return weights + average, weights * (1 + max(OPTIMIZER_COPIES.values())) + average
