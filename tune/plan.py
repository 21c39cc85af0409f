"""What a search will take: time, disk."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cifar_lab.recipe import Recipe
from tune.scheduler import milestones
from tune.space import Choice, Domain

MEASURED_BATCH = 16
OPTIMIZER_COPIES = {"sgd": 1, "adam": 2, "adamw": 2}


def expected_epochs(max_epochs: int, grace_period: int, reduction_factor: int, trials: int) -> float:
    """Epochs that ASHA is expected to give a trial, on average, when trials arrive in random order.

    At each rung the n-th arrival passes when it is among the best 1/reduction_factor of the n: a little more often
    than 1/reduction_factor, as the first few know too few others.
    """
    epochs, reached, start = 0.0, float(trials), 0
    for rung in milestones(grace_period, max_epochs, reduction_factor):
        epochs += reached * (rung - start)
        arrivals = max(1, round(reached))
        passed = sum(max(1, math.ceil(n / reduction_factor)) / n for n in range(1, arrivals + 1))
        reached, start = reached * passed / arrivals, rung
    return (epochs + reached * (max_epochs - start)) / trials


def sizes(base: Recipe, space: dict[str, Domain]) -> list[Recipe]:
    """The recipes to measure: the base with each searched depth or width."""
    varied = {name: space[name] for name in ("depth", "width") if isinstance(space.get(name), Choice)}
    recipes = [base]
    for name, domain in varied.items():
        assert isinstance(domain, Choice)
        recipes = [recipe.replace(**{name: value}) for recipe in recipes for value in domain.values]
    return recipes


def seconds_per_image(recipes: Sequence[Recipe], threads: int) -> float:
    """Mean seconds that a training step costs an image, on `threads` threads, from a few small batches of noise."""
    from cifar_lab.machine import step_seconds

    return sum(step_seconds(r, r.precision, batch=MEASURED_BATCH, threads=threads) for r in recipes) / (
        MEASURED_BATCH * len(recipes)
    )


def checkpoint_bytes(recipes: Sequence[Recipe], num_classes: int) -> tuple[int, int]:
    """Bytes of the largest network's best (weights) and last (with optimiser and average) checkpoint."""
    from cifar_lab.models import build

    weights = max(
        sum(t.numel() * t.element_size() for t in build(recipe, num_classes).state_dict().values())
        for recipe in recipes
    )
    average = weights if recipes[0].ema else 0
    return weights + average, weights * (1 + max(OPTIMIZER_COPIES.values())) + average
