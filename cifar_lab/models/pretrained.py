"""Pretrained: torchvision's ImageNet ResNet with a new head, fine-tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
import torchvision
from torch import Tensor, nn

from cifar_lab.layers import DROPOUT, Network, WeightsError

__all__ = ["Pretrained"]


class Pretrained(Network):
    """A ResNet that begins from weights learned on ImageNet; with resnet18, 11,181,642 parameters for 10 classes.

    Images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        num_classes: logits.
        backbone: the network up to its average pool: resnet18, resnet34 or resnet50.
        weights: what a training begins from: imagenet (torchvision's first ones, downloaded into torch's hub cache),
            none (random), or a file of torchvision's keys, *.pt or *.pth; a classifier in it is left out.
        resolution: side to which images are resized, bilinearly, pixels.
        frozen: whether the head alone is trained, the backbone's batch norm keeping its statistics.
        dropout: dropout before the head, fraction.

    Source: study 000's future work; He et al. 2015. It names a backbone trained on CIFAR-10 already, whose training set
    may hold this one's validation images: ImageNet weights take its place. Deviation: images come normalised by the
    training set's mean and std, as they do to every architecture; for CIFAR-10 these lie near ImageNet's.
    """

    RECIPE = {"lr": 0.01, "weight_decay": 1e-4, "schedule": "cosine", "max_epochs": 10}
    LEGAL = {
        "weights": (
            "imagenet, none, or a file *.pt or *.pth",
            lambda v: v in ("imagenet", "none") or v.endswith((".pt", ".pth")),
        ),
        "resolution": ("32 to 224 pixels", lambda v: 32 <= v <= 224),
        "dropout": DROPOUT,
    }

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet18",
        weights: str = "imagenet",
        resolution: int = 64,
        frozen: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_classes)
        self.backbone, self.weights, self.resolution, self.frozen = backbone, weights, resolution, frozen
        self.body = getattr(torchvision.models, backbone)(weights=None)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.body.fc.in_features, num_classes))
        self.body.fc = nn.Identity()
        self.body.requires_grad_(not frozen)
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def start(self, images: Tensor) -> None:
        if self.weights == "none":
            return
        state = downloaded(self.backbone) if self.weights == "imagenet" else read(Path(self.weights))
        try:
            self.body.load_state_dict({name: state[name] for name in state if not name.startswith("fc.")})
        except Exception as error:
            raise WeightsError(f"weights: {self.weights} does not fit {self.backbone} ({reason(error)}).") from error

    def forward(self, images: Tensor) -> Tensor:
        side = (self.resolution, self.resolution)
        resized = nn.functional.interpolate(images, side, mode="bilinear", align_corners=False)
        logits: Tensor = self.head(self.body(resized))
        return logits


def downloaded(backbone: str) -> dict[str, Any]:
    """torchvision's state dict from torch's hub cache, or through the network into it."""
    chosen = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
    place = Path(torch.hub.get_dir(), "checkpoints", chosen.url.rpartition("/")[2])
    if not place.exists():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(chosen.url, str(place), place.stem.rpartition("-")[2], progress=False)
        except Exception as error:
            raise WeightsError(
                f"weights: imagenet could not be downloaded ({reason(error)}). Put {chosen.url} at {place}, or begin "
                "from weights=none or a file."
            ) from error
    return read(place)


def read(place: Path) -> dict[str, Any]:
    """A state dict, loaded without running any code in its file."""
    try:
        return dict(torch.load(place, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise WeightsError(f"weights: there is no file {place}.") from None
    except Exception as error:
        raise WeightsError(f"weights: {place} is no state dict, or it is damaged ({reason(error)}).") from error


def reason(error: Exception) -> str:
    """An error in a few words: of load_state_dict's the first complaint, below the heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[min(1, len(lines) - 1) if lines[0].endswith(":") else 0][:120].rstrip(". ")
