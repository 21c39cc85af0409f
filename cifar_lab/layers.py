"""What the architectures are made of: activations, initialisation, the class they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU}
Activation = Literal["relu", "leaky_relu", "elu", "gelu"]
Init = Literal["default", "xavier", "kaiming"]


class Network(nn.Module):
    """An architecture: images (N, 3, 32, 32) float, normalised, to logits (N, num_classes)."""

    RECIPE: ClassVar[dict[str, Any]] = {}
    LEGAL: ClassVar[dict[str, tuple[str, Callable[[Any], bool]]]] = {}
    CHANNELS_LAST: ClassVar[bool] = True  # the memory format that was the faster one when measured

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes


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
