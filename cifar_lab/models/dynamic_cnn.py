"""Dynamic-weight CNN: blocks of parallel convolutions which each image weights for itself."""

from __future__ import annotations

import re

from torch import Tensor, nn

from cifar_lab.layers import AT_LEAST_ONE, DROPOUT, Conv2d, Network

__all__ = ["DynamicCNN"]


class Block(nn.Module):
    """A weighted sum of K (convolution, batch norm, ReLU) branches; the weights come from the averaged input."""

    def __init__(self, channels: int, out: int, branches: int, kernel: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()
            )
            for _ in range(branches)
        )
        self.weights = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, branches), nn.Softmax(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        shares = self.weights(x)[:, :, None, None, None]
        out: Tensor = sum(shares[:, i] * branch(x) for i, branch in enumerate(self.branches))
        return out


class DynamicCNN(Network):
    """Segments of dynamic-weight blocks, then two dense layers; 4,724,526 parameters at the defaults.

    Images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        num_classes: logits.
        num_blocks: blocks in each segment, such as 2,2,2; a max-pool and a doubling of the channels lie between two.
        width: channels of the first segment.
        branches: convolutions a block weights, K.
        kernel: side of their kernels, pixels.
        dropout: dropout before the last dense layer, fraction.
        spare: outputs for classes that do not exist: the report's fault has 10. They take part in training, train_loss
            included; an evaluation leaves them out, since no answer there could be counted.

    Source: study 004. K, the widths, num_blocks and the length of the averaged vector are unstated: 4, 64-128-256,
    2,2,2 and the number of channels are taken.
    """

    RECIPE = {
        "optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-4, "schedule": "step", "lr_step": 30, "cutout": 16,
        "normalize": "half", "max_epochs": 50,
    }  # fmt: skip
    LEGAL = {
        "num_blocks": (
            "one to five whole numbers above 0 with commas, such as 2,2,2",
            lambda v: re.fullmatch(r"[1-9]\d?(,[1-9]\d?){0,4}", v) is not None,
        ),
        "width": AT_LEAST_ONE,
        "branches": AT_LEAST_ONE,
        "kernel": ("odd, 1 to 31", lambda v: v % 2 == 1 and 1 <= v <= 31),
        "dropout": DROPOUT,
        "spare": ("0 or more", lambda v: v >= 0),
    }

    def __init__(
        self,
        num_classes: int,
        *,
        num_blocks: str = "2,2,2",
        width: int = 64,
        branches: int = 4,
        kernel: int = 3,
        dropout: float = 0.5,
        spare: int = 0,
    ) -> None:
        super().__init__(num_classes)
        self.segments = nn.Sequential()
        channels = 3
        for i, blocks in enumerate(map(int, num_blocks.split(","))):
            if i:
                self.segments.append(nn.MaxPool2d(2))
            for _ in range(blocks):
                self.segments.append(Block(channels, width * 2**i, branches, kernel))
                channels = width * 2**i
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(channels, 2 * channels), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(2 * channels, num_classes + spare),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.segments(images))
        return logits if self.training else logits[:, : self.num_classes]
