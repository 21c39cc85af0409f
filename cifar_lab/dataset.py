"""Dataset: its parts, decoded once to uint8 tensors, split."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from cifar_lab import progress
from cifar_lab.files import cache_folder
from cifar_lab.recipe import InputError, Recipe

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
SAMPLE = 512
ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
READING = b"2"  # another number wherever images are decoded otherwise than before: older caches are then left alone
Part = Literal["train", "test"]
Decoded = tuple[np.ndarray, np.ndarray, tuple[str, ...]]  # images (N, 3, 32, 32) uint8, labels (N,) int64, classes


class DataError(InputError):
    """The images are absent, unreadable, or too few for what was asked."""


@dataclass(frozen=True)
class ImageSet:
    """One part of a dataset, memory-mapped: every process on a machine shares the same pages.

    images (N, 3, 32, 32) uint8, labels (N,) int64, moments (N, 2, 3) int64: each image's sum of pixels and of squares.
    """

    images: Tensor
    labels: Tensor
    moments: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def load(recipe: Recipe, part: Part) -> ImageSet:
    """A part of the recipe's dataset, decoded the first time it is asked for, by one process while the others wait.

    Raises:
        DataError: absent or unreadable images; the message names the ways out.
    """
    return opened(decoded(recipe, part))


def decoded(recipe: Recipe, part: Part) -> Path:
    """The folder in the cache with a part of the recipe's dataset, decoded if it was not yet.

    Raises:
        DataError: absent or unreadable images.
    """
    digest = hashlib.sha256(READING)
    try:
        files, decode = _source(recipe, part)
        for file in files:
            status = file.stat()
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    except OSError as error:
        raise DataError(f"The images cannot be read: {error}.") from error
    folder = cache_folder() / f"{recipe.dataset}-{part}-{digest.hexdigest()[:16]}"
    if not folder.exists():
        _decode_into(folder, decode)
    return folder


def received(name: str, fetch: Callable[[], Decoded]) -> ImageSet:
    """A set that another machine decoded, and has in its cache under this name; fetched once, then in this cache.

    Raises:
        DataError: the cache cannot be written or read.
    """
    folder = cache_folder() / name
    if not folder.exists():
        _decode_into(folder, fetch)
    return opened(folder)


def opened(folder: Path) -> ImageSet:
    """The decoded images in a folder of the cache.

    Raises:
        DataError: they are unreadable.
    """
    try:
        arrays = [
            torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in ("images", "labels", "moments")
        ]
        classes = tuple(json.loads((folder / "classes.json").read_text()))
    except (OSError, ValueError) as error:
        raise DataError(f"The decoded images in {folder} are unreadable ({error}). Delete that folder.") from error
    images, labels, moments = arrays
    return ImageSet(images, labels, moments, classes)


def image_moments(images: np.ndarray) -> np.ndarray:
    """Each image's sum of pixels and of their squares: (N, 3, H, W) uint8 to (N, 2, 3) int64."""
    wide = images.reshape(len(images), 3, -1).astype(np.int64)
    return np.stack([wide.sum(2), (wide**2).sum(2)], 1)


def _decode_into(folder: Path, decode: Callable[[], Decoded]) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.exists():
                return
            images, labels, classes = decode()
            moments = image_moments(images)
            # Written aside and renamed, so that a killed decode leaves nothing that looks whole.
            aside = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                for name, array in (("images", images), ("labels", labels), ("moments", moments)):
                    np.save(aside / f"{name}.npy", array)
                (aside / "classes.json").write_text(json.dumps(classes))
                aside.rename(folder)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"The cache {folder.parent} cannot be written ({error.strerror or error}); name another "
            "with XDG_CACHE_HOME."
        ) from error


