"""Optimisers with their learning-rate schedules, the latter as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar_lab.recipe import Recipe

DROP = 0.1  # what schedules step and plateau multiply the lr by; He et al. 2015
ONECYCLE_RISE, ONECYCLE_START, ONECYCLE_END = 0.3, 1 / 25, 1 / 250_000  # Smith and Topin 2018, PyTorch's constants
BETA2 = 0.999  # of adam and adamw; PyTorch's default
QUINTIC = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5: pulls what lies in 0..1 towards 1 fast, if not all the way
QUINTIC_STEPS = 3
# Under muon, of what is no filter: lr over that of the filters, and momentum; those of airbench94_muon's head.
REST_LR, REST_MOMENTUM = 0.0852, 0.85
AGC_EPS = 1e-3  # norm that a weight is taken to have at least, else one at zero would stay there; Brock et al. 2021


def optimizer(recipe: Recipe, parameters: Iterable[Parameter]) -> Optimizer:
    """The recipe's optimiser; weight decay acts on every parameter, as PyTorch's defaults and the studies have it."""
    trained = [p for p in parameters if p.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            trained, recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay
        )
    if recipe.optimizer == "muon":
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        return Muon(trained, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, dtype=dtype)
    kind: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(trained, recipe.lr, betas=(recipe.momentum, BETA2), weight_decay=recipe.weight_decay)


class Muon(Optimizer):
    """Muon for the filters of convolutions, SGD with REST_LR times the lr for all other parameters.

    A filter bank (out, in, height, width) is a matrix of `out` rows. It is brought to a norm of sqrt(out), then moved
    against its gradient's momentum made orthogonal, whose norm is about as large: lr is the relative size of a step.
    Weight decay acts on the others alone, as that of SGD: the norm of the filters is fixed.

    Args:
        parameters: what is trained; filters are those with four dimensions.
        lr: learning rate of the filters; an attribute `lr_factor` of another parameter multiplies its own.
        momentum: Nesterov momentum of the filters' gradient; that of the others is REST_MOMENTUM.
        weight_decay: L2 coefficient of the others.
        dtype: what the orthogonal matrix is computed in.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the fixed norm, three steps
    towards the orthogonal matrix and SGD for the others are those of airbench94_muon.
    """

    def __init__(
        self, parameters: Iterable[Parameter], lr: float, *, momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        filters: list[Parameter] = []
        others: dict[float, list[Parameter]] = {1.0: []}
        for parameter in parameters:
            like = filters if parameter.ndim == 4 else others.setdefault(getattr(parameter, "lr_factor", 1.0), [])
            like.append(parameter)
        rest = [
            {
                "params": like,
                "lr": lr * REST_LR * factor,
                "momentum": REST_MOMENTUM,
                "weight_decay": weight_decay / factor,
            }
            for factor, like in others.items()
        ]
        super().__init__([{"params": filters, "lr": lr, "momentum": momentum}, *rest], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Do one step, after `closure`, which computes the loss and its gradients, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        filters, *rest = self.param_groups
        for parameter in filters["params"]:
            if parameter.grad is not None:
                parameter.mul_(len(parameter) ** 0.5 / parameter.norm().clamp_min(1e-7))
                direction = self._nesterov(parameter, parameter.grad, filters["momentum"])
                # The order of the columns is of no account: that of memory needs no copy.
                last = parameter.is_contiguous(memory_format=torch.channels_last)
                rows = direction.permute(0, 2, 3, 1) if last else direction
                moved = orthogonal(rows.flatten(1).to(self.dtype)).to(parameter.dtype).view(rows.shape)
                parameter.sub_(moved.permute(0, 3, 1, 2) if last else moved, alpha=filters["lr"])
        for others in rest:
            for parameter in others["params"]:
                if parameter.grad is not None:
                    grad = parameter.grad.add(parameter, alpha=others["weight_decay"])
                    parameter.sub_(self._nesterov(parameter, grad, others["momentum"]), alpha=others["lr"])
        return loss

    def _nesterov(self, parameter: Parameter, grad: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        mean = state["momentum_buffer"].mul_(momentum).add_(grad)
        return grad.add(mean, alpha=momentum)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the orthogonal matrix nearest to the direction of `matrix`, (m, n), in its dtype: singular values near 1.

    By a quintic polynomial of the matrix, again and again (Newton-Schulz), which is products of matrices only.
    """
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(QUINTIC_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class MovingAverage(AveragedModel):
    """A copy of a network whose weights and running statistics are the moving average of the network's.

    It begins with the network as the first `update_parameters` finds it. PyTorch's own reads its counter from the
    device at every step, and waits for it; here that is done once.

    Args:
        network: what is averaged.
        decay: of the average, a step.
    """

    def __init__(self, network: Module, decay: float) -> None:
        super().__init__(network)
        self.lerp = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.begun: bool | None = None

    @torch.no_grad()
    def update_parameters(self, model: Module) -> None:
        """Bring the average a step nearer to the network, which lies on the same device."""
        if self.begun is None:
            self.begun = bool(self.n_averaged > 0)
        averages = [*self.module.parameters(), *self.module.buffers()]
        values = [*model.parameters(), *model.buffers()]
        near: tuple[list[Tensor], list[Tensor]] = [], []
        for average, now in zip(averages, values, strict=True):
            if self.begun and average.is_floating_point():
                near[0].append(average)
                near[1].append(now)
            else:
                average.copy_(now)
        if near[0]:
            self.lerp(*near, self.n_averaged)
        self.n_averaged += 1
        self.begun = True


def lr_factor(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """What the peak lr is multiplied by at a step, counted from 0; plateau looks at results, and is not among these."""
    total = recipe.max_epochs * steps_per_epoch
    warm = round(recipe.warmup_epochs * steps_per_epoch)

    def cosine(start: float, end: float, progress: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        progress = min(1.0, (step - warm) / max(1, total - warm))
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
