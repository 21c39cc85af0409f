"""Schedules at known points, and optimisers that get what the recipe says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar_lab.layers import quicken
from cifar_lab.optim import (
    QUINTIC,
    REST_LR,
    REST_MOMENTUM,
    MovingAverage,
    clip_adaptively,
    lr_factor,
    optimizer,
    orthogonal,
    schedulers,
)
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


def with_gradients(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Parameter]:
    torch.manual_seed(seed)
    made = [Parameter(torch.randn(shape)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 27), (64, 64), (60, 9)], ids=str)
def test_orthogonal_keeps_the_singular_vectors_and_brings_the_values_near_1(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    def brought(value: Tensor) -> Tensor:
        for _ in range(3):
            value = sum(share * value**power for share, power in zip(QUINTIC, (1, 3, 5), strict=True))
        return value

    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonal(matrix.to(dtype))
    assert made.dtype == dtype and made.shape == shape
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ made.float() @ right.T
    torch.testing.assert_close(turned, brought(values / values.norm()).diag(), rtol=0, atol=0.05)
    large = turned.diagonal()[values > values.norm() / 50]
    assert len(large) > len(values) / 2 and ((large > 0.6) & (large < 1.3)).all()


LAYOUTS = [torch.contiguous_format, torch.channels_last]
FILTERS, REST = [(6, 3, 3, 3), (4, 8, 1, 1)], [(5,), (4, 7), ()]


def muon(parameters: list[Parameter], **fields: Any) -> torch.optim.Optimizer:
    chosen = {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.1, **fields}
    return optimizer(Recipe(optimizer="muon", **chosen), parameters)


@pytest.mark.parametrize("of_gradient", LAYOUTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_muon_moves_filters_of_fixed_norm_along_the_orthogonal_momentum(
    layout: torch.memory_format, of_gradient: torch.memory_format
) -> None:
    filters = [Parameter(p.detach().contiguous(memory_format=layout)) for p in with_gradients(FILTERS)]
    made = muon(filters)
    means = [torch.zeros_like(p) for p in filters]
    for step in range(3):
        before = [p.detach().clone() for p in filters]
        for p in filters:
            drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            p.grad = drawn.contiguous(memory_format=of_gradient)
        made.step()
        for p, was, mean in zip(filters, before, means, strict=True):
            assert p.grad is not None
            mean.mul_(0.8).add_(p.grad)
            start = was * (len(was) ** 0.5 / was.norm())
            direction = orthogonal((p.grad + 0.8 * mean).flatten(1)).view_as(was)
            torch.testing.assert_close(p.detach(), start - 0.2 * direction)


def test_muon_is_sgd_for_all_other_parameters() -> None:
    ours, theirs = with_gradients(REST), with_gradients(REST)
    made = muon(ours)
    sgd = torch.optim.SGD(theirs, 0.2 * REST_LR, momentum=REST_MOMENTUM, nesterov=True, weight_decay=0.1)
    for step in range(3):
        for one, other in zip(ours, theirs, strict=True):
            torch.manual_seed(step)
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        made.step(), sgd.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_muon_moves_a_quickened_parameter_as_one_that_is_so_much_longer() -> None:
    (quick,), (long,) = with_gradients([(5,)]), with_gradients([(5,)])
    quick.data, long.data = torch.ones(5), torch.ones(5) / 3  # whose gradient is 3 times that of `quick`
    made, plain = muon([quicken(quick, 9.0)]), muon([long])
    for step in range(3):
        quick.grad = torch.randn(5, generator=torch.Generator().manual_seed(step))
        long.grad = 3 * quick.grad
        made.step(), plain.step()
    torch.testing.assert_close(quick, 3 * long)


def test_a_warm_up_as_long_as_the_run_comes_to_an_end() -> None:
    factor = lr_factor(Recipe(max_epochs=1, warmup_epochs=0.6), 1)
    assert [factor(0), factor(1)] == [0.5, 1.0]


@pytest.mark.parametrize(
    "fields", [{"lr": 0.1}, {"momentum": 0.5}, {"weight_decay": 0.5}, {"precision": "bf16"}], ids=str
)
def test_muon_heeds_what_the_recipe_says(fields: dict[str, Any]) -> None:
    def after(**fields: Any) -> list[Parameter]:
        parameters = with_gradients(FILTERS + REST)
        made = muon(parameters, **fields)
        for _ in range(2):
            made.step()
        return parameters

    assert not all(torch.equal(one, other) for one, other in zip(after(), after(**fields), strict=True))


def test_muon_leaves_parameters_without_a_gradient_alone() -> None:
    parameters = with_gradients(FILTERS + REST)
    for p in parameters:
        p.grad = None
    before = [p.detach().clone() for p in parameters]
    muon(parameters).step()
    assert all(torch.equal(p, was) for p, was in zip(parameters, before, strict=True))


def test_muon_keeps_the_layout_of_filters_in_channels_last() -> None:
    plain, last = with_gradients([(16, 16, 3, 3)]), with_gradients([(16, 16, 3, 3)])
    for p in last:
        p.data = p.data.contiguous(memory_format=torch.channels_last)
    muon(plain).step(), muon(last).step()
    assert last[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain[0], last[0])


def test_the_average_is_pytorchs_own_also_when_it_goes_on() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)  # type: ignore[no-untyped-call]
    ours = MovingAverage(network, 0.9)

    def advance() -> None:
        network(torch.randn(2, 3, 8, 8))  # its running statistics
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        theirs.update_parameters(network)
        ours.update_parameters(network)

    for step in range(6):
        if step == 3:
            resumed = MovingAverage(network, 0.9)
            resumed.load_state_dict(ours.state_dict())
            ours = resumed
        advance()
        for name, value in theirs.state_dict().items():
            if not name.endswith("num_batches_tracked"):  # a count, which has no average
                torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)
    assert int(ours.n_averaged) == 6
