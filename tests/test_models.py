"""Every architecture: shapes, gradients, seeds, sizes, and what its source says of it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NARROW
from torch import Tensor, nn

from cifar_lab import models
from cifar_lab.models import ARCHITECTURES, build
from cifar_lab.recipe import Recipe

# What a training begins from is no part of the network that is built: tests/test_pretrained.py shows what it does.
OWN = [(a, name) for a in ARCHITECTURES for name in models.parameters(a) if (a, name) != ("pretrained", "weights")]


def make(arch: str, classes: int = 10, seed: int = 0, **fields: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build(Recipe(arch=arch, **{**NARROW.get(arch, {}), **fields}), classes)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_images_become_one_logit_a_class(arch: str, classes: int) -> None:
    assert make(arch, classes)(images(4)).shape == (4, classes)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_gradient_reaches_every_parameter(arch: str) -> None:
    network = make(arch)
    nn.functional.cross_entropy(network(images(8)), torch.arange(8)).backward()  # type: ignore[no-untyped-call]
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_in_eval_an_image_is_judged_by_itself(arch: str) -> None:
    network = make(arch).eval()
    batch = images(3)
    torch.testing.assert_close(network(batch[:1]), network(batch)[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_seed_determines_the_weights(arch: str) -> None:
    one, again, other = (make(arch, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"arch": "classic_cnn"}, 62_006),
        ({"arch": "resnet", "depth": 18}, 11_173_962),
        ({"arch": "resnet", "depth": 34}, 21_282_122),
        ({"arch": "resnet", "depth": 50}, 23_520_842),
        ({"arch": "resnet", "depth": 101}, 42_512_970),
        ({"arch": "resnet", "depth": 18, "stem": "imagenet"}, 11_181_642),
        # ResNet's, a gain and a bias in place of batch norm's two, and a gain for each of 8, 16, 16 blocks.
        ({"arch": "nf_resnet", "depth": 18}, 11_173_962 + 8),
        ({"arch": "nf_resnet", "depth": 34}, 21_282_122 + 16),
        ({"arch": "nf_resnet", "depth": 50}, 23_520_842 + 16),
        ({"arch": "pretrained"}, 11_181_642),
        ({"arch": "compact_cnn"}, 23_210),
        ({"arch": "wide_cnn"}, 6_284_810),
        ({"arch": "three_layer_cnn"}, 1_153_418),
        ({"arch": "mixed_kernel_cnn"}, 5_005_944),
        ({"arch": "dynamic_cnn"}, 4_724_526),
    ],
    ids=str,
)
def test_the_number_of_parameters_is_the_published_one(fields: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        assert count(build(Recipe(**fields), 10)) == parameters


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_number_of_parameters_in_a_docstring_is_right(arch: str) -> None:
    stated = re.findall(r"([\d,]+) parameters", inspect.getdoc(models.network_class(arch)) or "")
    with torch.device("meta"):
        assert set(stated) <= {f"{count(build(Recipe(arch=arch), 10)):,}", "23,000"}


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_with_the_imagenet_stem_is_torchvisions(depth: int) -> None:
    import torchvision

    ours = build(Recipe(arch="resnet", depth=depth, stem="imagenet"), 10)
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=10)
    assert count(ours) == count(theirs)
    # Ours names the shortcut after the residual, as torchvision does: the order of the tensors is the same.
    tensors = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    ours.load_state_dict(tensors)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(images(4)), theirs(images(4)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_narrow_resnet_does_not_crash_the_process(width: int) -> None:
    # In a process of its own: what fails here is native code, a strided 1x1 convolution in channels_last.
    code = (
        "import sys, torch; from cifar_lab.layers import memory_format;"
        "from cifar_lab.models import build; from cifar_lab.recipe import Recipe;"
        "torch.set_num_threads(1); network = build(Recipe(arch='resnet', width=int(sys.argv[1])), 10);"
        "kept = memory_format(network);"
        "network = network.to(memory_format=kept); images = torch.randn(64, 3, 32, 32).contiguous(memory_format=kept);"
        "[network(images).sum().backward() for _ in range(10)]; network.eval(); network(images[:37])"
    )
    command = [sys.executable, "-c", code, str(width)]
    assert subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, timeout=120).returncode == 0


@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("imagenet", 8)])
def test_the_stem_decides_the_size_of_the_map(stem: str, side: int) -> None:
    network: Any = make("resnet", stem=stem)
    assert network.stem(images(1)).shape == (1, 8, side, side)


@pytest.mark.parametrize(("arch", "name"), OWN)
def test_each_own_field_changes_the_network(arch: str, name: str, another: Callable[[str, str], Any]) -> None:
    def answers(**fields: Any) -> tuple[int, Tensor]:
        network = make(arch, **fields).train()
        torch.manual_seed(0)
        return count(network), network(images(4))

    (n, before), (m, after) = answers(), answers(**{name: another(arch, name)})
    assert n != m or not torch.allclose(before, after)


def test_xavier_touches_the_dense_layers_alone() -> None:
    plain, xavier = make("classic_cnn").state_dict(), make("classic_cnn", init="xavier").state_dict()
    moved = {name for name in plain if not torch.equal(plain[name], xavier[name])}
    assert moved == {name for name in plain if name.startswith("head.")}
    for name in moved:
        if name.endswith("bias"):
            assert not xavier[name].any()
        else:
            bound = (6 / sum(xavier[name].shape)) ** 0.5
            assert 0.95 * bound < float(xavier[name].abs().max()) <= bound


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_docstring_explains_each_own_field_and_names_a_source(arch: str) -> None:
    network = models.network_class(arch)
    doc = inspect.getdoc(network) or ""
    assert "(N, 3, 32, 32)" in doc and re.search(r"^Source: ", doc, re.MULTILINE)
    block = doc.partition("Args:\n")[2].partition("\n\n")[0]
    explained = re.findall(r"^    (\w+): \S", block, re.MULTILINE)
    assert explained == ["num_classes", *models.parameters(arch)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_an_architecture_declares_legal_are_its_own_fields(arch: str) -> None:
    assert set(models.network_class(arch).LEGAL) <= set(models.parameters(arch))
    assert set(models.network_class(arch).RECIPE) <= set(Recipe(arch=arch).to_dict()) - set(models.parameters(arch))


@pytest.mark.parametrize("softmax", [True, False])
def test_a_softmax_before_the_cross_entropy_sets_it_a_floor(softmax: bool) -> None:
    network: Any = make("mixed_kernel_cnn", softmax=softmax).eval()
    logits = network.head[4]
    with torch.no_grad():
        logits.weight *= 1e4  # as sure as a network can be
        answers = network(images(64))
    loss = nn.functional.cross_entropy(answers, answers.argmax(1), reduction="none")
    floor = torch.tensor(1 + 9 / torch.e).log()
    if softmax:
        assert torch.allclose(answers.sum(1), torch.ones(64)) and (answers >= 0).all()
        assert (loss >= floor - 1e-6).all() and abs(float(loss.min()) - 1.4612) < 1e-4
    else:
        assert loss.max() < 0.1
