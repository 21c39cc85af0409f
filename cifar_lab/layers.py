"""What the architectures are made of: activations, initialisation, the class they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU}
Activation = Literal["relu", "leaky_relu", "elu", "gelu"]
Init = Literal["default", "xavier", "kaiming"]


class WeightsError(ValueError):
    """Weights to start from are absent, unreadable, or of another network."""


class Network(nn.Module):
    """An architecture: images (N, 3, 32, 32) float, normalised, to logits (N, num_classes)."""

    RECIPE: ClassVar[dict[str, Any]] = {}
    LEGAL: ClassVar[dict[str, tuple[str, Callable[[Any], bool]]]] = {}
    CHANNELS_LAST: ClassVar[bool] = True  # the memory format that was the faster one when measured

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def start(self) -> None:
        """What a fresh training begins from beyond random weights; not called when a checkpoint is loaded.

        Raises:
            WeightsError: what it should begin from cannot be had.
        """


def memory_format(network: Network) -> torch.memory_format:
    """channels_last for a network that gains by it, where that is safe; contiguous otherwise.

    With channels that do not fill a vector register the CPU's kernels for channels_last corrupt memory: a ResNet of
    width 4 crashes (torch 2.15, AVX2). 16 floats fill the widest register.
    """
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    full = all(layer.out_channels % 16 == 0 for layer in convolutions)
    return torch.channels_last if network.CHANNELS_LAST and full else torch.contiguous_format


AT_LEAST_ONE = ("1 or more", lambda v: v >= 1)
DROPOUT = ("from 0 up to but not including 1", lambda v: 0 <= v < 1)


def initialise(network: nn.Module, init: Init, kinds: tuple[type[nn.Module], ...]) -> None:
    """Draw the weights of all layers of `kinds` anew, biases zero; "default" leaves PyTorch's own.

    Source: Glorot and Bengio 2010 (xavier), He et al. 2015 (kaiming).
    """
    draw = {"xavier": nn.init.xavier_uniform_, "kaiming": nn.init.kaiming_normal_}.get(init)
    if draw is None:
        return
    for layer in network.modules():
        if isinstance(layer, kinds):
            draw(layer.weight)  # type: ignore[operator]
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
