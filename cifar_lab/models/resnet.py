"""ResNet: residual stages with batch norm, then one dense layer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cifar_lab.layers import ACTIVATIONS, AT_LEAST_ONE, DROPOUT, Activation, Conv2d, Network, initialise

__all__ = ["ResNet"]

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BOTTLENECK_FROM = 50


class Block(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3, 1x1, beside a shortcut."""

    def __init__(
        self, channels: int, inner: int, out: int, stride: int, bottleneck: bool, act: type[nn.Module]
    ) -> None:
        super().__init__()
        plan = (
            [(channels, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1)]
            if bottleneck
            else [(channels, inner, 3, stride), (inner, out, 3, 1)]
        )
        layers: list[nn.Module] = []
        for cin, cout, kernel, step in plan:
            layers += [Conv2d(cin, cout, kernel, step, padding=kernel // 2, bias=False), nn.BatchNorm2d(cout), act()]
        self.residual = nn.Sequential(*layers[:-1])
        self.activation = act()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.residual(x) + self.shortcut(x))
        return out


class ResNet(Network):
    """Residual network of four stages; at depth 18 and width 64 it has 11,173,962 parameters for 10 classes.

    Images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        num_classes: logits.
        depth: layers, 18, 34, 50 or 101; bottleneck blocks from 50.
        width: channels of the first stage; each further stage has twice as many.
        stem: cifar (3x3, stride 1, no pooling) or imagenet (7x7, stride 2, max-pool: a 32x32 image becomes 8x8).
        dropout: dropout before the dense layer, fraction.
        activation: non-linearity.

    Source: He et al. 2015, "Deep Residual Learning for Image Recognition". Deviations: the stem above, dropout; the
    stride of a bottleneck sits on its 3x3 convolution, as in torchvision.
    """

    RECIPE = {"lr": 0.05, "weight_decay": 5e-4, "schedule": "cosine", "batch_size": 128}
    LEGAL = {"width": AT_LEAST_ONE, "dropout": DROPOUT}

    def __init__(
        self,
        num_classes: int,
        *,
        depth: Literal[18, 34, 50, 101] = 18,
        width: int = 64,
        stem: Literal["cifar", "imagenet"] = "cifar",
        dropout: float = 0.0,
        activation: Activation = "relu",
    ) -> None:
        super().__init__(num_classes)
        act = ACTIVATIONS[activation]
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.stem = nn.Sequential(
            Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(width), act()
        )
        if stem == "imagenet":
            self.stem.append(nn.MaxPool2d(3, 2, padding=1))
        bottleneck = depth >= BOTTLENECK_FROM
        self.stages = nn.Sequential()
        channels = width
        for stage, blocks in enumerate(BLOCKS[depth]):
            inner = width * 2**stage
            out = inner * 4 if bottleneck else inner
            for i in range(blocks):
                step = 2 if stage > 0 and i == 0 else 1
                self.stages.append(Block(channels, inner, out, step, bottleneck, act))
                channels = out
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        initialise(self, "kaiming", (nn.Conv2d,))

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(self.stem(images)).mean((2, 3))
        logits: Tensor = self.head(torch.flatten(features, 1))
        return logits
