"""Three-layer CNN: two convolutions with max-pooling and one hidden dense layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cifar_lab.layers import ACTIVATIONS, AT_LEAST_ONE, DROPOUT, Activation, Init, Network, initialise

__all__ = ["ThreeLayerCNN"]

KERNEL = ("odd, 1 to 31", lambda v: v % 2 == 1 and 1 <= v <= 31)


class ThreeLayerCNN(Network):
    """32 channels of 3x3, then 128 of 5x5, each max-pooled, then dense 128, logits; 1,153,418 parameters.

    Images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        num_classes: logits.
        channels1: channels of the first convolution.
        kernel1: side of its kernel, pixels, padded to keep the map's size.
        channels2: channels of the second convolution.
        kernel2: side of its kernel, pixels, padded to keep the map's size.
        hidden: width of the hidden dense layer.
        batch_norm: whether each convolution is followed by batch norm.
        dropout: dropout after the hidden dense layer, fraction.
        activation: non-linearity after each convolution and the hidden dense layer.
        init: initialisation of convolutions and dense layers.

    Source: study 002. Unstated there, and taken: a hidden layer of 128, Adam, batches of 40 before the batch size is
    studied. Deviations: options for dropout, activation and initialisation.
    """

    CHANNELS_LAST = False
    RECIPE = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "batch_size": 40, "augment": False}
    LEGAL = {
        "channels1": AT_LEAST_ONE, "kernel1": KERNEL, "channels2": AT_LEAST_ONE, "kernel2": KERNEL,
        "hidden": AT_LEAST_ONE, "dropout": DROPOUT,
    }  # fmt: skip

    def __init__(
        self,
        num_classes: int,
        *,
        channels1: int = 32,
        kernel1: int = 3,
        channels2: int = 128,
        kernel2: int = 5,
        hidden: int = 128,
        batch_norm: bool = False,
        dropout: float = 0.0,
        activation: Activation = "relu",
        init: Init = "default",
    ) -> None:
        super().__init__(num_classes)
        act = ACTIVATIONS[activation]
        self.convolutions = nn.Sequential()
        channels = 3
        for out, kernel in ((channels1, kernel1), (channels2, kernel2)):
            self.convolutions.append(nn.Conv2d(channels, out, kernel, padding="same"))
            if batch_norm:
                self.convolutions.append(nn.BatchNorm2d(out))
            self.convolutions.extend([act(), nn.MaxPool2d(2)])
            channels = out
        self.head = nn.Sequential(
            nn.Linear(channels * 8 * 8, hidden), act(), nn.Dropout(dropout), nn.Linear(hidden, num_classes)
        )
        initialise(self, init, (nn.Conv2d, nn.Linear))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.flatten(self.convolutions(images), 1))
        return logits
