"""What this machine does, beside what else one could use; python -m cifar_lab.benchmark.

Its largest matrix product, the images a second of every architecture and what part of that peak they reach, batched
augmentation against torchvision's loader, Lightning against a bare loop, what batches and checkpoints take beside the
training. Pixels are noise, nothing is downloaded.
What is compared is timed in turn; every figure is a median of five.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cifar_lab import cli, machine, progress
from cifar_lab.models import ARCHITECTURES
from cifar_lab.recipe import InputError, Recipe, at_least, check_fields, nearest

if TYPE_CHECKING:
    import numpy as np

    from cifar_lab.data import CIFAR10DataModule
    from cifar_lab.dataset import ImageSet

LOADER_WORKERS, LOADER_BATCH = 2, 128
EPOCH = 45_000  # images: CIFAR-10's training part
TRANSFORMS: dict[str, dict[str, Any]] = {"crop, flip": {}, "crop, flip, rotate": {"rotate": 15.0}}
# The recipes whose loops are compared: long steps, of which Lightning's own part is small, and short ones.
LOOPS: dict[str, dict[str, Any]] = {
    "resnet": {"width": 16, "batch_size": 128},
    "classic_cnn": {"batch_size": 64},
}
SWITCHES = {
    "compiled": "measure the networks compiled as well, which takes minutes",
    "quiet": "print the table only",
    "json": "print JSON alone",
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What is measured.

    Args:
        batch_size: images a step of the architectures.
        threads: CPU threads of the matrix product and of the architectures; unset: as many as PyTorch takes.
    """

    batch_size: int = at_least(2, 32, " images")
    threads: int | None = at_least(1, None, ", or unset")

    def __post_init__(self) -> None:
        check_fields(self)


def main(argv: Sequence[str]) -> int:
    """The command: a table, or JSON."""
    prog = "python -m cifar_lab.benchmark"
    parser = cli.Parser(prog=prog, description=__doc__ or "", allow_abbrev=False)
    parser.options = (BenchmarkOptions,)
    parser.add_class_arguments(BenchmarkOptions, None)
    parser.add_argument("--archs", nargs="+", help="the architectures; default: all")
    parser.offers = {"--archs": ARCHITECTURES}
    for name, text in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    asked = parser.parse_args(list(argv))
    options = BenchmarkOptions(batch_size=asked.batch_size, threads=asked.threads)
    archs = list(asked.archs or ARCHITECTURES)
    for arch in archs:
        if arch not in ARCHITECTURES:
            raise InputError(f"--archs: {arch!r}{nearest(arch, ARCHITECTURES)} Legal: {', '.join(ARCHITECTURES)}.")
    if asked.compiled and (fault := machine.compile_fault()):
        raise InputError(f"--compiled: PyTorch cannot compile here ({fault}).")
    found = measure(archs, options, compiled=asked.compiled) | {"command": cli.command("cifar_lab.benchmark", argv)}
    print(cli.as_json(found) if asked.json else table(found))
    return cli.DONE


