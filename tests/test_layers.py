"""Layers that architectures share: a convolution whose fast gradient is the plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_lab.layers import NARROW, SIDE_BY_SIDE, Conv3x3, _Conv3x3

N = 2 * SIDE_BY_SIDE


def drawn(*shape: int, dtype: torch.dtype = torch.double, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(
    ("n", "height", "width"), [(N, 7, 7), (N, 3, 3), (N, 1, 1), (N, 5, 8), (N + 3, 7, 7), (1, 3, 3)]
)
def test_the_gradient_over_images_side_by_side_is_the_plain_one(
    n: int, height: int, width: int, layout: torch.memory_format
) -> None:
    images = drawn(n, 5, height, width).contiguous(memory_format=layout).requires_grad_()
    weight, gradient = drawn(6, 5, 3, 3, seed=1).requires_grad_(), drawn(n, 6, height, width, seed=2)
    ours, plain = _Conv3x3.apply(images, weight), F.conv2d(images, weight, padding=1)
    assert torch.equal(ours, plain)
    for one, other in zip(
        torch.autograd.grad(ours, (images, weight), gradient),
        torch.autograd.grad(plain, (images, weight), gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("side", "training", "padding", "taken"),
    [
        (NARROW, True, 1, True),
        (NARROW, False, 1, False),
        (NARROW + 1, True, 1, False),
        (NARROW, True, 0, False),
    ],
)
def test_images_lie_side_by_side_only_where_that_is_faster(
    side: int, training: bool, padding: int, taken: bool
) -> None:
    layer, images = Conv3x3(16, 16, padding).train(training), drawn(N, 16, side, side, dtype=torch.float32)
    assert "_Conv3x3" not in type(layer(images).grad_fn).__name__, "32 bit has no need of it"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(images)
        assert ("_Conv3x3" in type(out.grad_fn).__name__) is taken
        assert torch.equal(out, F.conv2d(images, layer.weight, padding=padding))
    out.float().square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
