"""Each batched transform does to every image what a slow one does to one image at a time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from PIL import Image
from torch import Generator, Tensor

from cifar_lab import augment
from cifar_lab.augment import Augmentation

N = 12


def batch(n: int = N, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(256, (n, 3, height, width), generator=Generator().manual_seed(0), dtype=torch.uint8)


def drawn(high: int, n: int = N, seed: int = 1) -> Tensor:
    return torch.randint(high, (n,), generator=Generator().manual_seed(seed))


def targets(n: int = N) -> Tensor:
    return torch.nn.functional.one_hot(drawn(5, n, 9), 5).float()


@pytest.mark.parametrize("border", ["black", "reflect"])
@pytest.mark.parametrize("width", [32, 20])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_crop_is_a_window_of_the_padded_image(layout: torch.memory_format, width: int, border: str) -> None:
    images, top, left = batch(width=width).contiguous(memory_format=layout), drawn(9), drawn(9, seed=2)
    top[:2], left[:2] = torch.tensor([0, 8]), torch.tensor([0, 8])
    top[-1], left[-1] = 8, 8  # the last window there is
    out = augment.crop(images, top, left, 4, border)
    for i in range(N):
        padded = tvf.pad(images[i], [4], padding_mode={"black": "constant"}.get(border, border))
        assert torch.equal(out[i], tvf.crop(padded, int(top[i]), int(left[i]), 32, width))


def test_crop_in_the_middle_changes_nothing() -> None:
    middle = torch.full((N,), 4)
    assert torch.equal(augment.crop(batch(), middle, middle, 4, "reflect"), batch())


def test_flip_mirrors_those_it_is_told_to() -> None:
    images, flipped = batch(), drawn(2).bool()
    out = augment.flip(images, flipped)
    assert flipped.any() and not flipped.all()
    for i in range(N):
        assert torch.equal(out[i], tvf.hflip(images[i]) if flipped[i] else images[i])


@pytest.mark.parametrize("width", [32, 20])
def test_rotate_is_torchvisions_bilinear_one(width: int) -> None:
    images = batch(width=width).float()
    degrees = torch.linspace(-180, 180, N)
    out = augment.rotate(images, degrees)
    for i in range(N):
        slow = tvf.rotate(images[i], float(degrees[i]), tvf.InterpolationMode.BILINEAR)
        torch.testing.assert_close(out[i], slow, rtol=0, atol=0.02)


def test_rotate_turns_counter_clockwise() -> None:
    images = batch()
    assert torch.equal(augment.rotate(images, torch.full((N,), 90.0)), images.rot90(1, (2, 3)))


@pytest.mark.parametrize("side", [8, 20, 31, 32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shrink_is_pillows_bilinear_resizing(side: int, layout: torch.memory_format) -> None:
    images = batch().float()
    out = augment.shrink(images.contiguous(memory_format=layout), side)
    assert out.shape == (N, 3, side, side) and out.is_contiguous(memory_format=layout)
    for i, channel in itertools.product(range(N), range(3)):
        slow = Image.fromarray(images[i, channel].numpy()).resize((side, side), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(out[i, channel], np.asarray(slow), rtol=0, atol=0.01)


def test_cutout_fills_a_square_clipped_at_the_border() -> None:
    images, y, x, fill = batch(), drawn(32), drawn(32, seed=2), torch.tensor([1.0, 2.0, 3.0])
    y[:2], x[:2] = torch.tensor([0, 31]), torch.tensor([31, 0])
    for side in (1, 7, 8, 32):
        out = augment.cutout(images, y, x, side, fill)
        for i in range(N):
            slow = images[i].clone()
            up, left = int(y[i]) - side // 2, int(x[i]) - side // 2
            slow[:, max(up, 0) : max(up + side, 0), max(left, 0) : max(left + side, 0)] = fill[:, None, None].byte()
            assert torch.equal(out[i], slow)


def test_mixup_blends_images_and_targets_alike() -> None:
    images, wanted, partner = batch().float(), targets(), drawn(N)
    share = torch.rand(N, generator=Generator().manual_seed(3))
    mixed, blended = augment.mixup(images, wanted, partner, share)
    for i in range(N):
        j, own = int(partner[i]), float(share[i])
        torch.testing.assert_close(mixed[i], own * images[i] + (1 - own) * images[j])
        torch.testing.assert_close(blended[i], own * wanted[i] + (1 - own) * wanted[j])


def test_cutmix_pastes_a_rectangle_and_counts_its_pixels() -> None:
    images, wanted, partner, y, x = batch().float(), targets(), drawn(N), drawn(32), drawn(32, seed=2)
    share = torch.linspace(0, 1, N)
    pasted, blended = augment.cutmix(images, wanted, partner, y, x, share)
    for i in range(N):
        j, half = int(partner[i]), round(32 * math.sqrt(1 - float(share[i])) / 2)
        rows = slice(max(int(y[i]) - half, 0), int(y[i]) + half)
        columns = slice(max(int(x[i]) - half, 0), int(x[i]) + half)
        slow = images[i].clone()
        slow[:, rows, columns] = images[j][:, rows, columns]
        assert torch.equal(pasted[i], slow)
        area = len(range(32)[rows]) * len(range(32)[columns]) / 32**2
        torch.testing.assert_close(blended[i], (1 - area) * wanted[i] + area * wanted[j])


def made(**fields: Any) -> Augmentation:
    off: dict[str, Any] = {"padding": 0, "border": "black", "flip": "none", "degrees": 0.0, "cutout": 0}
    return Augmentation(**{**off, **fields}, fill=torch.tensor([120.0, 121.0, 122.0]))


def applied(augmentation: Augmentation, images: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
    return augmentation(images, epoch, torch.arange(len(images)), Generator().manual_seed(seed))


EACH = [{"padding": 4}, {"flip": "random"}, {"degrees": 30.0}, {"cutout": 8}]
ALL: dict[str, Any] = {"padding": 4, "flip": "random", "degrees": 30.0, "cutout": 8}


def test_nothing_asked_is_nothing_done() -> None:
    assert torch.equal(applied(made(), batch()), batch())


@pytest.mark.parametrize("fields", [*EACH, ALL], ids=str)
def test_each_sample_has_its_own_randomness(fields: dict[str, Any]) -> None:
    copies = batch(1).expand(32, -1, -1, -1)
    out = applied(made(**fields), copies)
    ways = len(np.unique(out.flatten(1).numpy(), axis=0))
    assert ways == 2 if fields == {"flip": "random"} else ways > 16


@pytest.mark.parametrize("fields", [*EACH, ALL], ids=str)
def test_what_is_drawn_is_a_function_of_the_generator(fields: dict[str, Any]) -> None:
    augmentation, images = made(**fields), batch(32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, again, other = applied(augmentation, images), applied(augmentation, images), applied(augmentation, images, 1)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"


@pytest.mark.parametrize("fields", [*EACH, ALL], ids=str)
def test_uint8_stays_uint8_and_the_source_is_left_alone(fields: dict[str, Any]) -> None:
    images = batch(32)
    out = applied(made(**fields), images)
    assert out.dtype == torch.uint8 and out.shape == images.shape
    assert torch.equal(images, batch(32)) and out.data_ptr() != images.data_ptr()


def test_crop_draws_every_offset_and_random_flip_half() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).expand(400, 3, 32, 32).contiguous()
    seen = {int(value) for value in applied(made(padding=4), ramp)[:, 0, 16, 16]}
    assert seen == set(range(12, 21))
    mirrored = applied(made(flip="random"), ramp)[:, 0, 0, 0] == 31
    assert 0.4 < float(mirrored.float().mean()) < 0.6


def test_alternating_flip_shows_both_sides_in_two_successive_epochs() -> None:
    images = batch(400, 4, 4)
    epochs = [applied(made(flip="alternating"), images, seed=epoch, epoch=epoch) for epoch in range(4)]
    for before, after in itertools.pairwise(epochs):
        assert torch.equal(after, before.flip(-1))
    mirrored = (epochs[0] != images).flatten(1).any(1)
    assert 0.4 < float(mirrored.float().mean()) < 0.6
