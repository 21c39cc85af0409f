"""Optimisers with their learning-rate schedules, the latter as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

from cifar_lab.recipe import Recipe

DROP = 0.1  # what schedules step and plateau multiply the lr by; He et al. 2015
ONECYCLE_RISE, ONECYCLE_START, ONECYCLE_END = 0.3, 1 / 25, 1 / 250_000  # Smith and Topin 2018, PyTorch's constants
AGC_EPS = 1e-3  # norm that a weight is taken to have at least, else one at zero would stay there; Brock et al. 2021


def optimizer(recipe: Recipe, parameters: Iterable[Parameter]) -> Optimizer:
    """The recipe's optimiser; weight decay acts on every parameter, as PyTorch's defaults and the studies have it."""
    trained = [p for p in parameters if p.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            trained, recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay
        )
    kind: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(trained, recipe.lr, betas=(recipe.momentum, 0.999), weight_decay=recipe.weight_decay)


def lr_factor(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """What the peak lr is multiplied by at a step, counted from 0; plateau looks at results, and is not among these."""
    total = recipe.max_epochs * steps_per_epoch
    warm = round(recipe.warmup_epochs * steps_per_epoch)

    def cosine(start: float, end: float, progress: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        progress = min(1.0, (step - warm) / (total - warm))
        match recipe.schedule:
            case "step":
                return float(DROP ** (step // (recipe.lr_step * steps_per_epoch)))
            case "cosine":
                return cosine(1, 0, progress)
            case "linear":
                return 1 - progress
            case "onecycle" if progress < ONECYCLE_RISE:
                return cosine(ONECYCLE_START, 1, progress / ONECYCLE_RISE)
            case "onecycle":
                return cosine(1, ONECYCLE_END, (progress - ONECYCLE_RISE) / (1 - ONECYCLE_RISE))
        return 1.0

    return factor


def schedulers(recipe: Recipe, made: Optimizer, steps_per_epoch: int) -> list[dict[str, Any]]:
    """The recipe's schedule in the form of Lightning's `configure_optimizers`."""
    if recipe.schedule != "plateau":
        return [{"scheduler": LambdaLR(made, lr_factor(recipe, steps_per_epoch)), "interval": "step"}]
    plateau = ReduceLROnPlateau(made, factor=DROP, patience=recipe.lr_patience)
    chosen = [{"scheduler": plateau, "interval": "epoch", "monitor": "val_loss"}]
    if warm := round(recipe.warmup_epochs * steps_per_epoch):
        # LinearLR multiplies what it finds, so that it and the plateau's drops can share one lr.
        rise = LinearLR(made, start_factor=1 / (warm + 1), total_iters=warm)
        chosen.append({"scheduler": rise, "interval": "step"})
    return chosen


@torch.no_grad()
def clip_adaptively(parameters: Iterable[Parameter], ratio: float) -> None:
    """Scale each unit's gradient down, in place, to a norm of at most `ratio` times that of the unit's weights.

    A unit is a row of the first dimension (an output channel, an output of a dense layer); a vector is one unit.

    Source: adaptive gradient clipping, Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without
    Normalization". There the last dense layer is not clipped: leave it out of `parameters`.
    """
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        dims = tuple(range(1, parameter.ndim)) or None
        allowed = torch.linalg.vector_norm(parameter, dim=dims, keepdim=True).clamp_min(AGC_EPS) * ratio
        norm = torch.linalg.vector_norm(grad, dim=dims, keepdim=True)
        grad.mul_((allowed / norm.clamp_min(1e-6)).clamp_max(1))
