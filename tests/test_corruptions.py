"""Corruptions: further from the image with each severity, the same for a seed, and what other libraries say."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images
from torch import Tensor

from cifar_lab import corruptions
from cifar_lab.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from cifar_lab.recipe import InputError

RANDOM = {
    "gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "fog", "elastic_transform",
}  # fmt: skip
PROMISED = {
    *RANDOM, "gaussian_blur", "defocus_blur", "zoom_blur", "brightness", "contrast", "saturate", "pixelate",
    "jpeg_compression",
}  # fmt: skip


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """(24, 3, 32, 32) uint8, cut out of scikit-learn's two photographs at a fifth of their size."""
    found = []
    for pixels in load_sample_images().images:
        small = np.asarray(Image.fromarray(pixels).resize((128, 96), Image.Resampling.LANCZOS))
        found += [small[y : y + 32, x : x + 32] for y in (0, 32, 64) for x in (0, 32, 64, 96)]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def strength(name: str, severity: int) -> float:
    return float(CORRUPTIONS[name][1][severity - 1])


def test_all_that_is_promised_is_there() -> None:
    assert set(CORRUPTIONS) == PROMISED and all(len(levels) == len(SEVERITIES) for _, levels in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_is_further_from_the_image_which_itself_stays(name: str, photos: Tensor) -> None:
    before = photos.clone()
    found = [corrupt(photos, name, severity) for severity in SEVERITIES]
    assert torch.equal(photos, before)
    assert all(changed.shape == photos.shape and changed.dtype == torch.uint8 for changed in found)
    distances = [float((changed.int() - photos.int()).abs().float().mean()) for changed in found]
    assert distances[0] > 0 and distances == sorted(set(distances)) and distances[-1] < 70


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_seed_gives_the_same_again_and_each_image_its_own(name: str, photos: Tensor) -> None:
    alike = photos[:1].expand(3, -1, -1, -1)
    found = corrupt(alike, name, 3)
    torch.rand(5)  # the global generator has no part in it
    assert torch.equal(found, corrupt(alike, name, 3))
    assert torch.equal(found, corrupt(alike, name, 3, seed=1)) == (name not in RANDOM)
    assert torch.equal(found[0], found[1]) == torch.equal(found[1], found[2]) == (name not in RANDOM)


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_the_images_of_another_batch_have_numbers_of_their_own(
    name: str, photos: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corruptions, "BATCH", 2)
    found = corrupt(photos[:1].expand(3, -1, -1, -1), name, 5)
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[1], found[2])


@pytest.mark.parametrize(
    "name", ["gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "pixelate", "elastic_transform", "contrast"]
)
def test_what_only_moves_pixels_leaves_an_image_of_one_color(name: str) -> None:
    plain = torch.tensor([200, 30, 90], dtype=torch.uint8)[None, :, None, None].expand(2, 3, 32, 32)
    assert torch.equal(corrupt(plain, name, 5), plain)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur_is_scipys(photos: Tensor, severity: int) -> None:
    sigma = strength("gaussian_blur", severity)
    expected = gaussian_filter(photos.double().numpy(), sigma, axes=(2, 3), mode="mirror", truncate=6)
    assert np.abs(corrupt(photos, "gaussian_blur", severity).numpy() - expected).max() < 0.51


@pytest.mark.parametrize("name", ["brightness", "saturate"])
def test_brightness_and_saturation_are_those_of_hsv(name: str, photos: Tensor) -> None:
    found = corrupt(photos[:2], name, 3).permute(0, 2, 3, 1).reshape(-1, 3)
    for pixel, changed in zip(photos[:2].permute(0, 2, 3, 1).reshape(-1, 3), found, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255).tolist())
        expected = (
            (h, s, min(1, v + strength(name, 3))) if name == "brightness" else (h, min(1, s * strength(name, 3)), v)
        )
        assert changed.tolist() == pytest.approx([255 * c for c in colorsys.hsv_to_rgb(*expected)], abs=0.51)


@pytest.mark.parametrize("value", [0, 120])
def test_gray_stays_gray(value: int) -> None:
    gray = torch.full((1, 3, 32, 32), value, dtype=torch.uint8)
    assert torch.equal(corrupt(gray, "saturate", 5), gray)
    assert corrupt(gray, "brightness", 5).unique().tolist() == pytest.approx([value + 255 * 0.3], abs=0.51)


