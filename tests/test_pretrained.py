"""Pretrained: what it begins from, what of it is trained, and what it refuses to read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from conftest import Trap
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from cifar_lab.layers import WeightsError
from cifar_lab.models import build
from cifar_lab.recipe import Recipe

IMAGENET_FILE = "resnet18-f37072fd.pth"


def make(classes: int = 10, **fields: Any) -> Any:
    torch.manual_seed(0)
    return build(Recipe(arch="pretrained", **fields), classes)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def theirs() -> Any:
    torch.manual_seed(5)
    network = torchvision.models.resnet18(weights=None).eval()
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5)
    return network


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of torch's hub cache, empty, on a machine without a network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    return cache


def body(network: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.body.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def refusal(network: Any) -> str:
    with pytest.raises(WeightsError) as caught:
        network.start(images(2))
    text = str(caught.value)
    assert text.startswith("weights: ") and "\n" not in text
    return text


def test_after_the_start_the_features_are_torchvisions(theirs: Any, tmp_path: Path) -> None:
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    network = make(7, weights=str(tmp_path / "w.pth")).eval()
    head = {name: tensor.clone() for name, tensor in network.head.state_dict().items()}
    network.start(images(2))
    assert same(body(network), theirs.state_dict())
    assert same(head, network.head.state_dict()), "the head begins at random"
    resized = transforms.resize(images(2), [64, 64], transforms.InterpolationMode.BILINEAR)
    with torch.no_grad():
        features = torch.nn.Sequential(*list(theirs.children())[:-1])(resized).flatten(1)
        torch.testing.assert_close(network(images(2)), network.head(features), rtol=1e-4, atol=1e-4)


def test_imagenet_is_read_from_the_cache_of_torchs_hub(theirs: Any, offline: Path) -> None:
    torch.save(theirs.state_dict(), offline / IMAGENET_FILE)
    network = make()
    network.start(images(2))
    assert same(body(network), theirs.state_dict())


def test_without_a_network_the_refusal_names_file_and_address(offline: Path) -> None:
    text = refusal(make())
    assert str(offline / IMAGENET_FILE) in text and f"https://download.pytorch.org/models/{IMAGENET_FILE}" in text
    assert not list(offline.iterdir())


def test_building_loads_nothing(theirs: Any, offline: Path) -> None:
    torch.save(theirs.state_dict(), offline / IMAGENET_FILE)
    assert same(body(make()), body(make(weights="none")))
    make(weights="absent.pth")


def test_without_weights_the_start_changes_nothing() -> None:
    network = make(weights="none")
    before = body(network)
    network.start(images(2))
    assert same(before, body(network))


@pytest.mark.parametrize("cached", [False, True])
def test_a_malicious_file_runs_nothing_and_is_refused(cached: bool, tmp_path: Path, offline: Path) -> None:
    file, mark = offline / IMAGENET_FILE, tmp_path / "mark"
    for write in (lambda: file.write_bytes(pickle.dumps(Trap(mark))), lambda: torch.save({"conv1": Trap(mark)}, file)):
        write()
        assert str(file) in refusal(make(weights="imagenet" if cached else str(file)))
        assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "the trap does not work"


def test_what_is_no_fitting_state_dict_is_refused(theirs: Any, tmp_path: Path) -> None:
    state, file = theirs.state_dict(), tmp_path / "w.pth"
    network = make(weights=str(file))
    assert "there is no file" in refusal(network)
    file.write_bytes(b"")
    assert "damaged" in refusal(network)
    for content, named in (
        (torch.zeros(3), "no state dict"),
        ({1: torch.zeros(3)}, "does not fit"),
        ({}, "conv1.weight"),
        ({k: v for k, v in state.items() if k != "layer1.0.conv1.weight"}, "layer1.0.conv1.weight"),
        ({**state, "layer9.weight": torch.zeros(1)}, "layer9.weight"),
        ({**state, "conv1.weight": torch.zeros(64, 3, 3, 3)}, "conv1.weight"),
        ({**state, "bn1.bias": "text"}, "bn1.bias"),
    ):
        torch.save(content, file)
        assert named in refusal(network)
    torch.save(state, file)
    assert "does not fit resnet50" in refusal(make(weights=str(file), backbone="resnet50"))


def test_weights_that_are_neither_a_name_nor_a_file_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"^weights: 'imagenett'.*Legal: imagenet, none, or a file"):
        Recipe(arch="pretrained", weights="imagenett")


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_trains_the_head_alone(frozen: bool) -> None:
    network = make(weights="none", resolution=32, frozen=frozen)  # in training already, as Lightning leaves it
    before, head = body(network), network.head[1].weight.clone()
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(trained) == (2 if frozen else len(list(network.parameters())))
    step = torch.optim.SGD(trained, 0.1)
    for _ in range(2):
        network.eval()
        network.train()
        loss = torch.nn.functional.cross_entropy(network(images(8)), torch.arange(8))
        loss.backward()  # type: ignore[no-untyped-call]
        step.step()
    assert not torch.equal(head, network.head[1].weight)
    assert same(before, body(network)) is frozen, "batch norm's statistics are of the body too"
