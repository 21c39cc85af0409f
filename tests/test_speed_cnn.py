"""Speed CNN: its first layer whitens what the training images show, and stays as it was."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import interrupted
from sklearn.decomposition import PCA
from torch import Tensor, nn

from cifar_lab.checkpoint import Row, read_checkpoint
from cifar_lab.data import CIFAR10DataModule
from cifar_lab.fit import fit
from cifar_lab.layers import memory_format
from cifar_lab.models import build
from cifar_lab.models.speed_cnn import BIAS_LR, DIRECTIONS, PATCH, WHITENING_EPS, BatchNorm, SpeedCNN, convolution
from cifar_lab.optim import optimizer
from cifar_lab.recipe import Recipe

SMALL: dict[str, Any] = {
    "arch": "speed_cnn", "widths": "16,16,16", "dataset": "digits", "limit_train": 96, "batch_size": 32,
    "max_epochs": 2, "precision": "32",
}  # fmt: skip


def make(**fields: Any) -> SpeedCNN:
    torch.manual_seed(0)
    network = build(Recipe(**{**SMALL, **fields}), 10)
    assert isinstance(network, SpeedCNN)
    return network


def smooth(n: int = 200) -> Tensor:
    """Images of colored noise whose neighboring pixels are alike, as those of photographs are."""
    noise = torch.randn(n, 3, 34, 34, generator=torch.Generator().manual_seed(1))
    mixed = torch.einsum("ij,njhw->nihw", torch.tensor([[1.0, 0.5, 0.4], [0.0, 1.0, 0.6], [0.0, 0.0, 1.0]]), noise)
    return F.avg_pool2d(mixed, 3, 1) * 2


def responses(network: SpeedCNN, images: Tensor) -> Tensor:
    """What the first layer's filters answer, (channels, positions)."""
    return F.conv2d(images, network.whitening).transpose(0, 1).flatten(1)


def test_the_first_layer_answers_with_variance_1_and_without_correlation() -> None:
    network, images = make(), smooth()
    network.start(images)
    covariance = torch.cov(responses(network, images))[:DIRECTIONS, :DIRECTIONS]
    torch.testing.assert_close(covariance, torch.eye(DIRECTIONS), rtol=0, atol=0.05)


def test_its_directions_are_the_principal_components_with_both_signs() -> None:
    network, images = make(), smooth()
    network.start(images)
    filters = network.whitening.flatten(1)
    assert torch.equal(filters[DIRECTIONS:], -filters[:DIRECTIONS])
    theirs = PCA(DIRECTIONS).fit(F.unfold(images, PATCH).transpose(1, 2).flatten(0, 1).numpy())
    lengths = 1 / np.sqrt(theirs.explained_variance_ + WHITENING_EPS)
    np.testing.assert_allclose(filters[:DIRECTIONS].norm(dim=1), lengths[::-1], rtol=1e-3)
    # Where two components explain as much, either order is right: what all of them do to a patch is compared.
    whitens = theirs.components_.T @ np.diag(lengths**2) @ theirs.components_
    np.testing.assert_allclose(filters[:DIRECTIONS].T @ filters[:DIRECTIONS], whitens, rtol=1e-2, atol=1e-2)


def test_images_of_one_color_are_no_error() -> None:
    network = make()
    network.start(torch.zeros(10, 3, 32, 32))
    assert torch.isfinite(network.whitening).all() and torch.isfinite(network(torch.zeros(4, 3, 32, 32))).all()


def test_a_training_begins_from_the_whitening_and_trains_its_bias_alone(tmp_path: Path) -> None:
    asked = Recipe(**SMALL)
    fit(asked, tmp_path)
    network = make()
    network.start(CIFAR10DataModule(asked).sample())
    state = read_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    assert torch.equal(state["network.whitening"], network.whitening)
    assert state["network.whitening_bias"].abs().min() > 0


def test_the_bias_of_the_whitening_is_trained_for_three_epochs(tmp_path: Path) -> None:
    asked, biases = Recipe(**{**SMALL, "max_epochs": 5}), []

    def keep(_: Row) -> None:
        biases.append(read_checkpoint(tmp_path / "last.ckpt")["state_dict"]["network.whitening_bias"])

    interrupted(asked, tmp_path, 4, on_epoch=keep)
    fit(asked, tmp_path, on_epoch=keep, resume=True)
    moved = [not torch.equal(after, before) for before, after in itertools.pairwise(biases)]
    assert moved == [True, True, False, False, False]  # a resumed training tells its last epoch once more


def test_a_resumed_training_does_not_whiten_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Recipe(**SMALL)
    fit(asked, tmp_path / "whole")
    interrupted(asked, tmp_path / "parts", 1)
    monkeypatch.setattr(SpeedCNN, "start", lambda *_: pytest.fail("whitened again"))
    fit(asked, tmp_path / "parts", resume=True)
    one, other = (read_checkpoint(tmp_path / name / "last.ckpt")["state_dict"] for name in ("whole", "parts"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_its_biases_alone_are_quickened() -> None:
    network = make().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    filters, head, biases = optimizer(Recipe(**SMALL), network.parameters()).param_groups
    assert [p.shape for p in head["params"]] == [(10, 16)]
    assert all(p.ndim == 4 for p in filters["params"]) and len(filters["params"]) == 6
    assert all(p.ndim == 1 for p in biases["params"]) and len(biases["params"]) == 7
    assert biases["lr"] == pytest.approx(head["lr"] * BIAS_LR)
    assert biases["lr"] * biases["weight_decay"] == pytest.approx(head["lr"] * head["weight_decay"])


def test_it_learns_digits(tmp_path: Path) -> None:
    learning = {"widths": "32,32,32", "flip": "none", "limit_train": 500, "batch_size": 50, "accumulate": 1}
    run = fit(Recipe(**{**SMALL, **learning, "max_epochs": 5}), tmp_path)
    assert run.best["val_acc"] > 0.9


def test_batch_norm_has_a_bias_and_no_scale() -> None:
    layers = [layer for layer in make().modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(layers) == 6 and all(isinstance(layer, BatchNorm) for layer in layers)
    layer, images = BatchNorm(3), smooth(8)
    layer.bias.data = torch.tensor([0.5, -1.0, 2.0])
    out = layer(images)
    torch.testing.assert_close(out.mean((0, 2, 3)), layer.bias.data, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.var((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-3)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize(("channels", "out"), [(16, 32), (16, 16), (32, 16)])
def test_a_new_convolution_hands_its_input_on(channels: int, out: int) -> None:
    images = torch.randn(2, channels, 8, 8)
    shared = min(channels, out)
    torch.testing.assert_close(convolution(channels, out)(images)[:, :shared], images[:, :shared])


def test_the_last_two_convolutions_of_three_are_a_residual_block() -> None:
    group: Any = make(depth=3).groups[1]
    group.eval()
    for parameter in group.keeping.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(group(x), group.activation(group.halving(x)))


def test_the_maps_are_halved_without_a_rest() -> None:
    sides: list[int] = []
    network = make()
    for layer in network.modules():
        if isinstance(layer, (nn.MaxPool2d, nn.AdaptiveMaxPool2d)):
            layer.register_forward_hook(lambda _, inputs, output: sides.extend([inputs[0].shape[2], output.shape[2]]))
    network(smooth(2))
    assert sides == [31, 15, 15, 7, 7, 3, 3, 1]


def test_the_defaults_are_in_channels_last() -> None:
    assert memory_format(build(Recipe(arch="speed_cnn"), 10), "auto") == torch.channels_last