def test_noise_has_the_strength_that_is_said() -> None:
    gray = torch.full((40, 3, 32, 32), 102, dtype=torch.uint8)
    added = corrupt(gray, "gaussian_noise", 5).float() / 255 - 0.4
    assert float(added.mean()) == pytest.approx(0, abs=2e-3) and float(added.std()) == pytest.approx(0.1, rel=0.02)
    shot = corrupt(gray, "shot_noise", 5).float() / 255
    assert float(shot.mean()) == pytest.approx(0.4, abs=2e-3)
    assert float(shot.std()) == pytest.approx((0.4 / 50) ** 0.5, rel=0.02)
    salted = corrupt(gray, "impulse_noise", 5)
    assert float((salted == 0).float().mean()) == pytest.approx(0.035, rel=0.1)
    assert float((salted == 255).float().mean()) == pytest.approx(0.035, rel=0.1)


def test_defocus_smears_a_point_over_a_disk_of_its_radius() -> None:
    point = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    point[:, :, 16, 16] = 255
    radius = strength("defocus_blur", 5)
    lit = corrupt(point, "defocus_blur", 5)[0, 0].float()
    y, x = torch.meshgrid(torch.arange(32) - 16, torch.arange(32) - 16, indexing="ij")
    assert torch.all(lit[(x**2 + y**2).sqrt() > radius + 0.71] == 0)
    assert float(lit[16, 16]) / 255 == pytest.approx(1 / (np.pi * radius**2), rel=0.03)
    assert torch.equal(lit[1:, 1:], lit[1:, 1:].T) and torch.equal(lit[1:, 1:], lit[1:, 1:].flip(0))


def test_motion_smears_a_point_along_a_line_at_most_45_degrees_from_level() -> None:
    points = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    points[:, :, 16, 8] = 255
    lit = corrupt(points, "motion_blur", 5)[:, 0].float()
    weights = lit / lit.sum((1, 2), keepdim=True)
    columns, rows = torch.arange(32) - 8, torch.arange(32)[:, None] - 16
    right, down = (weights * columns).sum((1, 2)), (weights * rows).sum((1, 2))
    assert torch.all(right.abs() + 0.2 > down.abs()) and torch.all(right.abs() > 0.8)
    assert down.min() < -0.5 and down.max() > 0.5, "each image has an angle of its own"


def test_zooming_in_is_about_the_middle(photos: Tensor) -> None:
    turned = corrupt(photos.flip(-1).flip(-2), "zoom_blur", 5).flip(-1).flip(-2)
    assert int((turned.int() - corrupt(photos, "zoom_blur", 5).int()).abs().max()) <= 1
    # What lies at the border is carried out of the image, what lies within spreads towards it.
    ring = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    ring[:, :, 8:24, 8:24] = 255
    assert int(corrupt(ring, "zoom_blur", 5)[0, 0, 16, 6]) > 0 == int(corrupt(ring, "zoom_blur", 5)[0, 0, 16, 2])


def test_pixelate_shows_the_mean_of_the_area_that_each_square_covers(photos: Tensor) -> None:
    fine = photos.double().repeat_interleave(3, 2).repeat_interleave(3, 3)  # three quarters of 32 are 24, of 4 by 4
    squares = torch.nn.functional.avg_pool2d(fine, 4)
    nearest = ((torch.arange(32) + 0.5) * 24 / 32).long()
    expected = squares[:, :, nearest][..., nearest]
    assert float((corrupt(photos, "pixelate", 4) - expected).abs().max()) < 0.51


def test_fog_keeps_the_largest_value_as_the_limit(photos: Tensor) -> None:
    dim = photos // 2
    assert torch.all(corrupt(dim, "fog", 5).amax((1, 2, 3)) <= dim.amax((1, 2, 3)))


@pytest.mark.parametrize(
    ("name", "severity", "said"),
    [
        ("fogg", 1, r"corruptions: 'fogg'; did you mean fog\? Legal: all, gaussian_noise"),
        ("fog", 0, r"severity: 0. Legal: 1, 2, 3, 4, 5"),
        ("fog", 6, r"severity: 6. Legal: 1, 2, 3, 4, 5"),
    ],
)
def test_what_there_is_not_is_refused(name: str, severity: int, said: str, photos: Tensor) -> None:
    with pytest.raises(InputError, match=said):
        corrupt(photos, name, severity)
