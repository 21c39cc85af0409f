"""Gradients: their histograms a layer over time, and which ReLUs are dead.

`GradientWatch` leaves the CSV of `cifar_lab.gradient_table`.

Gradients are those of the loss, before any clipping. Parameters that get none (frozen, unused) have no row. ReLUs are
the nn.ReLU modules, one that serves a second layer is followed by (2) there: LeakyReLU, ELU and GELU cannot die,
torch.relu called as a function is not seen.

At most STEPS optimizer steps an epoch are looked at, evenly spaced from the first: a channel that other batches alone
set off passes for dead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cifar_lab.classifier import ImageClassifier
from cifar_lab.files import read_csv, write_csv
from cifar_lab.gradient_table import BINS, COLUMNS, EXPONENTS

STEPS = 20  # an epoch


def sampled(step: int, steps: int) -> bool:
    """Whether a step, from 0, is one of the at most STEPS evenly spaced ones of an epoch."""
    return step * STEPS % steps < STEPS


class GradientSums:
    """What was counted of one parameter's gradients; it stays on their device until `row`."""

    def __init__(self, device: torch.device) -> None:
        self.n = 0
        self.bins = torch.zeros(len(BINS), dtype=torch.int64, device=device)
        self.zeros = torch.zeros((), dtype=torch.int64, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, gradient: Tensor, edges: Tensor) -> None:
        """Count a gradient in; `edges` are 10**EXPONENTS on its device."""
        size = gradient.detach().float().abs().flatten()
        self.n += len(size)
        # bincount would make the host wait for the device.
        bins = torch.bucketize(size, edges, right=True)
        self.bins.scatter_add_(0, bins, torch.ones_like(bins))
        self.zeros += (size == 0).sum()
        self.squares += size.double().square().sum()

    def row(self) -> dict[str, Any]:
        """The columns from n on."""
        rms = (float(self.squares) / self.n) ** 0.5
        bins = dict(zip(BINS, self.bins.tolist(), strict=True))
        return {"n": self.n, "zero": int(self.zeros) / self.n, "rms": rms, **bins}


class GradientWatch(Callback):
    """Observes a training of an ImageClassifier, and rewrites the CSV file after every epoch.

    The rows of earlier epochs are kept, so that a resumed training goes on with the table; those of the same epoch or
    later ones are replaced. The training is not changed; of one that is compiled, the steps that are looked at are not
    compiled, and round otherwise.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hooks: list[RemovableHandle] = []
        self.eager = False
        self.uses: Counter[str] = Counter()  # of each ReLU, so far in this step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.gradients: dict[str, GradientSums] = {}
        self.alive: dict[tuple[str, int], Tensor] = {}
        self.edges = torch.tensor([10**exponent for exponent in EXPONENTS], device=pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, ImageClassifier)
        together = pl_module.recipe.accumulate
        self.looks = sampled(batch_idx // together, math.ceil(trainer.num_training_batches / together))
        self.uses.clear()
        if self.looks:
            if pl_module.recipe.compile:
                self.eager = True
                torch.compiler.set_stance("force_eager")  # compiled code goes on calling the hooks it was compiled with
            for name, layer in pl_module.network.named_modules():
                if isinstance(layer, nn.ReLU):
                    self.hooks.append(layer.register_forward_hook(self._watch(name)))

    def _watch(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            most = output.detach().amax([i for i in range(output.ndim) if i != 1]).flatten()
            alive = ~(most <= 0)  # what is not a number is something else than dead
            self.uses[name] += 1  # one module may serve several layers
            key = f"{name} ({self.uses[name]})" if self.uses[name] > 1 else name, len(alive)
            self.alive[key] = self.alive[key] | alive if key in self.alive else alive

        return hook

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, ImageClassifier)
        if self.looks:
            for name, parameter in pl_module.network.named_parameters():
                if parameter.grad is not None:
                    if name not in self.gradients:
                        self.gradients[name] = GradientSums(parameter.device)
                    self.gradients[name].add(parameter.grad, self.edges)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.unhook()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.unhook()

    def unhook(self) -> None:
        """Take the hooks off the network."""
        if self.eager:
            torch.compiler.set_stance("default")
            self.eager = False
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        rows: list[dict[str, Any]] = [row for row in read_csv(self.path) if int(row["epoch"]) < epoch]
        for name, sums in self.gradients.items():
            rows.append({"epoch": epoch, "layer": name, "kind": "gradient", **sums.row()})
        for (name, n), alive in self.alive.items():
            dead = n - int(alive.sum())
            rows.append({"epoch": epoch, "layer": name, "kind": "relu", "n": n, "zero": dead / n})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(self.path, COLUMNS, rows)
