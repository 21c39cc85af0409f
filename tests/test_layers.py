"""What architectures share: activations, initialisation, a convolution whose fast gradient is the plain one."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_lab import models
from cifar_lab.layers import (
    ACTIVATIONS,
    FEWEST,
    LEAST,
    MOST,
    NARROW,
    SIDE_BY_SIDE,
    VERY_NARROW,
    Activation,
    Conv2d,
    Init,
    _Conv3x3,
    _Conv3x3InRows,
    initialise,
)
from cifar_lab.recipe import Recipe

N = 2 * SIDE_BY_SIDE


def drawn(*shape: int, dtype: torch.dtype = torch.double, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


CONVOLUTIONS: list[type[torch.autograd.Function]] = [_Conv3x3, _Conv3x3InRows]


@pytest.mark.parametrize("convolve", CONVOLUTIONS, ids=lambda convolve: convolve.__name__)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(
    ("n", "height", "width"),
    [
        (N, 7, 7),
        (N, 5, 5),
        (N, 3, 3),
        (N, 2, 2),
        (N, 1, 1),
        (N, 5, 8),
        (N + 3, 7, 3),
        (N + 3, 2, 5),
        (N + 3, 1, 4),
        (N + 3, 3, 3),
        (1, 3, 3),
    ],
)
def test_a_convolution_over_images_side_by_side_is_the_plain_one(
    n: int, height: int, width: int, layout: torch.memory_format, convolve: type[torch.autograd.Function]
) -> None:
    images = drawn(n, 5, height, width).contiguous(memory_format=layout).requires_grad_()
    weight, gradient = drawn(6, 5, 3, 3, seed=1).requires_grad_(), drawn(n, 6, height, width, seed=2)
    ours, plain = convolve.apply(images, weight), F.conv2d(images, weight, padding=1)
    torch.testing.assert_close(ours, plain)
    assert convolve is _Conv3x3InRows or torch.equal(ours, plain)
    for one, other in zip(
        torch.autograd.grad(ours, (images, weight), gradient),
        torch.autograd.grad(plain, (images, weight), gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("convolve", CONVOLUTIONS, ids=lambda convolve: convolve.__name__)
@pytest.mark.parametrize("side", [1, 3, 6])
def test_the_next_layer_finds_the_channels_of_a_pixel_together(
    side: int, convolve: type[torch.autograd.Function]
) -> None:
    images = drawn(N + 3, 16, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = convolve.apply(images, drawn(16, 16, 3, 3).contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(out.square().sum(), images)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("taken", "side", "channels", "n", "training"),
    [
        ("_Conv3x3InRowsBackward", VERY_NARROW, 64, N, True),
        ("_Conv3x3InRowsBackward", VERY_NARROW, 64, SIDE_BY_SIDE, True),
        ("_Conv3x3Backward", VERY_NARROW + 1, 64, N, True),
        ("_Conv3x3Backward", NARROW, 64, N, True),
        ("", NARROW, 64, N, False),
        ("", NARROW, 64, SIDE_BY_SIDE - 1, True),
        ("", NARROW + 1, 64, N, True),
        ("", NARROW, 48, N, True),
    ],
)
def test_images_lie_side_by_side_only_where_that_is_faster(
    taken: str, side: int, channels: int, n: int, training: bool
) -> None:
    layer = Conv2d(channels, channels, 3, padding=1, bias=False).train(training)
    images = drawn(n, channels, side, side, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    images.requires_grad_()
    gradient = drawn(n, channels, side, side, dtype=torch.float32, seed=1).bfloat16()
    assert "_Conv3x3" not in type(layer(images).grad_fn).__name__, "32 bit has no need of it"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, plain = layer(images), F.conv2d(images, layer.weight, padding=1)
    found = type(out.grad_fn).__name__
    assert found.partition(".")[0] == taken if taken else "_Conv3x3" not in found
    torch.testing.assert_close(out, plain)
    assert side <= VERY_NARROW or torch.equal(out, plain)
    for one, other in zip(
        torch.autograd.grad(out, (images, layer.weight), gradient),
        torch.autograd.grad(plain, (images, layer.weight), gradient),
        strict=True,
    ):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("taken", "fields", "side", "n"),
    [
        (True, {}, 7, FEWEST),
        (True, {"bias": True}, 7, FEWEST),
        (True, {}, LEAST, MOST),
        (False, {}, LEAST - 1, FEWEST),
        (False, {}, LEAST, MOST + 1),
        (False, {}, LEAST, FEWEST - 1),
        (False, {"out_channels": 32}, 7, FEWEST),
        (False, {"stride": 2}, 8, FEWEST),
        (False, {"padding": 0}, 7, FEWEST),
        (False, {"padding": 2, "dilation": 2}, 7, FEWEST),
        (False, {"kernel_size": 1}, 7, FEWEST),
        (False, {"groups": 2}, 7, FEWEST),
        (False, {"padding_mode": "reflect"}, 7, FEWEST),
    ],
    ids=str,
)
def test_winograd_is_taken_only_where_it_is_right_and_faster(
    taken: bool, fields: dict[str, Any], side: int, n: int
) -> None:
    asked = {"in_channels": 96, "out_channels": 96, "kernel_size": 3, "padding": 1, "bias": False, **fields}
    torch.manual_seed(0)
    layer, plain = Conv2d(**asked), nn.Conv2d(**asked)
    plain.load_state_dict(layer.state_dict())
    images = drawn(n, 96, side, side, dtype=torch.float32).contiguous(memory_format=torch.channels_last)

    def winograd(images: Tensor) -> bool:
        found, node = False, layer(images).grad_fn
        while node is not None and not found:
            found, node = "Winograd" in type(node).__name__, node.next_functions[0][0]
        return found

    assert winograd(images) is taken
    torch.testing.assert_close(layer(images), plain(images), rtol=1e-3, atol=1e-4)
    assert not winograd(images.contiguous()), "a network that is not in channels_last stays so"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not winograd(images)
    layer.eval()
    assert not winograd(images)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    "relu": (F.relu, lambda x: max(x, 0.0)),
    "leaky_relu": (F.leaky_relu, lambda x: x if x > 0 else 0.01 * x),
    "elu": (F.elu, lambda x: x if x > 0 else math.expm1(x)),
    "gelu": (F.gelu, lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_the_function_of_its_name(name: str) -> None:
    x = torch.linspace(-4, 4, 81, dtype=torch.double)
    torchs, formula = FUNCTIONS[name]
    y = ACTIVATIONS[name]()(x)
    assert torch.equal(y, torchs(x))
    torch.testing.assert_close(y, torch.tensor([formula(value) for value in x.tolist()], dtype=torch.double))


def test_every_activation_has_its_function_in_this_file() -> None:
    assert set(ACTIVATIONS) == set(FUNCTIONS) == set(typing.get_args(Activation))


@pytest.mark.parametrize("arch", [arch for arch in models.ARCHITECTURES if "activation" in models.parameters(arch)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_network_has_the_activation_that_was_asked_for_and_no_other(arch: str, name: str) -> None:
    with torch.device("meta"):
        layers = list(models.build(Recipe(arch=arch, activation=name), 10).modules())
    assert {type(layer) for layer in layers} & set(ACTIVATIONS.values()) == {ACTIVATIONS[name]}


# Of an initialisation the standard deviation of the weights, from what comes in and goes out, and whether it is normal.
DRAWN: dict[str, tuple[Callable[[int, int], float], bool]] = {
    "default": (lambda into, out: math.sqrt(1 / 3 / into), False),  # PyTorch's: uniform up to 1 / sqrt(into)
    "xavier": (lambda into, out: math.sqrt(2 / (into + out)), False),
    "kaiming": (lambda into, out: math.sqrt(2 / into), True),
}


def drawn_as(weight: Tensor, init: str) -> None:
    """Assert what may be told of the weights (out, in, ...) of one layer without knowing the generator."""
    deviation, normal = DRAWN[init]
    field = weight[0, 0].numel()
    expected = deviation(weight.shape[1] * field, weight.shape[0] * field)
    n = weight.numel()
    assert abs(float(weight.mean())) < 4 * expected / math.sqrt(n)
    # The standard error of a standard deviation of n normal draws; that of uniform ones is smaller.
    assert float(weight.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * n))
    largest = float(weight.abs().max()) / expected
    assert largest > 2 if normal else 1.6 < largest <= math.sqrt(3) * (1 + 1e-6)


@pytest.mark.parametrize("init", DRAWN)
@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(120, 84), lambda: nn.Conv2d(16, 48, 5), lambda: nn.Conv2d(8, 400, 1)],
    ids=["dense", "5x5", "1x1"],
)  # fmt: skip
def test_an_initialisation_draws_with_the_deviation_its_source_gives(init: Init, layer: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    made = layer()
    initialise(nn.Sequential(made), init, (nn.Linear, nn.Conv2d))
    drawn_as(made.weight.detach(), init)
    assert made.bias.any() == (init == "default")


def test_every_initialisation_has_its_deviation_in_this_file() -> None:
    assert set(DRAWN) == set(typing.get_args(Init))


@pytest.mark.parametrize(
    ("arch", "kinds"), [("classic_cnn", (nn.Linear,)), ("three_layer_cnn", (nn.Linear, nn.Conv2d))]
)
@pytest.mark.parametrize("init", DRAWN)
def test_a_network_draws_the_layers_it_names_so_and_leaves_the_others_to_pytorch(
    arch: str, kinds: tuple[type, ...], init: str
) -> None:
    torch.manual_seed(0)
    for layer in models.build(Recipe(arch=arch, init=init), 10).modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            drawn_as(layer.weight.detach(), init if isinstance(layer, kinds) else "default")


@pytest.mark.parametrize("arch", ["resnet", "nf_resnet"])
def test_a_residual_network_draws_its_convolutions_after_he(arch: str) -> None:
    torch.manual_seed(0)
    for layer in models.build(Recipe(arch=arch, width=16), 10).modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            drawn_as(layer.weight.detach(), "kaiming" if isinstance(layer, nn.Conv2d) else "default")


def test_every_network_with_an_initialisation_to_choose_is_tested_here() -> None:
    assert [a for a in models.ARCHITECTURES if "init" in models.parameters(a)] == ["classic_cnn", "three_layer_cnn"]