def measure(archs: Sequence[str], options: BenchmarkOptions, *, compiled: bool = False) -> dict[str, Any]:
    """All figures, as --json prints them.

    Returns:
        gemm_tflops: the largest matrix product, 1e12 operations a second, in the precision that reaches most;
            gemm_tflops_by_precision has both.
        images_per_second: an architecture's forward and backward pass, by architecture and precision, in the memory
            format that trainings have here.
        threads: of the CPU, by which these were reached.
        peak_fraction: the operations of that pass, as of plain convolutions, over those that a matrix product of the
            same precision does in its time; above 1 where Winograd spares more than is lost.
        compiled_ratios: seconds of that pass over those of the compiled network's, in the faster precision, by
            architecture; absent unless `compiled`.
        augment_ratio: images a second of batches that are cropped, flipped and normalised, over those of torchvision's
            loader with two workers; augment_ratios has it by transforms.
        data_shares: seconds in which a batch is made, as the architecture's own recipe augments it, over those of the
            forward and backward pass of as many images in the faster precision, by architecture.
        record_share: seconds of an epoch's checkpoints and row, for the default resnet, over those of the passes of
            45,000 images through it; absent where resnet was not asked for.
        lightning_ratio: seconds of the training loop of `fit` over those of a bare loop, for a resnet of width 16
            with batches of 128; lightning_ratios has it by architecture.
        hardware, versions: of this machine.
    """
    machine.settle()
    threads = options.threads or torch.get_num_threads()
    precisions = machine.precisions()
    recipes = {arch: machine.measured(Recipe(arch=arch, batch_size=options.batch_size)) for arch in archs}
    flops = {arch: image_flops(recipe) for arch, recipe in recipes.items()}
    jobs = [(arch, precision) for arch in archs for precision in precisions]
    speeds: dict[str, dict[str, float]] = {arch: {} for arch in archs}
    fractions: dict[str, dict[str, float]] = {arch: {} for arch in archs}
    augment = {}
    ratios = {}
    with progress.Bar("measuring", len(jobs) + len(TRANSFORMS) + compiled * len(archs)) as bar:
        peaks = {precision: gemm_flops(precision, threads) / 1e12 for precision in precisions}
        for done, (arch, precision) in enumerate(jobs):
            bar.reached(done)
            speed = options.batch_size / machine.step_seconds(recipes[arch], precision, threads=threads)
            speeds[arch][precision] = speed
            fractions[arch][precision] = speed * flops[arch] / (peaks[precision] * 1e12)
        fastest = {arch: max(speeds[arch].values()) for arch in archs}
        shares = {
            arch: batch_seconds(recipes[arch], threads) / recipes[arch].batch_size * fastest[arch] for arch in archs
        }
        for done, (name, fields) in enumerate(TRANSFORMS.items(), len(jobs)):
            bar.reached(done)
            augment[name] = augment_ratio(fields)
        for done, arch in enumerate(archs if compiled else [], len(jobs) + len(TRANSFORMS)):
            bar.reached(done)
            ratios[arch] = compiled_ratio(recipes[arch], max(speeds[arch], key=speeds[arch].__getitem__), threads)
    record = {}
    if "resnet" in archs:
        record["record_share"] = record_seconds(recipes["resnet"]) * fastest["resnet"] / EPOCH
    loops = {arch: lightning_ratio(Recipe(arch=arch, **fields)) for arch, fields in LOOPS.items()}
    return {
        "gemm_tflops": max(peaks.values()),
        "gemm_tflops_by_precision": peaks,
        "batch_size": options.batch_size,
        "threads": threads,
        "images_per_second": speeds,
        "peak_fraction": fractions,
        **({"compiled_ratios": ratios} if compiled else {}),
        "augment_ratio": augment["crop, flip"],
        "augment_ratios": augment,
        "data_shares": shares,
        **record,
        "lightning_ratio": loops["resnet"],
        "lightning_ratios": loops,
        "hardware": machine.hardware(),
        "versions": machine.versions(),
    }


