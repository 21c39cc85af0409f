"""NF-ResNet: the variance at initialisation is the predicted one, without any normaliser."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cifar_lab.models import build
from cifar_lab.models.nf_resnet import GAMMA, ScaledConv2d, ScaledReLU
from cifar_lab.recipe import Recipe

ALPHA2 = 0.2**2
# The variance expected of each block's input: 1 + alpha^2 a block since the last change of shape, counting that one's.
BASIC = [1, 1 + ALPHA2, 1 + 2 * ALPHA2, 1 + ALPHA2, 1 + 2 * ALPHA2, 1 + ALPHA2, 1 + 2 * ALPHA2, 1 + ALPHA2]
DEEP = [1, *(1 + i * ALPHA2 for n in (3, 4, 6, 3) for i in range(1, n + 1))][:-1]
# In basic blocks the first stage keeps its input's shape, and nothing is reset until the second.
DEEP_BASIC = [1 + i * ALPHA2 for i in range(4)] + DEEP[4:]


def make(**fields: Any) -> Any:
    torch.manual_seed(0)
    return build(Recipe(arch="nf_resnet", **fields), 10)


def variance(h: Tensor) -> float:
    """Of each channel over images and pixels, averaged over the channels."""
    return float(h.var((0, 2, 3)).mean())


@pytest.mark.parametrize(("depth", "expected"), [(18, BASIC), (34, DEEP_BASIC), (50, DEEP)])
def test_beta_follows_the_recurrence_of_the_paper(depth: int, expected: list[float]) -> None:
    with torch.device("meta"):
        network = make(depth=depth, width=4)
    assert [block.beta**2 for block in network.stages] == pytest.approx(expected)


@pytest.mark.parametrize(("depth", "width"), [(18, 32), (50, 16)])
def test_at_initialisation_each_block_meets_the_variance_it_divides_by(depth: int, width: int) -> None:
    network = make(depth=depth, width=width, alpha=1.0)  # a block then adds 1, far more than the tolerance
    for layer in network.modules():
        if isinstance(layer, ScaledConv2d):
            # The prediction knows no borders: zeros there have less variance than the map.
            layer.padding_mode = "circular"
            layer._reversed_padding_repeated_twice = [int(layer.padding[0])] * 4
    seen: list[tuple[float, float]] = []
    for block in network.stages:
        block.register_forward_pre_hook(lambda block, args: seen.append((variance(args[0]), block.beta**2)))
    with torch.no_grad():
        network(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    assert len(seen) == len(network.stages) and max(predicted for _, predicted in seen) > 2.9
    for i, (found, predicted) in enumerate(seen):
        assert found == pytest.approx(predicted, rel=0.15), i


def test_standardized_weights_have_mean_0_and_variance_1_over_fan_in_whatever_was_drawn() -> None:
    torch.manual_seed(0)
    layer = ScaledConv2d(8, 16, 3)
    with torch.no_grad():
        layer.weight.mul_(7).add_(3)
        layer.gain[1] = 2
    weights = layer.standardized().flatten(1)
    torch.testing.assert_close(weights.mean(1), torch.zeros(16), rtol=0, atol=1e-6)
    expected = torch.full((16,), 1 / 72)
    expected[1] *= 4
    torch.testing.assert_close(weights.var(1, correction=0), expected)


def test_the_convolution_uses_the_standardized_weights() -> None:
    torch.manual_seed(0)
    layer, x = ScaledConv2d(3, 4, 3, stride=2), torch.randn(2, 3, 8, 8)
    plain = nn.functional.conv2d(x, layer.standardized(), layer.bias, stride=2, padding=1)
    torch.testing.assert_close(layer(x), plain)


def test_the_scaled_relu_preserves_variance() -> None:
    x = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    assert float(ScaledReLU()(x).var()) == pytest.approx(1, abs=0.01)
    assert pytest.approx(math.sqrt(2 / (1 - 1 / math.pi))) == GAMMA


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_there_is_no_normaliser(depth: int) -> None:
    with torch.device("meta"):
        network = make(depth=depth)
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    assert not [layer for layer in network.modules() if isinstance(layer, norms)]
    assert not list(network.buffers())


def test_an_image_is_judged_by_itself_in_training_too() -> None:
    network, images = make(width=4), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(network(images[:1]), network(images)[:1], rtol=1e-4, atol=1e-5)
