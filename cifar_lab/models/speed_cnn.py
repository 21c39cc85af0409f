"""Speed CNN: whitened patches, then three groups of convolutions, to be trained in minutes."""

from __future__ import annotations

import re
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_lab.layers import ACTIVATIONS, Activation, Conv3x3, Network

__all__ = ["SpeedCNN"]

PATCH = 3  # pixels
DIRECTIONS = 16  # of the 27 that a patch has: with both signs a multiple of 16 channels, which memory_format asks for
WHITENING_EPS = 5e-4  # variance that a direction is taken to have besides its own
NORM_MOMENTUM = 0.2  # share of a batch in the running statistics: few steps are trained
LOGIT_SCALE = 16  # over the channels of the last group: a step of the head moves the logits alike at any width


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with a bias and without a scale."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=NORM_MOMENTUM, affine=False)
        self.bias = nn.Parameter(torch.zeros(channels))


def convolution(channels: int, out: int, padding: int = 1) -> Conv3x3:
    """A 3x3 convolution whose first filters hand their input on."""
    made = Conv3x3(channels, out, padding)
    nn.init.dirac_(made.weight.data[:channels])
    return made


class Group(nn.Module):
    """A convolution that halves the map by max-pooling, then one that keeps it, or a residual block of two."""

    def __init__(self, channels: int, out: int, depth: int, act: type[nn.Module], padding: int) -> None:
        super().__init__()
        self.halving = nn.Sequential(convolution(channels, out, padding), nn.MaxPool2d(2), BatchNorm(out), act())
        self.keeping = nn.Sequential(convolution(out, out), BatchNorm(out))
        for _ in range(depth - 2):
            self.keeping.extend([act(), convolution(out, out), BatchNorm(out)])
        self.residual = depth > 2
        self.activation = act()

    def forward(self, x: Tensor) -> Tensor:
        x = self.halving(x)
        kept = self.keeping(x)
        out: Tensor = self.activation(kept + x if self.residual else kept)
        return out


class SpeedCNN(Network):
    """A fixed whitening convolution and three groups of 3x3 convolutions; 1,975,968 parameters for 10 classes.

    Images (N, 3, 32, 32) to logits (N, num_classes). The first layer's filters are the directions in which the 3x3
    patches of the training images vary most, scaled to variance 1, each with both signs; only its bias is trained.

    Args:
        num_classes: logits.
        widths: channels of the three groups; multiples of 16 are fast.
        depth: convolutions of a group; with 3 the last two are a residual block.
        activation: non-linearity.

    Source: Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498), airbench94 and, with
    widths 128,384,512 and depth 3, airbench96; after Page 2018 (whitening) and tysam-code's hlb-CIFAR10. Deviations:
    patches of 3x3 instead of 2x2, of which the leading 16 directions are taken; no padding in the first group's first
    convolution; the bias of the whitening is trained to
    the end; the scale of the logits; batches of 500 with an lr and a momentum to match; Adam in place of SGD for what
    is no filter; black padding before the crop.
    """

    RECIPE = {
        "optimizer": "muon", "lr": 0.12, "momentum": 0.85, "weight_decay": 0.05, "schedule": "linear",
        "batch_size": 500, "max_epochs": 8, "label_smoothing": 0.2, "crop": 2, "flip": "alternating",
    }  # fmt: skip
    LEGAL = {
        "widths": (
            "three whole numbers above 0 with commas, such as 64,256,256",
            lambda v: re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3}){2}", v) is not None,
        ),
    }

    whitening: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        widths: str = "64,256,256",
        depth: Literal[2, 3] = 2,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__(num_classes)
        act = ACTIVATIONS[activation]
        # Until `start` has seen images its directions are random ones.
        directions = nn.init.orthogonal_(torch.empty(DIRECTIONS, 3 * PATCH**2)).view(-1, 3, PATCH, PATCH)
        self.register_buffer("whitening", torch.cat([directions, -directions]))
        self.whitening_bias = nn.Parameter(torch.zeros(2 * DIRECTIONS))
        self.activation = act()
        self.groups = nn.Sequential()
        channels = 2 * DIRECTIONS
        for i, width in enumerate(map(int, widths.split(","))):
            # A map of 30 pixels becomes one of 28, which is halved twice without a rest.
            self.groups.append(Group(channels, width, depth, act, padding=int(i > 0)))
            channels = width
        self.groups.append(nn.MaxPool2d(3))
        self.head = nn.Linear(channels, num_classes, bias=False)

    def start(self, images: Tensor) -> None:
        patches = F.unfold(images, PATCH).transpose(0, 1).flatten(1)
        variances, directions = torch.linalg.eigh(torch.cov(patches))  # the smallest first
        scaled = (directions / (variances.clamp_min(0) + WHITENING_EPS).sqrt()).T.flip(0)[:DIRECTIONS]
        self.whitening.copy_(torch.cat([scaled, -scaled]).view_as(self.whitening))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.activation(F.conv2d(images, self.whitening, self.whitening_bias))
        logits: Tensor = self.head(self.groups(patches).flatten(1)) * (LOGIT_SCALE / self.head.in_features)
        return logits
