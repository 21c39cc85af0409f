"""Every architecture: shapes, gradients, seeds, sizes, and what its source says of it."""

from __future__ import annotations

import inspect
import json
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
from cifar_lab.files import read_csv
from cifar_lab.models import ARCHITECTURES, build
from cifar_lab.recipe import Recipe

ROOT = Path(__file__).parents[1]

# What a training begins from is no part of the network that is built: tests/test_pretrained.py shows what it does.
OWN = [(a, name) for a in ARCHITECTURES for name in models.parameters(a) if (a, name) != ("pretrained", "weights")]


def make(arch: str, classes: int = 10, seed: int = 0, **fields: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build(Recipe(arch=arch, **{**NARROW.get(arch, {}), **fields}), classes)


def images(n: int, side: int = 32) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


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


def classic_parameters(depth: int) -> int:
    """Of classic_cnn: two convolutions of 5x5, then ones of 3x3 that double the channels, and three dense layers."""
    total, channels = (3 * 25 + 1) * 6 + (6 * 25 + 1) * 16, 16
    for _ in range(depth - 2):
        total, channels = total + (channels * 9 + 1) * 2 * channels, 2 * channels
    return total + (channels * 5 * 5 + 1) * 120 + (120 + 1) * 84 + (84 + 1) * 10


def speed_parameters(a: int, b: int, c: int, depth: int) -> int:
    """Of speed_cnn: the whitening's bias, a bias a norm, no other; the whitening filters are not trained."""
    pairs = [(24, a), (a, b), (b, c)]
    return 24 + sum(9 * into * out + 9 * out * out * (depth - 1) + depth * out for into, out in pairs) + c * 10


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"arch": "classic_cnn"}, 62_006),
        *(({"arch": "classic_cnn", "depth": depth}, classic_parameters(depth)) for depth in (2, 3, 4, 5, 6)),
        ({"arch": "speed_cnn"}, 1_971_352),
        ({"arch": "speed_cnn"}, speed_parameters(64, 256, 256, 2)),
        ({"arch": "speed_cnn", "widths": "128,384,512", "depth": 3}, speed_parameters(128, 384, 512, 3)),
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
        "kept = memory_format(network, 'channels_last');"
        "network = network.to(memory_format=kept); images = torch.randn(64, 3, 32, 32).contiguous(memory_format=kept);"
        "[network(images).sum().backward() for _ in range(10)]; network.eval(); network(images[:37])"
    )
    command = [sys.executable, "-c", code, str(width)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_network_trains_on_images_of_the_smallest_side_that_it_is_said_to_take(arch: str) -> None:
    own = Recipe(arch=arch, **NARROW.get(arch, {})).network_parameters()
    side = next(side for side in range(1, 33) if models.takes(arch, side, **own))
    network = make(arch).train()
    network(images(4, side)).sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    if side > 1:
        with pytest.raises(RuntimeError):
            network(images(4, side - 1))


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


# Networks whose images weight the branches of a block for themselves

WEIGHING = ("mixed_kernel_cnn", "dynamic_cnn")


def lively(arch: str, **fields: Any) -> Any:
    """A network in eval mode, its norms with statistics and affine parts of their own, its shares far from equal."""
    network = make(arch, **fields)
    for layer in network.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm1d)):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
        if hasattr(layer, "branches"):
            for own in layer.weights.modules():
                if isinstance(own, nn.Linear):
                    nn.init.normal_(own.weight, std=0.5)
    return network.eval()


def colored(n: int) -> Tensor:
    """Images of a mean color each: that alone is what the first block weights its branches by."""
    return images(n) + torch.randn(n, 3, 1, 1, generator=torch.Generator().manual_seed(2))


def blocks_of(network: Any) -> list[Any]:
    return [layer for layer in network.modules() if hasattr(layer, "branches")]


