"""Schedules at known points, and optimisers that get what the recipe says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import OneCycleLR

from cifar_lab.optim import clip_adaptively, lr_factor, optimizer, schedulers
from cifar_lab.recipe import Recipe

STEPS = 10


def factors(**fields: Any) -> list[float]:
    recipe = Recipe(**{"max_epochs": 10, **fields})
    factor = lr_factor(recipe, STEPS)
    return [factor(step) for step in range(recipe.max_epochs * STEPS + 1)]


def test_without_a_schedule_the_lr_stays() -> None:
    assert set(factors(schedule="none")) == {1.0}


def test_step_drops_tenfold_every_lr_step_epochs() -> None:
    got = factors(schedule="step", lr_step=3)
    assert [got[epoch * STEPS] for epoch in range(10)] == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 3 + [0.001])
    assert got[29] == 1 and got[30] == pytest.approx(0.1)


def test_step_counts_its_epochs_from_the_start_of_the_run() -> None:
    got = factors(schedule="step", lr_step=3, warmup_epochs=1)
    assert got[29] == 1 and got[30] == pytest.approx(0.1)


def test_cosine_goes_down_to_zero() -> None:
    got = factors(schedule="cosine")
    assert got[0] == 1 and got[50] == pytest.approx(0.5) and got[100] == pytest.approx(0)
    assert got[25] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_linear_goes_down_to_zero() -> None:
    assert factors(schedule="linear") == pytest.approx([1 - step / 100 for step in range(101)])


def test_onecycle_is_pytorchs() -> None:
    made = torch.optim.SGD([Parameter(torch.zeros(1))], 1.0)
    theirs = OneCycleLR(made, max_lr=1.0, total_steps=101, cycle_momentum=False)
    got = factors(schedule="onecycle")
    assert got[0] == pytest.approx(1 / 25) and got[30] == pytest.approx(1) and got[100] == pytest.approx(1 / 250_000)
    for step, factor in enumerate(got[:100]):
        # PyTorch's peak lies at .3 * total - 1, a step before ours.
        assert factor == pytest.approx(theirs.get_last_lr()[0], abs=0.04), step
        made.step()
        theirs.step()


@pytest.mark.parametrize("schedule", ["none", "cosine", "linear"])
def test_warm_up_rises_in_equal_steps_then_the_schedule_begins(schedule: str) -> None:
    got = factors(schedule=schedule, warmup_epochs=1.5)
    assert got[:15] == pytest.approx([(step + 1) / 16 for step in range(15)])
    assert got[15] == 1
    assert schedule == "none" or got[100] == pytest.approx(0)


def test_a_step_past_the_end_is_not_a_rise() -> None:
    for schedule in ("cosine", "linear", "onecycle"):
        factor = lr_factor(Recipe(schedule=schedule, max_epochs=2), STEPS)
        assert factor(25) == factor(20)


def plateau(warmup_epochs: float, losses: list[float], patience: int = 1) -> list[float]:
    """The lr at every step, when an epoch of STEPS steps ends with each of these losses."""
    recipe = Recipe(
        schedule="plateau", lr=1.0, lr_patience=patience, warmup_epochs=warmup_epochs, max_epochs=len(losses)
    )
    made = optimizer(recipe, [Parameter(torch.zeros(1))])
    chosen = schedulers(recipe, made, STEPS)
    seen = []
    for loss in losses:
        for _ in range(STEPS):
            seen.append(made.param_groups[0]["lr"])
            made.step()
            for entry in chosen:
                if entry["interval"] == "step":
                    entry["scheduler"].step()
        for entry in chosen:
            if entry["interval"] == "epoch":
                assert entry["monitor"] == "val_loss"
                entry["scheduler"].step(loss)
    return seen


def test_plateau_drops_tenfold_after_patience_epochs_without_a_better_loss() -> None:
    seen = plateau(0, [1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert seen[::STEPS] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01])


def test_plateau_and_warm_up_share_one_lr() -> None:
    seen = plateau(1, [1.0, 1.0, 1.0, 1.0])
    assert seen[:STEPS] == pytest.approx([(step + 1) / 11 for step in range(STEPS)])
    assert seen[STEPS::STEPS] == pytest.approx([1, 1, 0.1])


def test_a_plateau_during_warm_up_is_not_forgotten() -> None:
    seen = plateau(3, [1.0, 1.0, 1.0, 1.0, 1.0], patience=0)
    assert seen[STEPS : 2 * STEPS] == pytest.approx([(step + 1) / 31 for step in range(STEPS, 2 * STEPS)])
    assert seen[2 * STEPS] == pytest.approx(0.1 * 21 / 31)


def test_sgd_gets_what_the_recipe_says() -> None:
    recipe = Recipe(optimizer="sgd", lr=0.3, momentum=0.7, nesterov=True, weight_decay=0.02)
    (group,) = optimizer(recipe, [Parameter(torch.zeros(2))]).param_groups
    assert [group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")] == [0.3, 0.7, True, 0.02]


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_gets_what_the_recipe_says(name: str, kind: type) -> None:
    made = optimizer(Recipe(optimizer=name, lr=0.3, momentum=0.7, weight_decay=0.02), [Parameter(torch.zeros(2))])
    assert type(made) is kind
    (group,) = made.param_groups
    assert [group[field] for field in ("lr", "betas", "weight_decay")] == [0.3, (0.7, 0.999), 0.02]


def test_frozen_parameters_are_left_out() -> None:
    frozen = Parameter(torch.zeros(2), requires_grad=False)
    (group,) = optimizer(Recipe(), [Parameter(torch.zeros(2)), frozen]).param_groups
    assert len(group["params"]) == 1


SHAPES = [(), (5,), (4, 7), (6, 3, 3, 3)]


def clipped_unit_by_unit(weight: torch.Tensor, grad: torch.Tensor, ratio: float) -> torch.Tensor:
    """Brock et al. 2021, equation 3, in floating-point numbers of Python."""
    if weight.ndim > 1:
        return torch.stack([clipped_unit_by_unit(w.flatten(), g, ratio) for w, g in zip(weight, grad, strict=True)])
    most = ratio * max(math.sqrt(float((weight.double() ** 2).sum())), 1e-3)
    norm = math.sqrt(float((grad.double() ** 2).sum()))
    return grad * (most / norm) if norm > most else grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adaptive_clipping_is_the_papers_unit_by_unit(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for scale in (1e-4, 0.01, 1.0, 100.0):
        p = Parameter(torch.randn(shape))
        grad = torch.randn(shape) * scale
        if p.ndim > 1:
            grad[0], p.data[1], grad[2] = 0, 0, grad[2] * 1e-6
        p.grad = grad.clone()
        clip_adaptively([p], 0.01)
        torch.testing.assert_close(p.grad, clipped_unit_by_unit(p.detach(), grad, 0.01))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adaptive_clipping_leaves_what_is_below_the_ratio_bit_by_bit(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    p = Parameter(torch.randn(shape))
    p.grad = p.detach() * 0.0099
    before, place = p.grad.clone(), p.grad
    clip_adaptively([p, Parameter(torch.ones(2))], 0.01)
    assert torch.equal(p.grad, before) and p.grad is place


def test_adaptive_clipping_lets_a_weight_at_zero_move() -> None:
    p = Parameter(torch.zeros(3))
    p.grad = torch.tensor([3.0, 0.0, 4.0])
    clip_adaptively([p], 0.01)
    torch.testing.assert_close(p.grad, torch.tensor([0.6e-5, 0.0, 0.8e-5]))