def timed(work: Callable[[], Any]) -> float:
    """Seconds of some work, with what a GPU still has to do of it."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gemm_flops(precision: str, threads: int | None = None) -> float:
    """Operations a second of a large square matrix product, by so many CPU threads."""
    here = machine.device()
    side = 8192 if here.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.rand(2, side, side, device=here).to(dtype).unbind()
    with machine.threads_limited(threads):
        seconds = [timed(lambda: left @ right) for _ in range(machine.REPEATS + 1)]
    return 2 * side**3 / statistics.median(seconds[1:])


def image_flops(recipe: Recipe) -> float:
    """Operations an image, of the matrix products and convolutions of a forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    from cifar_lab.models import build

    network, batch = build(recipe, 10), 2
    counter = FlopCounterMode(display=False)
    with counter:
        network(torch.rand(batch, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / batch


def compiled_ratio(recipe: Recipe, precision: str, threads: int) -> float:
    """Seconds of a forward and backward pass over those of the same network compiled; the two take turns."""
    from cifar_lab.fit import compiled
    from cifar_lab.models import build

    networks = [build(recipe, 10) for _ in range(2)]
    plain, other = (machine.training_pass(network, recipe, precision) for network in networks)
    with machine.threads_limited(threads), compiled(networks[1]):
        ratios = [plain() / other() for _ in range(machine.REPEATS + 2)]
    return statistics.median(ratios[2:])  # the first is with the compiling, the second with what is still cold


def noise(count: int) -> ImageSet:
    """Images of ten classes with nothing in them to learn."""
    import numpy as np

    from cifar_lab.dataset import SIDE, ImageSet, image_moments

    images = np.random.default_rng(0).integers(0, 256, (count, 3, SIDE, SIDE), dtype=np.uint8)
    labels = torch.arange(count) % 10
    moments = torch.from_numpy(image_moments(images))
    return ImageSet(torch.from_numpy(images), labels, moments, tuple("0123456789"))


def augment_ratio(fields: dict[str, Any], count: int = 5_000) -> float:
    """Images a second, augmented and normalised, over those of torchvision's per-image loader with the same transforms.

    Its workers are running when the first image is wanted. Both give float batches on the CPU.

    Args:
        fields: the recipe's, of the augmentation.
        count: images a pass.
    """

    def spent(epoch: Callable[[], Iterable[Tensor]]) -> float:
        return timed(lambda: [None for _ in epoch()])

    ours, theirs = epochs(Recipe(val_fraction=0, batch_size=LOADER_BATCH, **fields), noise(count))
    ratios = [spent(theirs) / spent(ours) for _ in range(machine.REPEATS + 1)]
    return statistics.median(ratios[1:])


def epochs(recipe: Recipe, images: ImageSet) -> tuple[Callable[[], Iterator[Tensor]], Callable[[], Iterator[Tensor]]]:
    """An epoch's batches (N, 3, 32, 32) float of crop, flip and rotation: ours, and those of torchvision's loader."""
    from torchvision import transforms

    from cifar_lab.data import CIFAR10DataModule

    data = CIFAR10DataModule(recipe, images)
    turned = [transforms.RandomRotation(recipe.rotate, transforms.InterpolationMode.BILINEAR)] if recipe.rotate else []
    change = transforms.Compose(
        [
            transforms.RandomCrop(32, recipe.crop),
            transforms.RandomHorizontalFlip(),
            *turned,
            transforms.ToTensor(),
            transforms.Normalize(data.mean.tolist(), data.std.tolist()),
        ]
    )
    loader = DataLoader(
        Pictures(images, change),
        LOADER_BATCH,
        shuffle=True,
        num_workers=LOADER_WORKERS,
        persistent_workers=True,
        multiprocessing_context="fork",  # as on Linux by default until Python 3.14
    )

    def theirs() -> Iterator[Tensor]:
        for pixels, _ in loader:
            yield pixels

    return own_epoch(data, torch.device("cpu")), theirs


def own_epoch(data: CIFAR10DataModule, here: torch.device) -> Callable[[], Iterator[Tensor]]:
    """An epoch of our batches, normalised, on a device."""
    from cifar_lab.dataset import normalise

    data.images, data.labels = data.set.images.to(here), data.set.labels.to(here)
    mean, std = data.mean[:, None, None].to(here), data.std[:, None, None].to(here)
    batches = data.train_dataloader()

    def epoch() -> Iterator[Tensor]:
        for pixels, _ in batches:
            yield normalise(pixels, mean, std)

    return epoch


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images with their labels, one at a time, as torchvision's datasets give them."""

    def __init__(self, images: ImageSet, change: Callable[[Any], Tensor]) -> None:
        self.pixels: np.ndarray = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels: list[int] = images.labels.tolist()
        self.change = change

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.change(Image.fromarray(self.pixels[index])), self.labels[index]


def batch_seconds(recipe: Recipe, threads: int, batches: int = 20) -> float:
    """Median seconds in which a batch is made, where it is trained on: drawn, augmented, normalised.

    Args:
        recipe: batch size and augmentation.
        threads: CPU threads.
        batches: an epoch's, of which the mean is taken.
    """
    from cifar_lab.data import CIFAR10DataModule

    data = CIFAR10DataModule(recipe.replace(val_fraction=0), noise(recipe.batch_size * batches))
    epoch = own_epoch(data, machine.device())
    with machine.threads_limited(threads):
        seconds = [timed(lambda: [None for _ in epoch()]) for _ in range(machine.REPEATS + 1)]
    return statistics.median(seconds[1:]) / batches


def record_seconds(recipe: Recipe) -> float:
    """Median seconds of what `fit` does after an epoch: its row, and the best and the last checkpoint."""
    from pytorch_lightning.callbacks import Callback

    from cifar_lab.checkpoint import Row
    from cifar_lab.data import CIFAR10DataModule
    from cifar_lab.fit import fit

    recipe = recipe.replace(val_fraction=0, max_epochs=machine.REPEATS, lr=1e-6, precision="32")
    began: list[float] = []
    seconds: list[float] = []

    class Begin(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            began.append(time.perf_counter())

    def end(row: Row) -> None:
        seconds.append(time.perf_counter() - began[-1])

    with tempfile.TemporaryDirectory() as folder, progress.hushed():
        fit(recipe, folder, on_epoch=end, callbacks=[Begin()], data=CIFAR10DataModule(recipe, noise(20)))
    return statistics.median(seconds)


def lightning_ratio(recipe: Recipe, count: int = 0) -> float:
    """Seconds of an epoch's training loop in `fit` over those of a bare loop of the same steps, without any metric.

    The two take turns, an epoch each. Validation and checkpoints, which a bare loop may have or not, are not in it.

    Args:
        recipe: what is trained, at a learning rate so small that no epoch of it diverges, which would be its last.
        count: images an epoch, a second's worth where 0.
    """
    import torch.nn.functional as F
    from pytorch_lightning.callbacks import Callback

    from cifar_lab import optim
    from cifar_lab.data import CIFAR10DataModule
    from cifar_lab.dataset import normalise
    from cifar_lab.fit import fit
    from cifar_lab.layers import memory_format
    from cifar_lab.models import build

    recipe = recipe.replace(val_fraction=0, max_epochs=machine.REPEATS + 1, lr=1e-6)
    recipe = machine.measured(recipe)
    seconds = machine.step_seconds(recipe, recipe.precision)
    count = count or recipe.batch_size * max(10, round(1 / seconds))
    data = CIFAR10DataModule(recipe, noise(count))
    here = machine.device()
    mean, std = data.mean[:, None, None].to(here), data.std[:, None, None].to(here)
    network = build(recipe, len(data.classes))
    layout = memory_format(network, recipe.memory_format)
    network = network.to(here, memory_format=layout)  # type: ignore[call-overload]
    network.train()
    optimizer = optim.optimizer(recipe, network.parameters())

    def bare() -> None:
        for images, labels in data.train_dataloader():
            with torch.autocast(here.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
                logits = network(normalise(images, mean, std).contiguous(memory_format=layout))
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    ratios: list[float] = []

    class Turns(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            if here.type == "cuda":
                torch.cuda.synchronize()
            own = time.perf_counter() - self.start
            ratios.append(own / timed(bare))

    # On a terminal Lightning's loop would draw a bar, and be timed with it.
    with tempfile.TemporaryDirectory() as folder, progress.hushed():
        fit(recipe, folder, callbacks=[Turns()], data=data)
    return statistics.median(ratios[1:])


def table(found: dict[str, Any]) -> str:
    """The figures as text, at most 80 wide."""
    peaks = found["gemm_tflops_by_precision"]
    lines = [cli.paragraph(f"{found['hardware']}; torch {found['versions']['torch']}"), ""]
    lines += [f"matrix product, {name:>4}  {peak:10.2f} TFLOP/s" for name, peak in peaks.items()]
    asked = f"batches of {found['batch_size']}, {found['threads']} thread{'s' * (found['threads'] > 1)}"
    lines += ["", f"forward and backward, {asked}; images/s, of the product"]
    lines.append(f"{'':18}" + "".join(f"{name:>12}{'':>8}" for name in peaks))
    for arch, speeds in found["images_per_second"].items():
        shares = found["peak_fraction"][arch]
        lines.append(f"{arch:18}" + "".join(f"{speeds[name]:12,.0f}{shares[name]:8.0%}" for name in peaks))
    if "compiled_ratios" in found:
        lines += ["", "seconds of that pass over those of the network compiled"]
        lines += [f"{arch:18}{ratio:12.2f}" for arch, ratio in found["compiled_ratios"].items()]
    lines += ["", "images/s over those of torchvision's loader with two workers"]
    lines += [f"{name:18}{ratio:12.1f}" for name, ratio in found["augment_ratios"].items()]
    lines += ["", "seconds of making a batch over those of training on it, as its recipe augments"]
    lines += [f"{arch:18}{share:12.1%}" for arch, share in found["data_shares"].items()]
    if "record_share" in found:
        lines += ["", "seconds of an epoch's checkpoints and row over those of its training"]
        lines.append(f"{'resnet':18}{found['record_share']:12.2%}")
    lines += ["", "seconds of Lightning's loop over those of a bare one"]
    lines += [f"{name:18}{ratio:12.3f}" for name, ratio in found["lightning_ratios"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
