"""Winograd's convolution is the plain one, in its values and in both gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_lab.winograd import FROM_FILTER, FROM_INPUT, TO_OUTPUT, Winograd


def drawn(*shape: int, dtype: torch.dtype = torch.double, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_the_matrices_make_a_convolution_of_a_row() -> None:
    row, filters = drawn(6), drawn(3, seed=1)
    ours = TO_OUTPUT @ ((FROM_FILTER @ filters) * (FROM_INPUT @ row))
    torch.testing.assert_close(ours, F.conv1d(row[None, None], filters[None, None])[0, 0])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(
    ("n", "c", "k", "height", "width"),
    [(3, 5, 4, 7, 7), (2, 4, 6, 15, 15), (1, 3, 2, 8, 8), (2, 2, 3, 4, 9), (2, 3, 2, 1, 1), (2, 3, 3, 5, 3)],
)
def test_values_and_gradients_are_those_of_conv2d(
    n: int, c: int, k: int, height: int, width: int, layout: torch.memory_format
) -> None:
    images = drawn(n, c, height, width).contiguous(memory_format=layout).requires_grad_()
    weight, gradient = drawn(k, c, 3, 3, seed=1).requires_grad_(), drawn(n, k, height, width, seed=2)
    ours, plain = Winograd.apply(images, weight), F.conv2d(images, weight, padding=1)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(
        torch.autograd.grad(ours, (images, weight), gradient),
        torch.autograd.grad(plain, (images, weight), gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_in_fp32_the_error_stays_far_below_that_of_bf16() -> None:
    images, weight = drawn(4, 256, 7, 7), drawn(64, 256, 3, 3, seed=1)
    exact = F.conv2d(images, weight, padding=1)
    error = (Winograd.apply(images.float(), weight.float()) - exact).abs().max() / exact.abs().max()
    assert error < 1e-4 < torch.finfo(torch.bfloat16).eps


def test_the_result_lies_in_channels_last() -> None:
    images = drawn(2, 16, 7, 7).requires_grad_()
    out = Winograd.apply(images, drawn(32, 16, 3, 3))
    assert out.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(out.sum(), images)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