def _source(recipe: Recipe, part: Part) -> tuple[list[Path], Callable[[], Decoded]]:
    """The files that a part consists of, and what decodes them."""
    if recipe.dataset == "digits":
        return [], lambda: _digits(part)
    place = recipe.data_dir or os.environ.get("CIFAR_LAB_DATA")
    flag = "--data_dir" if recipe.data_dir else "CIFAR_LAB_DATA"
    ways = (
        "Three ways out: leave --data_dir and CIFAR_LAB_DATA unset, and cifar10 is downloaded; name a folder "
        "that holds cifar-10-python.tar.gz, or train/CLASS/ and test/CLASS/ with images; or take the embedded "
        "--dataset digits."
    )
    if place and not Path(place).is_dir():
        raise DataError(f"{flag}: {place!r} is no folder. {ways}")
    if place and (Path(place) / part).is_dir():
        return _tree(recipe.dataset, Path(place) / part)
    if recipe.dataset == "folder":
        raise DataError(
            f"--dataset folder wants {part}/CLASS/*.png below --data_dir; {place!r} has no folder {part!r}. {ways}"
        )
    root = Path(place) if place else cache_folder() / "downloads"
    return _archive(root, download=not place, part=part, ways=ways, flag=flag)


def _digits(part: Part) -> Decoded:
    """scikit-learn's 1,797 scans, 8x8 in 0..16, as 32x32 RGB; 360 of them, stratified, are the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    chosen = np.sort(train if part == "train" else test)
    small = torch.from_numpy(scans[chosen].reshape(-1, 1, 8, 8) * (255 / 16)).float()
    large = torch.nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous().numpy()
    return images, labels[chosen].astype(np.int64), tuple("0123456789")


def _tree(dataset: str, root: Path) -> tuple[list[Path], Callable[[], Decoded]]:
    """A folder a class, as `torchvision.datasets.ImageFolder` reads it."""
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if dataset == "cifar10" and tuple(classes) != CIFAR10_CLASSES:
        raise DataError(
            f"{root} holds the folders {', '.join(classes) or 'none'}; --dataset cifar10 wants exactly "
            f"{', '.join(CIFAR10_CLASSES)}. For classes of your own take --dataset folder."
        )
    if len(classes) < 2:
        raise DataError(f"{root} holds {len(classes)} folders; a class is a folder, and at least 2 are needed.")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = images_in(root / name)
        if not found:
            raise DataError(f"{root / name} holds no image ({', '.join(ENDINGS)}).")
        files += found
        labels += [label] * len(found)

    def decode() -> Decoded:
        return _images(root, files, resize=dataset != "cifar10"), np.array(labels, np.int64), tuple(classes)

    return files, decode


def read_folder(root: Path, classes: Sequence[str]) -> tuple[list[Path], Tensor, Tensor]:
    """The files of a folder of one's own, root/CLASS/*.png, their images (N, 3, 32, 32) uint8 and labels (N,) int64.

    The labels count the `classes` in their order; a class may be left out.

    Raises:
        DataError: no such folder, no image in it, one that is unreadable, or a class that is none of `classes`.
    """
    legal = f"Legal: a folder of folders of images, named {', '.join(classes)}, or some of them."
    try:
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        if unknown := [name for name in found if name not in classes]:
            raise DataError(
                f"images: {str(root)!r} holds the folders {', '.join(unknown)}, which are no classes here. {legal}"
            )
        labeled = [(file, classes.index(name)) for name in found for file in images_in(root / name)]
    except OSError as error:
        raise DataError(f"images: {str(root)!r} cannot be read ({error.strerror}). {legal}") from error
    if not labeled:
        raise DataError(f"images: {str(root)!r} holds no image in a class's folder. {legal}")
    files = [file for file, _ in labeled]
    return files, torch.from_numpy(_images(root, files, resize=True)), torch.tensor([label for _, label in labeled])


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder, known by their endings, sorted; not those in folders below it."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)


def _images(root: Path, files: Sequence[Path], *, resize: bool) -> np.ndarray:
    """Image files below root as (N, 3, 32, 32) uint8; another size is refused, or resized."""
    images = np.empty((len(files), 3, SIDE, SIDE), np.uint8)
    with progress.Bar(f"decoding {root.name}", len(files)) as bar:
        for i, file in enumerate(files):
            bar.reached(i)
            images[i] = _pixels(file, resize)
    return images


def _pixels(file: Path, resize: bool) -> np.ndarray:
    """An image, (3, 32, 32) uint8."""
    try:
        image = read_image(file)
    except DataError as error:
        raise DataError(f"{error} Mend or remove it.") from error
    if not resize and image.size != (SIDE, SIDE):
        raise DataError(
            f"{file} is {image.size[0]}x{image.size[1]}, cifar10's images are 32x32. Take --dataset folder."
        )
    return resized(image)


def read_image(file: Path) -> Image.Image:
    """An image file in RGB, its first frame: upright as its EXIF says, on white where it is transparent, 16 bits as 8.

    Raises:
        DataError: it is absent, unreadable, cut off, or so large (Pillow's limit) that it may be a decompression bomb.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.init()
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError("it is neither a file nor a folder with images")
        # What is merely odd about a file is not worth a warning; what cannot be decoded raises.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # An EPS is a program, which Pillow has Ghostscript run, whatever the file's ending.
            with Image.open(file, formats=[name for name in Image.OPEN if name != "EPS"]) as stored:
                image = ImageOps.exif_transpose(stored)
                if image.mode.startswith("I"):  # Pillow itself would clip 16 bits at 255
                    image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
                if image.mode == "F":
                    raise ValueError("its pixels are floating-point numbers, of which none is known to be white")
                if image.has_transparency_data:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                return image.convert("RGB")
    except Exception as error:  # a damaged file can raise anything
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None)
        raise DataError(f"{file} is not a readable image ({reason or error or type(error).__name__}).") from error


