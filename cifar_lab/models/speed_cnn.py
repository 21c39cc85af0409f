"""Speed CNN: whitened patches, then three groups of convolutions, to be trained in minutes."""

from __future__ import annotations

import re
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_lab.layers import ACTIVATIONS, Activation, Conv2d, Network, quicken

__all__ = ["SpeedCNN"]

PATCH = 2  # pixels
DIRECTIONS = 3 * PATCH**2
BIAS_EPOCHS = 3  # for which the whitening's bias is trained; then the largest maps need no gradient any more
WHITENING_EPS = 5e-4  # variance that a direction is taken to have besides its own
NORM_MOMENTUM = 0.2  # share of a batch in the running statistics: few steps are trained
BIAS_LR = 72**2  # of the biases over that of the head, under muon; airbench94_muon's .053 and .67 / 256**2
# Of the head's first weights: a standard deviation of 1/256 at any width, for the biases' rate wants logits that begin
# small; with 1/32 for a width of 32, as airbench's scale would have it, a training diverges.
HEAD_SPAN = 3**0.5 / 256


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with a bias and without a scale."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=NORM_MOMENTUM, affine=False)
        self.bias = quicken(nn.Parameter(torch.zeros(channels)), BIAS_LR)


def convolution(channels: int, out: int) -> Conv2d:
    """A 3x3 convolution whose first filters hand their input on."""
    made = Conv2d(channels, out, 3, padding=1, bias=False)
    nn.init.dirac_(made.weight.data[:channels])
    return made


class Group(nn.Module):
    """A convolution that halves the map by max-pooling, then one that keeps it, or a residual block of two."""

    def __init__(self, channels: int, out: int, depth: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.halving = nn.Sequential(convolution(channels, out), nn.MaxPool2d(2), BatchNorm(out), act())
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
    """A fixed whitening convolution and three groups of 3x3 convolutions; 1,971,352 parameters for 10 classes.

    Images (N, 3, 32, 32) to logits (N, num_classes). The first layer's filters are the principal directions of the
    2x2 patches of the training images, scaled to variance 1, each with both signs; only its bias is trained, and that
    for 3 epochs.

    Args:
        num_classes: logits.
        widths: channels of the three groups; multiples of 16 are fast.
        depth: convolutions of a group; with 3 the last two are a residual block.
        activation: non-linearity.

    The defaults are for tens of thousands of images; with fewer than 20,000 take a smaller `accumulate`.

    Source: Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498) and airbench94_muon; with
    widths 128,384,512 and depth 3 the network of airbench96; after Page 2018 (whitening) and tysam-code's hlb-CIFAR10.
    Deviations: a step's 2,000 images are eight batches, each with its own batch norm, which fit a CPU's cache, and
    running statistics that follow them faster; an epoch's last step may have fewer. The rate of the whitening's bias
    is that of the other biases, which does not fall to 0 within its 3 epochs; the patches' covariance is about their
    mean, and of 512 images instead of 5,000; batch norm's epsilon is PyTorch's 1e-5, not 1e-12.
    """

    RECIPE = {
        "optimizer": "muon", "lr": 0.24, "momentum": 0.6, "weight_decay": 0.2, "schedule": "linear",
        "batch_size": 250, "accumulate": 8, "max_epochs": 8, "label_smoothing": 0.2, "crop": 2,
        "crop_border": "reflect", "flip": "alternating",
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
        limit = DIRECTIONS**-0.5  # PyTorch's own for a bias, for a layer of that many inputs
        self.whitening_bias = quicken(nn.Parameter(torch.empty(2 * DIRECTIONS).uniform_(-limit, limit)), BIAS_LR)
        self.activation = act()
        self.groups = nn.Sequential()
        channels = 2 * DIRECTIONS
        for width in map(int, widths.split(",")):
            self.groups.append(Group(channels, width, depth, act))
            channels = width
        self.groups.append(nn.AdaptiveMaxPool2d(1))
        self.head = nn.Linear(channels, num_classes, bias=False)
        nn.init.uniform_(self.head.weight, -HEAD_SPAN, HEAD_SPAN)

    def start(self, images: Tensor) -> None:
        patches = F.unfold(images, PATCH).transpose(0, 1).flatten(1)
        variances, directions = torch.linalg.eigh(torch.cov(patches))
        scaled = (directions / (variances.clamp_min(0) + WHITENING_EPS).sqrt()).T
        self.whitening.copy_(torch.cat([scaled, -scaled]).view_as(self.whitening))

    def begin_epoch(self, epoch: int) -> None:
        self.whitening_bias.requires_grad_(epoch < BIAS_EPOCHS)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.activation(F.conv2d(images, self.whitening, self.whitening_bias))
        logits: Tensor = self.head(self.groups(patches).flatten(1))
        return logits
