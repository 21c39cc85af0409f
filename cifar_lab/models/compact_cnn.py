"""Compact CNN: two convolutions with max-pooling, flattened into one linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cifar_lab.layers import ACTIVATIONS, AT_LEAST_ONE, DROPOUT, Activation, Network

__all__ = ["CompactCNN"]


class CompactCNN(Network):
    """32 channels of 5x5, then 32 of 3x3, unpadded, each max-pooled, then logits; 23,210 parameters.

    Images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        num_classes: logits.
        depth: convolutions; those beyond two are 3x3, padded and not pooled.
        width: channels of each convolution.
        dropout: dropout before the linear layer, fraction.
        activation: non-linearity after each convolution.

    Source: study 000, "base CNN", about 23,000 parameters. Its widths and kernels are unstated; these come near.
    """

    RECIPE = {
        "optimizer": "adam", "lr": 2e-3, "weight_decay": 0.0, "batch_size": 50, "max_epochs": 10, "augment": False,
    }  # fmt: skip
    LEGAL = {"depth": ("2 to 6", lambda v: 2 <= v <= 6), "width": AT_LEAST_ONE, "dropout": DROPOUT}

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 2,
        width: int = 32,
        dropout: float = 0.0,
        activation: Activation = "relu",
    ) -> None:
        super().__init__(num_classes)
        act = ACTIVATIONS[activation]
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, width, 5), act(), nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3), act(), nn.MaxPool2d(2),
        )  # fmt: skip
        for _ in range(depth - 2):
            self.convolutions.extend([nn.Conv2d(width, width, 3, padding=1), act()])
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width * 6 * 6, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.flatten(self.convolutions(images), 1))
        return logits
