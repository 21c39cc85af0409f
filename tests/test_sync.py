"""No training step waits for a device: nothing of it is read by Python, no shape depends on a value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import NARROW
from torch.distributions import Dirichlet
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_lab.classifier import ImageClassifier
from cifar_lab.data import CIFAR10DataModule
from cifar_lab.fit import fit
from cifar_lab.gradients import GradientWatch
from cifar_lab.models import ARCHITECTURES
from cifar_lab.optim import clip_adaptively, optimizer
from cifar_lab.recipe import Recipe

# For these a GPU's queue is emptied: Python gets a number, or a shape that only the values tell, or gives numbers.
READS = {"_local_scalar_dense", "is_nonzero", "equal"}
GIFTS = {"lift_fresh"}  # torch.tensor
COPIES = ("tolist", "cpu", "numpy")  # methods that PyTorch does not dispatch for a tensor on the CPU
SHAPED_BY_VALUES = {"nonzero", "masked_select", "bincount", "unique_dim", "_unique2", "unique_consecutive"}


class Waits(TorchDispatchMode):
    """Notes what a GPU would be waited for; `counters` are tensors that lie on the CPU there too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.watching = False
        self.counters: set[int] = set()
        self.plain = {name: getattr(torch.Tensor, name) for name in COPIES}

    def __enter__(self) -> Waits:
        for name in COPIES:
            setattr(torch.Tensor, name, self.noting(name))
        super().__enter__()
        self.watching = True
        return self

    def __exit__(self, *words: Any) -> None:
        super().__exit__(*words)
        self.watching = False
        for name, method in self.plain.items():
            setattr(torch.Tensor, name, method)

    def noting(self, name: str) -> Any:
        """A method of a tensor that is noted when it is called."""

        def noted(*words: Any, **named: Any) -> Any:
            self.found.append(name)
            return self.plain[name](*words, **named)

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for given in args
            if isinstance(given, (list, tuple))
            for index in given
        )
        repeats = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        named = name in SHAPED_BY_VALUES | GIFTS or (name in READS and id(args[0]) not in self.counters)
        if by_mask or repeats or named:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Watch(pl.Callback):
    """Watches a first epoch from the end of its first batch to that of its last, all between them, and validation's."""

    def __init__(self) -> None:
        self.waits, self.batches = Waits(), 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.batches += 1
        if self.batches == 1:
            # PyTorch's Adam counts its steps in tensors, which it leaves on the CPU.
            states = trainer.optimizers[0].state.values()
            self.waits.counters.update(id(state["step"]) for state in states if "step" in state)
            self.waits.__enter__()
        elif self.batches == trainer.num_training_batches:
            self.waits.__exit__(None, None, None)

    def on_exception(self, *_: Any) -> None:
        if self.waits.watching:
            self.waits.__exit__(None, None, None)

    def on_validation_batch_start(self, *_: Any) -> None:
        self.waits.__enter__()

    def on_validation_batch_end(self, *_: Any) -> None:
        self.waits.__exit__(None, None, None)


RECIPES: dict[str, dict[str, Any]] = {
    **{arch: {"arch": arch} for arch in ARCHITECTURES},
    "pretrained": {"arch": "pretrained", "weights": "none"},
    "every augmentation": {"flip": "alternating", "rotate": 15.0, "cutout": 8, "crop_border": "reflect"},
    "random flip, black square": {"flip": "random", "cutout": 8, "cutout_fill": "black"},
    "mixup": {"mixup": 0.2, "ema": 0.9},
    "cutmix": {"cutmix": 1.0, "label_smoothing": 0.1},
    "agc": {"agc": 0.01, "accumulate": 2},
    "small images": {"arch": "resnet", "small_share": 0.5, "max_epochs": 2},
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw", "schedule": "onecycle"},
    "sgd": {"optimizer": "sgd", "schedule": "plateau"},
    "muon": {"optimizer": "muon", "schedule": "cosine"},
}


@pytest.mark.parametrize("named", RECIPES)
def test_no_step_waits_for_its_device(named: str, tmp_path: Path) -> None:
    fields = {"arch": "classic_cnn", "max_epochs": 1, "limit_train": 70, "batch_size": 16, **RECIPES[named]}
    asked = Recipe(dataset="digits", precision="32", **NARROW.get(fields["arch"], {}), **fields)
    watch = Watch()
    fit(asked, tmp_path, callbacks=[GradientWatch(tmp_path / "gradients.csv"), watch])
    assert watch.batches >= 5 and watch.waits.found == []


WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x[0] > 0),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "tensor": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_what_would_wait_is_seen(wait: Any) -> None:
    watch = Waits()
    with watch:
        wait(torch.ones(3))
    assert len(watch.found) >= 1


@pytest.mark.parametrize(
    "fields", [{}, {"mixup": 0.2, "ema": 0.9}, {"cutmix": 1.0, "agc": 0.01, "optimizer": "sgd"}], ids=str
)
def test_a_step_takes_nothing_from_the_cpu(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Which CUDA has, and the meta device has not.
    monkeypatch.setattr(Dirichlet, "sample", lambda self: torch.empty_like(self.concentration))
    narrow = {"accumulate": 1, **NARROW["speed_cnn"]}
    asked = Recipe(arch="speed_cnn", dataset="digits", precision="32", **narrow, **fields)
    data = CIFAR10DataModule(asked)
    model = ImageClassifier(asked.to_dict(), data.classes, data.mean.tolist(), data.std.tolist())
    model = model.to("meta")  # a device that refuses what lies on another, and has no number to give
    made = optimizer(asked, model.network.parameters())
    if model.averaged is not None:
        model.averaged.begun = True
    loss = model.training_step((data.set.images[:8].to("meta"), data.set.labels[:8].to("meta")), 0)
    loss.backward()  # type: ignore[no-untyped-call]
    if asked.agc:
        clip_adaptively(model.network.parameters(), asked.agc)
    made.step()
    if model.averaged is not None:
        model.averaged.update_parameters(model.network)
    assert loss.device.type == "meta"
    with pytest.raises(RuntimeError):
        model.training_step((data.set.images[:8].to("meta"), data.set.labels[:8]), 0)
