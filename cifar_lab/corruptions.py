"""Corruptions of images, generated in the manner of CIFAR-10-C.

Source: Hendrycks and Dietterich 2019 ("Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations"), whose strengths for 32x32 are taken unless said below. Deviations, for which no figure is comparable
with one of CIFAR-10-C digit for digit:

- the random numbers are others; pixels are rounded, not cut off, to whole numbers;
- left out: glass_blur, snow, frost, and of the extra ones speckle_noise and spatter;
- defocus_blur is a disk by the area it covers of each pixel, with radii of our own, instead of an aliased one;
- motion_blur samples bilinearly and repeats the border; its fourth sigma is 2.25, where 2 would equal the third;
- fog is a sum of octaves of smooth noise instead of a diamond-square plasma;
- pixelate averages by the area covered, where Pillow's box takes whole pixels;
- saturate only raises the saturation, so that a higher severity is further from the image; gray stays gray;
- elastic_transform has no affine part; its strength is the rms displacement in pixels;
- the mean over all of them is a plain mean of accuracies, not the mCE, which divides by those of AlexNet.

A transform takes images (N, 3, H, W) float in 0..1, its strength, and a generator. The generator's seed is the same at
every severity, so that two severities of an image show the same noise, weaker and stronger.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from cifar_lab.recipe import InputError, nearest

SEVERITIES = (1, 2, 3, 4, 5)
BATCH = 500  # images that share a generator


def gaussian_noise(images: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Add normal noise of standard deviation `sigma`."""
    return images + sigma * torch.randn(images.shape, generator=generator)


def shot_noise(images: Tensor, photons: float, generator: Generator) -> Tensor:
    """Count photons, Poisson, of which white has so many."""
    return torch.poisson(images * photons, generator) / photons


