"""NF-ResNet: residual stages without a normaliser, whose variance is kept by arithmetic, then one dense layer."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from cifar_lab.layers import DROPOUT, Conv2d, Network, initialise

__all__ = ["NFResNet"]

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
BOTTLENECK_FROM = 50
GAMMA = math.sqrt(2 / (1 - 1 / math.pi))  # 1 / the standard deviation of relu(x), x standard normal


class ScaledConv2d(Conv2d):
    """A convolution with scaled weight standardization: each output channel's weights have mean 0, variance 1/fan_in.

    A learned gain a channel, from 1, scales them.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, padding=kernel // 2)
        self.gain = nn.Parameter(torch.ones(out))

    def standardized(self) -> Tensor:
        """The weights (out, channels, kernel, kernel) that convolve."""
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        fan_in = self.weight[0].numel()
        scale = self.gain[:, None, None, None] * torch.rsqrt((variance * fan_in).clamp_min(1e-4))
        return (self.weight - mean) * scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x, self.standardized(), self.bias)
        return out


class ScaledReLU(nn.ReLU):
    """ReLU times GAMMA: of a standard normal input the output has variance 1, though not mean 0."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * GAMMA


class Block(nn.Module):
    """h + alpha * gain * f(h / beta), f beginning with the activation; beta is the standard deviation expected of h.

    Where the shape changes, a 1x1 convolution of the activated input replaces h: its variance is 1 again.
    """

    def __init__(
        self, channels: int, inner: int, out: int, stride: int, bottleneck: bool, alpha: float, beta: float
    ) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        plan = (
            [(channels, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1)]
            if bottleneck
            else [(channels, inner, 3, stride), (inner, out, 3, 1)]
        )
        self.activation = ScaledReLU()
        self.residual = nn.Sequential()
        for i, (cin, cout, kernel, step) in enumerate(plan):
            if i:
                self.residual.append(ScaledReLU())
            self.residual.append(ScaledConv2d(cin, cout, kernel, step))
        self.shortcut = ScaledConv2d(channels, out, 1, stride) if stride != 1 or channels != out else None
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, h: Tensor) -> Tensor:
        x = self.activation(h / self.beta)
        kept = h if self.shortcut is None else self.shortcut(x)
        out: Tensor = kept + self.alpha * self.gain * self.residual(x)
        return out


class NFResNet(Network):
    """ResNet of four stages without normalisers; at depth 18 and width 64 it has 11,173,970 parameters for 10 classes.

    That is ResNet's count, a gain and a bias a channel in place of batch norm's two, and one more gain a block.
    Images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        num_classes: logits.
        depth: layers, 18, 34 or 50; bottleneck blocks from 50.
        width: channels of the first stage; each further stage has twice as many.
        alpha: what each block's residual is scaled by: its variance grows by the square of it.
        dropout: dropout before the dense layer, fraction.

    Source: Brock, De and Smith 2021, "Characterizing signal propagation to close the performance gap in unnormalized
    ResNets" (arXiv 2101.08692). Deviations: a 3x3 stem of stride 1 without pooling; the learned gain of a residual
    (SkipInit) begins at 1, not 0, so that the betas hold, and gradients flow, from the first step; weight decay acts on
    gains and biases too; no stochastic depth. Adaptive gradient clipping comes from its sequel (arXiv 2102.06171).
    """

    RECIPE = {"lr": 0.05, "weight_decay": 5e-4, "schedule": "cosine", "batch_size": 128, "agc": 0.01}
    LEGAL = {
        "width": ("2 or more (one weight cannot be standardized)", lambda v: v >= 2),
        "alpha": ("more than 0", lambda v: v > 0),
        "dropout": DROPOUT,
    }

    def __init__(
        self,
        num_classes: int,
        *,
        depth: Literal[18, 34, 50] = 18,
        width: int = 64,
        alpha: float = 0.2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_classes)
        self.stem = ScaledConv2d(3, width, 3)
        bottleneck = depth >= BOTTLENECK_FROM
        self.stages = nn.Sequential()
        channels, variance = width, 1.0
        for stage, blocks in enumerate(BLOCKS[depth]):
            inner = width * 2**stage
            out = inner * 4 if bottleneck else inner
            for i in range(blocks):
                step = 2 if stage > 0 and i == 0 else 1
                block = Block(channels, inner, out, step, bottleneck, alpha, beta=math.sqrt(variance))
                self.stages.append(block)
                variance = (variance if block.shortcut is None else 1) + alpha**2
                channels = out
        self.activation = ScaledReLU()
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        initialise(self, "kaiming", (nn.Conv2d,))

    def forward(self, images: Tensor) -> Tensor:
        features = self.activation(self.stages(self.stem(images))).mean((2, 3))
        logits: Tensor = self.head(features)
        return logits
