"""The registry: an architecture is a file here, its name is the file's.

A file names its network in `__all__`: a class of nn.Module whose keyword-only parameters, with their defaults, are the
architecture's own Recipe fields, and which may declare

    RECIPE = {"lr": 0.01}                                  what its recipe has for defaults, where Recipe has others
    LEGAL = {"width": ("1 or more", lambda v: v >= 1)}     what its own fields may be, beyond their type

It may override `start`, what a training begins from, and `begin_epoch`; see cifar_lab.layers.Network.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from cifar_lab.layers import Network
    from cifar_lab.recipe import Recipe

ARCHITECTURES: tuple[str, ...] = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


def network_class(arch: str) -> type[Network]:
    """The network's class; imports torch and this architecture's file, no other."""
    module = importlib.import_module(f"{__name__}.{arch}")
    return cast("type[Network]", getattr(module, module.__all__[0]))


def parameters(arch: str) -> dict[str, Any]:
    """The architecture's own Recipe fields and their defaults."""
    signature = inspect.signature(network_class(arch).__init__)
    own = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: p.default for p in own}


def parameter_docs(arch: str) -> str:
    """The Args lines of the network's docstring, indented as Recipe's are."""
    doc = inspect.getdoc(network_class(arch)) or ""
    block = doc.partition("Args:\n")[2].partition("\n\n")[0]
    lines = [line for line in block.splitlines() if not line.strip().startswith("num_classes:")]
    return "".join(f"    {line}\n" for line in lines).lstrip(" ").join(("    ", "    "))


def build(recipe: Recipe, num_classes: int) -> Network:
    """The recipe's network, from images (N, 3, 32, 32) float, normalised, to logits (N, num_classes)."""
    return network_class(recipe.arch)(num_classes, **recipe.network_parameters())


@functools.cache
def takes(arch: str, side: int, **parameters: Any) -> bool:
    """Whether the network that the architecture makes of its parameters takes images of side x side pixels."""
    import torch

    with torch.device("meta"):  # shapes without numbers
        try:
            network_class(arch)(2, **parameters)(torch.empty(2, 3, side, side))
        except RuntimeError:
            return False
    return True