def maps_of(network: Any) -> list[tuple[str, tuple[int, int]]]:
    """What the blocks and the pooling after them make: kind, channels and side, in the order of the network."""
    seen: list[tuple[str, tuple[int, int]]] = []
    layers = blocks_of(network) + [layer for layer in network.modules() if isinstance(layer, nn.MaxPool2d)]
    for layer in layers:
        layer.register_forward_hook(
            lambda layer, _, out: seen.append((type(layer).__name__, (out.shape[1], out.shape[2])))
        )
    network(images(2))
    return seen


def normalised(x: Tensor, norm: Any) -> Tensor:
    """Batch norm in eval mode, of one image (C, H, W)."""
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def by_hand(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A block's shares (N, branches) and output, an image and a branch at a time."""
    shares, outputs = [], []
    for image in x:
        asked = image.mean((1, 2))
        for layer in block.weights:
            if isinstance(layer, nn.Linear):
                asked = layer.weight @ asked + layer.bias
            elif isinstance(layer, nn.ReLU):
                asked = asked.clamp_min(0)
        share = asked.exp() / asked.exp().sum()
        total: Any = 0
        for weight, branch in zip(share, block.branches, strict=True):
            alone = isinstance(branch, nn.Conv2d)
            kernel = branch.weight if alone else branch[0].weight
            out = nn.functional.conv2d(image[None], kernel, padding=kernel.shape[2] // 2)[0]
            total = total + weight * (out if alone else normalised(out, branch[1]).clamp_min(0))
        shares.append(share)
        outputs.append(normalised(total, block.norm).clamp_min(0) if hasattr(block, "norm") else total)
    return torch.stack(shares), torch.stack(outputs)


@pytest.mark.parametrize("arch", WEIGHING)
def test_a_block_is_the_weighted_sum_of_its_branches_by_hand(arch: str) -> None:
    network = lively(arch)
    met: list[tuple[Any, Tensor, Tensor]] = []
    said: list[Tensor] = []
    for block in blocks_of(network):
        block.register_forward_hook(lambda block, args, out: met.append((block, args[0], out)))
        block.weights.register_forward_hook(lambda _, args, out: said.append(out))
    with torch.no_grad():
        network(colored(3))
        for (block, x, out), shares in zip(met, said, strict=True):
            expected_shares, expected = by_hand(block, x)
            torch.testing.assert_close(shares, expected_shares)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", WEIGHING)
def test_the_shares_of_the_branches_sum_to_1_and_are_each_images_own(arch: str) -> None:
    network = lively(arch)
    said: list[Tensor] = []
    for block in blocks_of(network):
        block.weights.register_forward_hook(lambda _, args, out: said.append(out.detach()))
    network(colored(8))
    for shares, block in zip(said, blocks_of(network), strict=True):
        assert shares.shape == (8, len(block.branches)) and (shares > 0).all()
        torch.testing.assert_close(shares.sum(1), torch.ones(8))
        assert (shares.std(0) > 1e-4).all()


def test_mixed_kernel_cnn_has_kernels_of_1_3_and_5_and_pools_after_blocks_2_4_and_5() -> None:
    network = lively("mixed_kernel_cnn")
    for block in blocks_of(network):
        assert [branch.kernel_size for branch in block.branches] == [(1, 1), (3, 3), (5, 5)]
    assert maps_of(network) == [
        ("Block", (4, 32)), ("Block", (4, 32)), ("MaxPool2d", (4, 16)), ("Block", (8, 16)), ("Block", (8, 16)),
        ("MaxPool2d", (8, 8)), ("Block", (16, 8)), ("MaxPool2d", (16, 4)), ("Block", (16, 4)),
    ]  # fmt: skip


def test_dynamic_cnn_pools_between_its_segments_alone_and_doubles_its_channels_there() -> None:
    network = lively("dynamic_cnn", num_blocks="2,1,1", branches=3, kernel=5)
    for block in blocks_of(network):
        assert [branch[0].kernel_size for branch in block.branches] == [(5, 5)] * 3
    assert maps_of(network) == [
        ("Block", (4, 32)), ("Block", (4, 32)), ("MaxPool2d", (4, 16)), ("Block", (8, 16)), ("MaxPool2d", (8, 8)),
        ("Block", (16, 8)),
    ]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_bends_the_logits(arch: str) -> None:
    # In the last dense layer, and there alone, the answers are linear: twice its weights, twice the logits.
    network = make(arch).eval()
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    last.bias = None
    with torch.no_grad():
        once = network(images(16))
        last.weight *= -2
        torch.testing.assert_close(network(images(16)), -2 * once)
    assert once.min() < 0 < once.max()


# The README's table of architectures


def readme_table() -> dict[str, dict[str, str]]:
    """The rows under "## Architectures", by their first cell, a cell by its column."""
    text = (ROOT / "README.md").read_text().partition("\n## Architectures\n")[2].partition("\n## ")[0]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = lines
    return {row[0].strip("`"): dict(zip(header, row, strict=True)) for row in rows}


def test_every_architecture_has_its_row_in_the_readme() -> None:
    assert sorted(readme_table()) == list(ARCHITECTURES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_readme_counts_the_parameters_of_the_default_network(arch: str) -> None:
    stated = re.fullmatch(r"([\d,]+)(?: (?:at (depth) |with (resnet))(\d+))?", readme_table()[arch]["parameters"])
    assert stated
    fields = {"depth": int(stated[4])} if stated[2] else {"backbone": f"resnet{stated[4]}"} if stated[3] else {}
    with torch.device("meta"):
        assert f"{count(build(Recipe(arch=arch, **fields), 10)):,}" == stated[1]


def test_the_readmes_seconds_are_those_of_the_committed_benchmark() -> None:
    found = json.loads((ROOT / "results" / "benchmark" / "amd-epyc-avx2.json").read_text())
    assert found["command"] in " ".join((ROOT / "README.md").read_text().split())
    seconds = {arch: f"{45_000 / speed['32']:,.0f}" for arch, speed in found["images_per_second"].items()}
    assert {arch: row["s an epoch"] for arch, row in readme_table().items()} == seconds


ACCURACIES = [
    (arch, *quoted)
    for arch, row in readme_table().items()
    for quoted in re.findall(r"([\d.]+)% (test|validation), ([^;]*)", row["accuracy so far"])
]


def test_an_accuracy_in_the_readme_is_one_of_test_or_validation_and_says_how_it_came_about() -> None:
    for arch, row in readme_table().items():
        told = row["accuracy so far"]
        assert told.count("%") == sum(a == arch for a, *_ in ACCURACIES) and (told.count("%") or "no" in told), arch


@pytest.mark.parametrize(("arch", "accuracy", "part", "how"), ACCURACIES, ids=str)
def test_an_accuracy_in_the_readme_is_a_row_of_published(arch: str, accuracy: str, part: str, how: str) -> None:
    metric = {"test": r"test_acc(_max|_last)?", "validation": "val_acc"}[part] + "( at (?!class)(?!.* over ).*)?"
    scales = []
    for row in read_csv(ROOT / "results" / "published.csv"):
        if not row["ours"] or not re.fullmatch(metric, row["metric"]) or f"{100 * float(row['ours']):.1f}" != accuracy:
            continue
        best = ROOT / "results" / row["study"] / row["variant"] / "best.json"
        if json.loads(best.read_text())["recipe"]["arch"] == arch:
            scales.append(f"{row['scale']}; {len(row['seed'].split())} seeds")
    assert scales, f"{arch}: no run in results/published.csv reached {accuracy}% {part}"
    told = [r"(?<![\d,])" + re.escape(number) for number in re.findall(r"width \d+|\d+ seeds|[\d,]+(?= images)", how)]
    told += [rf"(?<![\d,]){number} (of \d+ )?epochs?\b" for number in re.findall(r"(\d+) epoch", how)]
    assert any(all(re.search(one, scale) for one in told) for scale in scales), f"{how}: published.csv has {scales}"
