"""Gradients: their histograms a layer over time, and which ReLUs are dead.

`GradientWatch` leaves a CSV with a row an epoch and layer:

- `epoch`: from 1;
- `layer`: a parameter's name in the network (convolutions.0.weight), or a ReLU's (convolutions.1);
- `kind`: gradient or relu;
- `n`: gradient entries counted in the epoch, or channels of the ReLU;
- `zero`: fraction of them that were exactly zero, or that gave nothing: channels never above zero in the epoch;
- `rms`: root mean square of the gradient; empty for a ReLU, as are the bins;
- `b0` ... `b23`: how many |gradient| lay below 1e-10 (b0, zeros among them), in each half decade from there (b1 from
  1e-10, b2 from 1e-9.5, ..., b22 up to 10), and at 10 or above (b23, what is not a number among them).

Gradients are those of the loss, before any clipping. Parameters that get none (frozen, unused) have no row. ReLUs are
the nn.ReLU modules: LeakyReLU, ELU and GELU cannot die, torch.relu called as a function is not seen.

At most STEPS optimizer steps an epoch are looked at, evenly spaced from the first: a channel that other batches alone
set off passes for dead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cifar_lab.classifier import ImageClassifier
from cifar_lab.files import read_csv, write_csv

STEPS = 20  # an epoch
EXPONENTS = tuple(half / 2 for half in range(-20, 3))  # of 10: the edges between the bins
BINS = tuple(f"b{i}" for i in range(len(EXPONENTS) + 1))
COLUMNS = ("epoch", "layer", "kind", "n", "zero", "rms", *BINS)
PARTLY = 0.1  # share of dead channels from which on a ReLU is reported
NAMED = 4  # parameters that a sentence names before it counts the rest


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
    later ones are replaced. The training is not changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hooks: list[RemovableHandle] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.gradients: dict[str, GradientSums] = {}
        self.alive: dict[tuple[str, int], Tensor] = {}
        self.edges = torch.tensor([10**exponent for exponent in EXPONENTS], device=pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, ImageClassifier)
        self.looks = sampled(batch_idx, int(trainer.num_training_batches))
        if self.looks:
            for name, layer in pl_module.network.named_modules():
                if isinstance(layer, nn.ReLU):
                    self.hooks.append(layer.register_forward_hook(self._watch(name)))

    def _watch(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            most = output.detach().amax([i for i in range(output.ndim) if i != 1]).flatten()
            alive = ~(most <= 0)  # what is not a number is something else than dead
            key = name, len(alive)  # one module may serve several layers
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


def verdicts(table: pd.DataFrame) -> list[str]:
    """What died in a training, in sentences, from GradientWatch's table; the last epoch decides.

    A ReLU is reported when a tenth of its channels or more are dead, a parameter when its gradient is zero throughout.
    """
    if table.empty:
        return []
    relus = table[table.kind == "relu"]
    if relus.empty:
        said = ["The network has no ReLU module: none could die."]
    else:
        said = [sentence for _, own in relus.groupby(["layer", "n"], sort=False) if (sentence := dead_relu(own))]
    advice = ["A lower lr or leaky_relu may help."] if said and not relus.empty else []
    cut_off: dict[str, list[str]] = {}
    for name, own in table[table.kind == "gradient"].groupby("layer", sort=False):
        if when := all_zero(own):
            cut_off.setdefault(when, []).append(str(name))
    none = [f"No gradient reached {listed(names)} {when}." for when, names in cut_off.items()]
    return [*(said or ["No ReLU died."]), *none, *advice]


def dead_relu(own: pd.DataFrame) -> str | None:
    """A sentence on one ReLU's rows, where enough of its channels ended dead."""
    last = own.sort_values("epoch").to_dict("records")[-1]
    n, share = last["n"], last["zero"]
    if when := all_zero(own):
        return f"{last['layer']} (ReLU): all {n} channels gave nothing {when}: dead."
    if share >= PARTLY:
        dead = f"{round(share * n)} of {n} channels ({share:.0%})"
        return f"{last['layer']} (ReLU): {dead} gave nothing in the last epoch: dead."
    return None


def all_zero(own: pd.DataFrame) -> str | None:
    """Since when one layer's rows say zero throughout, in words; None if they do not in the last epoch."""
    last, other = own.epoch.max(), own.epoch[own.zero < 1]
    if other.empty:
        return "from the first epoch to the last"
    if other.max() == last:
        return None
    since = own.epoch[own.epoch > other.max()].min()
    return "in the last epoch" if since == last else f"from epoch {since} to the last"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence, the first NAMED of them if there are many."""
    if len(names) > NAMED + 1:
        return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
