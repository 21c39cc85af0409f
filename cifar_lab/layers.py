"""What the architectures are made of: activations, initialisation, the class they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from torch.nn.grad import conv2d_input, conv2d_weight

from cifar_lab.winograd import Winograd

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU}
Activation = Literal["relu", "leaky_relu", "elu", "gelu"]
Init = Literal["default", "xavier", "kaiming"]


class WeightsError(ValueError):
    """Weights to start from are absent, unreadable, or of another network."""


class Network(nn.Module):
    """An architecture: images (N, 3, 32, 32) float, normalised, to logits (N, num_classes).

    Where it takes smaller images too, a recipe may train it on them (small_share).
    """

    RECIPE: ClassVar[dict[str, Any]] = {}
    LEGAL: ClassVar[dict[str, tuple[str, Callable[[Any], bool]]]] = {}
    CHANNELS_LAST: ClassVar[bool] = True  # the memory format where none was measured

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def start(self, images: Tensor) -> None:
        """What a fresh training begins from beyond random weights; not called when a checkpoint is loaded.

        Args:
            images: some of the training images, (n, 3, 32, 32) float, normalised.

        Raises:
            WeightsError: what it should begin from cannot be had.
        """

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch of a training, counted from 0; also of one that goes on from a checkpoint."""


def memory_format(network: Network, wanted: str) -> torch.memory_format:
    """The memory format that a recipe wants for a network, but contiguous where channels_last is not safe.

    With "auto", of a recipe that has not been measured, it is the one that the architecture's file says.

    With channels that do not fill a vector register the CPU's kernels for channels_last corrupt memory: a ResNet of
    width 4 crashes (torch 2.15, AVX2). 16 floats fill the widest register. The 24 channels of `speed_cnn`'s whitening,
    which is no layer, are those of its record: seen to be safe in fp32 on AVX2, which they fill, and in bf16 on AMX.
    """
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    full = all(layer.out_channels % 16 == 0 for layer in convolutions)
    last = network.CHANNELS_LAST if wanted == "auto" else wanted == "channels_last"
    return torch.channels_last if last and full else torch.contiguous_format


def quicken(parameter: nn.Parameter, factor: float) -> nn.Parameter:
    """Have Muon move a parameter that is no filter with `factor` times the lr of the others; its decay stays theirs."""
    parameter.lr_factor = factor  # type: ignore[attr-defined]
    return parameter


SIDE_BY_SIDE = 8  # images
NARROW, VERY_NARROW = 8, 5  # pixels: up to here the weights' gradient gains, and the whole convolution (AMX)
MANY = 32  # channels, half the harmonic mean of in and out: from there Winograd is the faster one (torch 2.15, AVX2)
# Images: with fewer, the filters' transformation costs more than is saved; of more, the tiles take too much memory.
FEWEST, MOST = 48, 512
LEAST = 3  # pixels of a side, of the 4 of a tile


def side_by_side(images: Tensor) -> Tensor:
    """Rows of SIDE_BY_SIDE images, a column of zeros after each, the last row filled up with zeros.

    (N, C, H, W) to (ceil(N/SIDE_BY_SIDE), C, H, SIDE_BY_SIDE*(W+1)), channels_last.
    """
    n, c, h, w = images.shape
    rows = images.new_empty(-(-n // SIDE_BY_SIDE), h, SIDE_BY_SIDE, w + 1, c)
    rows[:, :, :, w] = 0
    places, pixels = rows[:, :, :, :w].transpose(1, 2), images.permute(0, 2, 3, 1)
    full, left = divmod(n, SIDE_BY_SIDE)
    places[:full] = pixels[: n - left].reshape(full, SIDE_BY_SIDE, h, w, c)
    if left:
        places[full, :left], places[full, left:] = pixels[n - left :], 0
    return rows.flatten(2, 3).permute(0, 3, 1, 2)


def apart(rows: Tensor, n: int, w: int) -> Tensor:
    """The n images, w pixels wide, of `side_by_side`'s rows: (N, C, H, W), channels_last."""
    r, c, h, _ = rows.shape
    images = rows.permute(0, 2, 3, 1).view(r, h, SIDE_BY_SIDE, w + 1, c)[:, :, :, :w].transpose(1, 2)
    # Of a single row per image `reshape` makes a view, with the columns of zeros between.
    return images.reshape(-1, h, w, c)[:n].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


class _Conv3x3(torch.autograd.Function):
    """A 3x3 convolution of padding 1 whose weights' gradient is taken with the images side by side."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(images, weight)
        return F.conv2d(images, weight, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        images, weight = ctx.saved_tensors
        return (
            conv2d_input(images.shape, weight, gradient, padding=1),  # type: ignore[no-untyped-call]
            conv2d_weight(  # type: ignore[no-untyped-call]
                side_by_side(images), weight.shape, side_by_side(gradient), padding=1
            ),
        )


class _Conv3x3InRows(torch.autograd.Function):
    """A 3x3 convolution of padding 1, all of it with the images side by side."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        rows = side_by_side(images)
        ctx.save_for_backward(rows, weight)
        ctx.count, ctx.width = len(images), images.shape[3]
        return apart(F.conv2d(rows, weight, padding=1), ctx.count, ctx.width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (rows, weight), gradient = ctx.saved_tensors, side_by_side(gradient)
        return (
            apart(conv2d_input(rows.shape, weight, gradient, padding=1), ctx.count, ctx.width),  # type: ignore[no-untyped-call]
            conv2d_weight(rows, weight.shape, gradient, padding=1),  # type: ignore[no-untyped-call]
        )


class Conv2d(nn.Conv2d):
    """PyTorch's convolution, trained faster on a CPU where it is 3x3 of stride 1 and keeps the size of the map.

    In fp32 `Winograd` multiplies less, and gains where channels are many: its own work grows with their sum, what it
    saves with their product. For the backward pass it keeps four times its weights, and the tiles: 2.25 times its
    input, up to 4 times where a side is no multiple of 4. PyTorch does not compile it: it writes in place. In bf16 on a
    CPU with AMX the gradient of the weights is a product over the pixels of one row of the map, of which 32 fill a
    tile: on maps of 8 pixels or less most of it is empty. There a row is that of several images: with 256 channels 2
    times faster at 7x7, 5 times at 3x3. On maps of 5 pixels or less so it is for all of the convolution: with 512
    channels 4 times faster at 2x2 (torch 2.15).
    """

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        kept = (self.kernel_size, self.stride, self.padding) == ((3, 3), (1, 1), (1, 1))
        self.plain = kept and self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        channels, out = self.in_channels, self.out_channels
        self.many = channels * out >= MANY * (channels + out)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor
        if self.plain and self.many and self.training and x.device.type == "cpu" and lies_last(x):
            side = x.shape[3]
            if torch.is_autocast_enabled("cpu"):
                if side <= NARROW and len(x) >= SIDE_BY_SIDE and bias is None:
                    dtype = torch.get_autocast_dtype("cpu")
                    convolve = _Conv3x3InRows if side <= VERY_NARROW else _Conv3x3
                    out = convolve.apply(x.to(dtype), weight.to(dtype))
                    return out
            elif x.dtype == torch.float32 and side >= LEAST and FEWEST <= len(x) <= MOST and not is_compiling():
                out = Winograd.apply(x, weight)
                return out if bias is None else out + bias[:, None, None]
        out = super()._conv_forward(x, weight, bias)
        return out


def lies_last(images: Tensor) -> bool:
    """Whether the channels of a pixel lie together: of a network that is not in channels_last they do not."""
    return images.is_contiguous(memory_format=torch.channels_last)


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
