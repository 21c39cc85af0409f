"""Wide CNN: five convolutions, each doubling the channels and halving the map, then a global average."""

from __future__ import annotations

from torch import Tensor, nn

from cifar_lab.layers import ACTIVATIONS, AT_LEAST_ONE, DROPOUT, Activation, Conv2d, Network

__all__ = ["WideCNN"]


class WideCNN(Network):
    """Convolutions 3-64-128-256-512-1024 of 3x3, each with batch norm, max-pool and dropout; 6,284,810 parameters.

    Images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        num_classes: logits.
        depth: convolutions; five halve the map to 1x1, so that the global average then has nothing to do.
        width: channels of the first convolution; each further one has twice as many.
        dropout: dropout after each convolution's pooling, fraction.
        activation: non-linearity.

    Source: study 000, "wide CNN". Unstated there, and taken: kernels of 3x3; convolution, batch norm, activation,
    max-pool, dropout in this order; a dropout of .1; rotations up to 15 degrees.
    """

    RECIPE = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "rotate": 15.0, "batch_size": 50}
    LEGAL = {"depth": ("1 to 5", lambda v: 1 <= v <= 5), "width": AT_LEAST_ONE, "dropout": DROPOUT}

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 5,
        width: int = 64,
        dropout: float = 0.1,
        activation: Activation = "relu",
    ) -> None:
        super().__init__(num_classes)
        act = ACTIVATIONS[activation]
        self.convolutions = nn.Sequential()
        channels = 3
        for i in range(depth):
            out = width * 2**i
            self.convolutions.extend(
                [
                    Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), act(),
                    nn.MaxPool2d(2), nn.Dropout(dropout),
                ]
            )  # fmt: skip
            channels = out
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.convolutions(images).mean((2, 3)))
        return logits
