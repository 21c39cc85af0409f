"""3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3), in PyTorch.

A map is cut into tiles of 4x4 outputs, which see 6x6 inputs. Both ways between tiles and 36 numbers are small linear
maps; on those numbers the convolution is a product over channels, 36 multiplications an output tile instead of 144.
Source: Winograd 1980 and Lavin and Gray 2016 (arXiv 1509.09308), whose points 0, 1, -1, 2, -2 and infinity are taken.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE, SEEN = 4, 6  # pixels of an output tile's side, and of the input that it depends on
FROM_INPUT = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
FROM_FILTER = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    dtype=torch.float64,
)
TO_OUTPUT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], dtype=torch.float64
)

# A tile's first pixel along one side of the map, and the (6, pixels) matrix between those pixels and its numbers.
Cut = tuple[int, Tensor]


@functools.cache
def cuts(side: int, dtype: torch.dtype) -> tuple[list[Cut], list[Cut]]:
    """How a side of that many pixels is cut: for the tiles' inputs, which overlap, and for their outputs."""
    inputs: list[Cut] = []
    outputs: list[Cut] = []
    for first in range(0, side, TILE):
        begin, end = max(first - 1, 0), min(first - 1 + SEEN, side)  # the border's zeros need no multiplication
        inputs.append((begin, FROM_INPUT[:, begin - first + 1 : end - first + 1].to(dtype)))
        outputs.append((first, TO_OUTPUT[: side - first].T.to(dtype)))
    return inputs, outputs


def spread(maps: Tensor, down: list[Cut], across: list[Cut]) -> Tensor:
    """Maps (H, W, M), contiguous, to the numbers of their tiles, (6, 6, tiles down, tiles across, M)."""
    _, width, m = maps.shape
    rows = maps.new_empty(SEEN, len(down), width * m)
    for t, (first, matrix) in enumerate(down):
        torch.mm(matrix, maps[first : first + matrix.shape[1]].flatten(1), out=rows[:, t])
    rows = rows.view(SEEN, len(down), width, m)
    numbers = maps.new_empty(SEEN, SEEN, len(down), len(across), m)
    for i in range(SEEN):
        for t in range(len(down)):
            for u, (first, matrix) in enumerate(across):
                torch.mm(matrix, rows[i, t, first : first + matrix.shape[1]], out=numbers[i, :, t, u])
    return numbers


def gather(numbers: Tensor, down: list[Cut], across: list[Cut], height: int, width: int) -> Tensor:
    """The transpose of `spread`: from (6, 6, tiles down, tiles across, M) to maps (H, W, M), sums where tiles meet."""
    m = numbers.shape[-1]
    rows = numbers.new_zeros(SEEN, len(down), width, m)
    for i in range(SEEN):
        for t in range(len(down)):
            for u, (first, matrix) in enumerate(across):
                rows[i, t, first : first + matrix.shape[1]].addmm_(matrix.T, numbers[i, :, t, u])
    maps = numbers.new_zeros(height, width, m)
    for t, (first, matrix) in enumerate(down):
        maps[first : first + matrix.shape[1]].flatten(1).addmm_(matrix.T, rows[:, t].flatten(1))
    return maps


class Winograd(torch.autograd.Function):
    """`F.conv2d(images, weight, padding=1)` of images (N, C, H, W) and weight (K, C, 3, 3), on a CPU, channels_last."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        n, c, h, w = images.shape
        k = len(weight)
        (down, to_down), (across, to_across) = cuts(h, images.dtype), cuts(w, images.dtype)
        filters = both(FROM_FILTER.to(images.dtype), weight.permute(2, 3, 1, 0)).view(SEEN**2, c, k)
        numbers = spread(images.permute(2, 3, 0, 1).reshape(h, w, n * c), down, across).view(SEEN**2, -1, c)
        products = torch.bmm(numbers, filters)
        ctx.save_for_backward(numbers, filters)
        ctx.shape = images.shape
        shape = (SEEN, SEEN, len(down), len(across), n * k)
        return images_of(gather(products.view(shape), to_down, to_across, h, w), n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        numbers, filters = ctx.saved_tensors
        n, c, h, w = ctx.shape
        k = filters.shape[2]
        (down, to_down), (across, to_across) = cuts(h, gradient.dtype), cuts(w, gradient.dtype)
        products = spread(gradient.permute(2, 3, 0, 1).reshape(h, w, n * k), to_down, to_across).view(SEEN**2, -1, k)
        of_filters = torch.bmm(numbers.transpose(1, 2), products).view(SEEN, SEEN, c, k)
        of_weight = both(FROM_FILTER.T.to(gradient.dtype), of_filters).permute(3, 2, 0, 1)
        shape = (SEEN, SEEN, len(down), len(across), n * c)
        of_numbers = torch.bmm(products, filters.transpose(1, 2)).view(shape)
        return images_of(gather(of_numbers, down, across, h, w), n), of_weight


def both(matrix: Tensor, squares: Tensor) -> Tensor:
    """A matrix (p, q) on both sides of squares (q, q, C, K): (p, p, C, K), contiguous."""
    return torch.einsum("ai,bj,ijck->abck", matrix, matrix, squares).contiguous()


def images_of(maps: Tensor, n: int) -> Tensor:
    """Maps (H, W, N*C) as images (N, C, H, W), channels_last."""
    h, w, _ = maps.shape
    return maps.view(h, w, n, -1).permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)