def resized(image: Image.Image) -> np.ndarray:
    """An RGB image as (3, 32, 32) uint8: resized bilinearly; one that is not square is squeezed, not cropped."""
    return np.array(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def _archive(
    root: Path, *, download: bool, part: Part, ways: str, flag: str
) -> tuple[list[Path], Callable[[], Decoded]]:
    """torchvision's CIFAR-10: an archive, or what it unpacks to, MD5-checked."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    archive, unpacked = root / CIFAR10.filename, root / CIFAR10.base_folder
    if not download and not archive.exists() and not unpacked.is_dir():
        raise DataError(f"{flag}: {str(root)!r} holds neither {CIFAR10.filename} nor a folder {part!r}. {ways}")

    def decode() -> Decoded:
        try:
            if download:
                root.mkdir(parents=True, exist_ok=True)
                # torchvision draws a bar of its own; the other part may be wanted at the same time.
                silence = contextlib.nullcontext() if progress.shown() else contextlib.redirect_stderr(io.StringIO())
                with FileLock(root / "lock"), silence:
                    whole = CIFAR10(str(root), train=part == "train", download=True)
            elif unpacked.is_dir():
                whole = CIFAR10(str(root), train=part == "train")
            else:
                # A named folder is read, never written to: its archive is unpacked elsewhere.
                if not check_integrity(str(archive), CIFAR10.tgz_md5):
                    raise DataError(f"{archive} is damaged: its MD5 is not {CIFAR10.tgz_md5}. {ways}")
                with tempfile.TemporaryDirectory(dir=cache_folder()) as aside:
                    extract_archive(str(archive), aside)
                    whole = CIFAR10(aside, train=part == "train")
        except (OSError, RuntimeError, EOFError) as error:
            raise DataError(f"CIFAR-10 could not be had from {root}: {error}. {ways}") from error
        images = np.ascontiguousarray(whole.data.transpose(0, 3, 1, 2))
        return images, np.array(whole.targets, np.int64), CIFAR10_CLASSES

    if download:
        return [], decode  # its content is known by its MD5
    return (sorted(p for p in unpacked.iterdir() if p.is_file()) if unpacked.is_dir() else [archive]), decode


def split(labels: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the validation images, stratified; the same in every process.

    Raises:
        DataError: the fractions or the limit leave a class without images, or ask for more than there are.
    """
    from sklearn.model_selection import StratifiedKFold, train_test_split

    classes = labels.numpy()
    everything, fraction, seed = np.arange(len(classes)), recipe.val_fraction, recipe.split_seed
    if not recipe.validated:
        everything = _limited(everything, classes, recipe.limit_train, seed, "the training set")
        return torch.from_numpy(everything), torch.empty(0, dtype=torch.int64)
    if recipe.folds is not None:
        chosen = _limited(everything, classes, recipe.limit_train, seed, "the training set")
        if (fewest := int(np.bincount(classes[chosen]).min())) < recipe.folds:
            raise DataError(f"folds: {recipe.folds}. Legal: 2 to {fewest}, the images of the smallest class.")
        parts = StratifiedKFold(recipe.folds, shuffle=True, random_state=seed).split(chosen, classes[chosen])
        train, validation = list(parts)[recipe.fold]
        return torch.from_numpy(chosen[train]), torch.from_numpy(chosen[validation])
    try:
        train, validation = train_test_split(everything, test_size=fraction, stratify=classes, random_state=seed)
    except ValueError as error:
        counts = np.bincount(classes)
        raise DataError(
            f"val_fraction: {fraction} cannot be drawn, stratified, from {len(classes)} images in {len(counts)} "
            f"classes of {counts.min()} to {counts.max()} ({error})."
        ) from error
    train = _limited(np.sort(train), classes, recipe.limit_train, seed, "the training part")
    return torch.from_numpy(train), torch.from_numpy(np.sort(validation))


def _limited(indices: np.ndarray, classes: np.ndarray, count: int | None, seed: int, whole: str) -> np.ndarray:
    """A stratified draw of `count`, or all; a smaller draw is part of a larger one, and no class is left out."""
    if count is None:
        return indices
    labels = classes[indices]
    fewest = len(np.unique(classes))
    if not fewest <= count <= len(indices):
        raise DataError(f"limit_train: {count}. Legal: {fewest}, one a class, to {len(indices)}, {whole}.")
    order = np.random.default_rng(seed).permutation(len(indices))
    place = np.empty(len(indices))
    for label in np.unique(labels):
        own = order[labels[order] == label]
        place[own] = np.arange(len(own)) / len(own)
    return np.sort(indices[order[np.argsort(place[order], kind="stable")[:count]]])


def statistics(moments: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation a channel, (3,) float in 0..1, of the images whose moments these are."""
    if normalize == "none":
        return torch.zeros(3), torch.ones(3)
    if normalize == "half":
        return torch.full((3,), 0.5), torch.full((3,), 0.5)
    total, squares = moments.sum(0).double()
    pixels = len(moments) * SIDE * SIDE
    mean = total / pixels
    std = (squares / pixels - mean**2).clamp_min(0).sqrt()
    # A channel that never varies is left unscaled rather than divided by zero.
    std = torch.where(std > 0, std, 255.0)
    return (mean / 255).float(), (std / 255).float()


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images (N, 3, 32, 32), uint8 or float in 0..1, less `mean`, over `std`, both (3, 1, 1)."""
    if images.is_floating_point():
        return (images - mean) / std
    return images.float().sub_(mean * 255).mul_(1 / (std * 255))


class TrainingSet:
    """The recipe's images: the 90:10 split and the statistics of its training part.

    The test set is not here: it belongs to `evaluate`.

    Args:
        recipe: which images, split how.
        images: the whole training set, where it is at hand already.

    Raises:
        DataError: the images are absent, unreadable, or too few for the split.
    """

    def __init__(self, recipe: Recipe, images: ImageSet | None = None) -> None:
        self.set = load(recipe, "train") if images is None else images
        self.train_indices, self.val_indices = split(self.set.labels, recipe)
        self.mean, self.std = statistics(self.set.moments[self.train_indices], recipe.normalize)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the labels."""
        return self.set.classes

    def sample(self) -> Tensor:
        """Some training images, (n, 3, 32, 32) float, normalised: what a network may see before it starts."""
        n = len(self.train_indices)
        chosen = self.train_indices[torch.linspace(0, n - 1, min(n, SAMPLE)).long()]
        return normalise(self.set.images[chosen], self.mean[:, None, None], self.std[:, None, None])