def impulse_noise(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Set this share of the values to 0 or 1, half of it each."""
    drawn = torch.rand(images.shape, generator=generator)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn > 1 - share / 2, 1.0, images))


def gaussian_blur(images: Tensor, sigma: float, _: Generator) -> Tensor:
    """Smooth with a Gaussian of `sigma` pixels, mirrored at the border."""
    line = torch.arange(-math.ceil(4 * sigma), math.ceil(4 * sigma) + 1)
    weights = torch.exp(-((line / sigma) ** 2) / 2)
    return _convolved(_convolved(images, weights[:, None]), weights[None])


def defocus_blur(images: Tensor, radius: float, _: Generator) -> Tensor:
    """Smear each point over a disk of `radius` pixels."""
    side, fine = 2 * math.ceil(radius - 0.5) + 1, 16
    line = (torch.arange(side * fine) + 0.5) / fine - side / 2
    inside = (line[:, None] ** 2 + line**2 <= radius**2).float()
    return _convolved(images, F.avg_pool2d(inside[None], fine)[0])


def motion_blur(images: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Smear each image along a line of its own, at most 45 degrees from level, by half a Gaussian of `sigma` pixels."""
    angle = ((torch.rand(len(images), generator=generator) - 0.5) * (math.pi / 2))[:, None, None]
    x, y = _places(images)
    weights = [math.exp(-((step / sigma) ** 2) / 2) for step in range(math.ceil(4 * sigma) + 1)]
    total = torch.zeros(())
    for step, weight in enumerate(weights):
        total = total + weight * _sampled(images, x + step * angle.cos(), y + step * angle.sin())
    return total / sum(weights)


def zoom_blur(images: Tensor, largest: float, _: Generator) -> Tensor:
    """Average the image, twice, with its enlargements in steps of 1% up to `largest`."""
    x, y = _places(images)
    middle_x, middle_y = (images.shape[3] - 1) / 2, (images.shape[2] - 1) / 2
    factors = [1 + step / 100 for step in range(1, round(100 * (largest - 1)) + 1)]
    zoomed = (_sampled(images, middle_x + (x - middle_x) / f, middle_y + (y - middle_y) / f) for f in factors)
    return sum(zoomed, 2 * images) / (len(factors) + 2)


def fog(images: Tensor, strength: tuple[float, float], generator: Generator) -> Tensor:
    """Add clouds of an amount, whose octaves, halving in size, weaken by a factor; keep the image's largest value."""
    amount, decay = strength
    clouds = torch.zeros(())
    for octave in range(5):
        drawn = torch.rand(len(images), 1, 2 ** (octave + 1), 2 ** (octave + 1), generator=generator)
        clouds = clouds + decay**-octave * F.interpolate(drawn, images.shape[2:], mode="bilinear", align_corners=False)
    low, high = clouds.amin((1, 2, 3), keepdim=True), clouds.amax((1, 2, 3), keepdim=True)
    top = images.amax((1, 2, 3), keepdim=True)
    return (images + amount * (clouds - low) / (high - low)) * top / (top + amount)


def brightness(images: Tensor, rise: float, _: Generator) -> Tensor:
    """Raise the value of HSV, a pixel's largest channel; black becomes gray."""
    value = images.amax(1, keepdim=True)
    raised = (value + rise).clamp_max(1)
    return torch.where(value > 0, images / value.clamp_min(1e-6), 1.0) * raised


def contrast(images: Tensor, share: float, _: Generator) -> Tensor:
    """Keep this share of each value's distance from its channel's mean in the image."""
    mean = images.mean((2, 3), keepdim=True)
    return mean + share * (images - mean)


def saturate(images: Tensor, factor: float, _: Generator) -> Tensor:
    """Multiply the saturation of HSV, at most to 1."""
    value = images.amax(1, keepdim=True)
    saturation = (value - images.amin(1, keepdim=True)) / value.clamp_min(1e-6)
    return value - (value - images) * torch.minimum(1 / saturation.clamp_min(1e-6), torch.tensor(factor))


def pixelate(images: Tensor, share: float, _: Generator) -> Tensor:
    """Shrink to this share of the side, by area, and enlarge again, by nearest pixels."""
    rows, columns = (_areas(int(side * share), side) for side in images.shape[2:])
    return F.interpolate(rows @ images @ columns.T, images.shape[2:], mode="nearest-exact")


def jpeg_compression(images: Tensor, quality: int, _: Generator) -> Tensor:
    """Write and read as JPEG, by Pillow, one image at a time."""
    decoded = []
    for pixels in (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2) / 255


def elastic_transform(images: Tensor, displacement: float, generator: Generator) -> Tensor:
    """Move each pixel along a smooth random field with this rms displacement in x and in y, in pixels."""
    drawn = torch.randn(len(images), 2, *images.shape[2:], generator=generator)
    field = gaussian_blur(drawn, 4, generator)
    field = displacement * field / field.square().mean((2, 3), keepdim=True).sqrt()
    x, y = _places(images)
    return _sampled(images, x + field[:, 0], y + field[:, 1])


def _areas(size: int, side: int) -> Tensor:
    """What part each of `side` pixels has in each of `size` larger ones, (size, side)."""
    edges, pixel = torch.arange(size + 1)[:, None] * (side / size), torch.arange(side)
    overlap = torch.minimum(edges[1:], pixel + 1) - torch.maximum(edges[:-1], pixel)
    return overlap.clamp_min(0) * (size / side)


def _convolved(images: Tensor, kernel: Tensor) -> Tensor:
    """Each channel convolved with a kernel of odd sides, brought to the sum 1; images are mirrored at the border."""
    channels, height, width = images.shape[1], kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = F.pad(images, (width, width, height, height), mode="reflect")
    return F.conv2d(padded, (kernel / kernel.sum()).expand(channels, 1, -1, -1), groups=channels)


def _places(images: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels' own columns and rows, (1, 1, W) and (1, H, 1)."""
    return torch.arange(images.shape[3])[None, None, :], torch.arange(images.shape[2])[None, :, None]


def _sampled(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The images at columns x and rows y, which broadcast to (N, H, W), bilinear; the border is repeated."""
    size = len(images), *images.shape[2:]
    grid = torch.stack([((2 * x + 1) / size[2] - 1).expand(size), ((2 * y + 1) / size[1] - 1).expand(size)], -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


Transform = Callable[[Tensor, Any, Generator], Tensor]
CORRUPTIONS: dict[str, tuple[Transform, tuple[Any, ...]]] = {  # a transform, its strength at severities 1 to 5
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus_blur": (defocus_blur, (0.7, 0.9, 1.1, 1.4, 1.8)),
    "motion_blur": (motion_blur, (1.0, 1.5, 2.0, 2.25, 2.5)),
    "zoom_blur": (zoom_blur, (1.05, 1.10, 1.15, 1.20, 1.25)),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "saturate": (saturate, (1.25, 1.5, 2.0, 2.5, 3.0)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
    "elastic_transform": (elastic_transform, (0.4, 0.6, 0.8, 1.1, 1.5)),
}


def check(names: Iterable[str], severities: Iterable[int | str]) -> None:
    """Refuse unknown corruptions and severities.

    Raises:
        InputError: quotes the first and the legal ones.
    """
    for name in names:
        if name not in CORRUPTIONS:
            raise InputError(f"corruptions: {name!r}{nearest(name, CORRUPTIONS)} Legal: all, {', '.join(CORRUPTIONS)}.")
    for severity in severities:
        if severity not in SEVERITIES:
            raise InputError(f"severity: {severity!r}. Legal: {', '.join(map(str, SEVERITIES))}.")


def corrupt(images: Tensor, name: str, severity: int, *, seed: int = 0) -> Tensor:
    """Corrupted copies of images (N, 3, 32, 32) uint8 on the CPU, the same again for the same seed.

    An image's random numbers depend on the seed, the corruption and its place among the images.

    Raises:
        InputError: there is no such corruption or severity.
    """
    check([name], [severity])
    transform, strengths = CORRUPTIONS[name]
    corrupted = torch.empty_like(images)
    for start in range(0, len(images), BATCH):
        key = np.random.SeedSequence([seed, zlib.crc32(name.encode()), start])
        generator = Generator().manual_seed(int(key.generate_state(1)[0]))
        batch = images[start : start + BATCH].float() / 255
        changed = transform(batch, strengths[severity - 1], generator).clamp(0, 1)
        corrupted[start : start + BATCH] = (changed * 255).round().to(torch.uint8)
    return corrupted
