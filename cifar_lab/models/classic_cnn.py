"""Classic CNN: two convolutions with max-pooling, then three dense layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cifar_lab.layers import ACTIVATIONS, AT_LEAST_ONE, DROPOUT, Activation, Init, Network, initialise

__all__ = ["ClassicCNN"]


class ClassicCNN(Network):
    """LeNet for colour: 6 and 16 channels of 5x5, each max-pooled, then dense 120, 84, logits; 62,006 parameters.

    Images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        num_classes: logits.
        depth: convolutions; beyond two, each is 3x3, padded and not pooled, with twice the channels of the one before.
        width: channels of the first convolution; the others keep their proportion.
        dropout: dropout after each of the two hidden dense layers, fraction.
        batch_norm: whether each convolution is followed by batch norm.
        activation: non-linearity after each convolution and each hidden dense layer.
        init: initialisation of the dense layers.

    Source: LeCun et al. 1998, as in the PyTorch tutorial "Training a classifier". Deviations: options for dropout,
    batch norm, Xavier initialisation and more convolutions.
    """

    CHANNELS_LAST = False
    RECIPE = {"lr": 0.01, "weight_decay": 1e-3, "rotate": 15.0}
    LEGAL = {"depth": ("2 to 6", lambda v: 2 <= v <= 6), "width": AT_LEAST_ONE, "dropout": DROPOUT}

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 2,
        width: int = 6,
        dropout: float = 0.0,
        batch_norm: bool = False,
        activation: Activation = "relu",
        init: Init = "default",
    ) -> None:
        super().__init__(num_classes)
        act = ACTIVATIONS[activation]
        convolutions: list[nn.Module] = []
        channels = 3
        for i in range(depth):
            out = width if i == 0 else round(width * 16 / 6) * 2 ** (i - 1)
            convolutions.append(nn.Conv2d(channels, out, 5) if i < 2 else nn.Conv2d(channels, out, 3, padding=1))
            if batch_norm:
                convolutions.append(nn.BatchNorm2d(out))
            convolutions.append(act())
            if i < 2:
                convolutions.append(nn.MaxPool2d(2))
            channels = out
        self.convolutions = nn.Sequential(*convolutions)
        self.head = nn.Sequential(
            nn.Linear(channels * 5 * 5, 120), act(), nn.Dropout(dropout),
            nn.Linear(120, 84), act(), nn.Dropout(dropout),
            nn.Linear(84, num_classes),
        )  # fmt: skip
        initialise(self, init, (nn.Linear,))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.flatten(self.convolutions(images), 1))
        return logits
