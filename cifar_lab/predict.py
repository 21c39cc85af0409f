"""Predict the classes of your own images, with heat maps of why; python -m cifar_lab.predict."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_lab import cli, progress
from cifar_lab.recipe import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from cifar_lab.classifier import ImageClassifier

PATCH, STRIDE = 8, 2  # pixels: side of the square that hides, and how far it moves
TOP = 5


@dataclass(frozen=True)
class Prediction:
    """What a checkpoint says of an image file: pixels (3, 32, 32) uint8 as the network saw them, probabilities (C,).

    Of a file that could not be read there are neither, but an `error`; of one that could not be drawn there are all.
    """

    image: Path
    classes: tuple[str, ...]
    pixels: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    error: str | None = None

    def top(self, count: int = TOP) -> list[tuple[str, float]]:
        """The most probable classes, each with its probability, the first one the prediction."""
        if self.probabilities is None:
            return []
        order = (-self.probabilities).argsort(kind="stable")[:count]
        return [(self.classes[i], float(self.probabilities[i])) for i in order]


def predict(checkpoint: Path | str, images: Path | str | Iterable[Path | str]) -> list[Prediction]:
    """A checkpoint's answers on image files of any size and mode.

    Each is read as the images of `--dataset folder` are, by the same code: its first frame, upright as its EXIF says,
    on white where it is transparent, in RGB, resized to 32x32 bilinearly; one that is not square is squeezed, not
    cropped. The probabilities are those that `cifar_lab.evaluate` writes for the same images.

        for answer in predict("checkpoints/best.ckpt", ["cat.jpg", "holiday/"]):
            print(answer.image, answer.error or answer.top(3))

    Args:
        checkpoint: a file that `fit` left.
        images: a file or several; a folder stands for the images in it, sorted by name.

    Returns:
        A Prediction a file, in their order; a file that cannot be read has its error there and stops no other.

    Raises:
        CheckpointError: no such checkpoint, or it is damaged, or its training had diverged.
    """
    from cifar_lab.fit import restore

    return _predictions(restore(Path(checkpoint)), [images] if isinstance(images, (Path, str)) else images)


def heat_map(
    checkpoint: Path | str, image: Path | str, method: str = "occlusion", label: str | None = None
) -> np.ndarray:
    """Which parts of an image speak for a class, (32, 32) float, over the image as the network saw it.

    Args:
        checkpoint: a file that `fit` left.
        image: a file, read as `predict` reads it.
        method: occlusion, see `occlusion`; gradcam, see `gradcam`.
        label: the class's name; unset: the most probable one.

    Raises:
        CheckpointError: no such checkpoint, or it is damaged.
        DataError: the image cannot be read.
        InputError: no such class or method, or the network's last convolution leaves gradcam no map.
    """
    import torch

    from cifar_lab.dataset import read_image, resized
    from cifar_lab.evaluate import probabilities
    from cifar_lab.fit import restore

    if method not in METHODS:
        raise InputError(f"method: {method!r}. Legal: {', '.join(METHODS)}.")
    model = restore(Path(checkpoint))
    if label is not None and label not in model.classes:
        raise InputError(f"label: {label!r}. Legal: {', '.join(model.classes)}.")
    seen = torch.from_numpy(resized(read_image(Path(image))))
    place = int(probabilities(model, seen[None])[0].argmax()) if label is None else model.classes.index(label)
    return METHODS[method](model, seen, place)


def occlusion(model: ImageClassifier, image: Tensor, label: int) -> np.ndarray:
    """How far a class's probability falls when a square of the mean color hides a place; negative where it rises.

    A pixel's value is the mean over all squares of 8x8, 2 pixels apart, that hide it. Image (3, 32, 32) uint8 to
    (32, 32) float.

    Source: Zeiler and Fergus 2014, "Visualizing and understanding convolutional networks". Deviation: the mean over
    overlapping squares instead of the value at a square's center.
    """
    import numpy as np
    import torch

    from cifar_lab.dataset import SIDE
    from cifar_lab.evaluate import probabilities

    corners = range(0, SIDE - PATCH + 1, STRIDE)
    squares = [(slice(y, y + PATCH), slice(x, x + PATCH)) for y in corners for x in corners]
    hidden = image.repeat(1 + len(squares), 1, 1, 1)  # the first one stays as it is
    color = (model.mean * 255).round().to(torch.uint8)
    for copy, (rows, columns) in zip(hidden[1:], squares, strict=True):
        copy[:, rows, columns] = color
    probable = probabilities(model, hidden)[:, label].astype(float)
    total, covered = np.zeros((SIDE, SIDE)), np.zeros((SIDE, SIDE))
    for place, fall in zip(squares, probable[0] - probable[1:], strict=True):
        total[place] += fall
        covered[place] += 1
    return total / covered


def gradcam(model: ImageClassifier, image: Tensor, label: int) -> np.ndarray:
    """Where the last convolution's map speaks for a class, relative to the place that does so most: 0 to 1.

    The map is taken as it leaves the block that the convolution is in, before it is pooled, with its activation and
    with the branches beside it; it is enlarged bilinearly. Computed in 32 bits. Image (3, 32, 32) uint8 to (32, 32)
    float.

    Source: Selvaraju et al. 2017, "Grad-CAM: visual explanations from deep networks via gradient-based localization".

    Raises:
        InputError: that map is a single pixel, or there is no convolution.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn

    from cifar_lab.dataset import SIDE

    # All that a module returned, in the order in which they ended: a block ends after the convolutions in it.
    made: list[tuple[nn.Module, Tensor]] = []
    hooks = [layer.register_forward_hook(lambda layer, _, out: made.append((layer, out))) for layer in model.modules()]
    try:
        with torch.enable_grad():
            # A frozen network's maps have gradients too if the image has.
            logits = model((image[None].float() / 255).requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    last = max((i for i, (layer, _) in enumerate(made) if isinstance(layer, nn.Conv2d)), default=None)
    size = (1, 1) if last is None else tuple(made[last][1].shape[2:])
    if last is None or max(size) == 1:
        raise InputError(
            f"map: gradcam has no places to tell apart: the last convolution of this {model.recipe.arch} leaves a map "
            f"of {size[0]}x{size[1]}. Legal: occlusion, which works for every network."
        )
    features = [out for _, out in made[last:] if tuple(out.shape[2:]) == size][-1]
    (gradient,) = torch.autograd.grad(logits[0, label], features)
    weighted = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu().detach()
    large = F.interpolate(weighted, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0, 0]
    heat: np.ndarray = (large / large.max().clamp_min(torch.finfo(large.dtype).tiny)).numpy().astype(np.float64)
    return heat


METHODS = {"occlusion": occlusion, "gradcam": gradcam}


def _predictions(model: ImageClassifier, images: Iterable[Path | str]) -> list[Prediction]:
    import numpy as np
    import torch

    from cifar_lab.checkpoint import CheckpointError
    from cifar_lab.dataset import DataError, read_image, resized
    from cifar_lab.evaluate import probabilities

    files = _files(images)
    seen: dict[int, np.ndarray] = {}
    errors: dict[int, str] = {}
    with progress.Bar("reading", len(files)) as bar:
        for i, file in enumerate(files):
            bar.reached(i)
            try:
                seen[i] = resized(read_image(file))
            except DataError as error:
                errors[i] = str(error)
    answers: dict[int, np.ndarray] = {}
    if seen:
        probable = probabilities(model, torch.from_numpy(np.stack(list(seen.values()))))
        if not np.isfinite(probable).all():
            raise CheckpointError("The checkpoint's answers are not numbers: its training had diverged.")
        answers = dict(zip(seen, probable, strict=True))
    return [Prediction(file, model.classes, seen.get(i), answers.get(i), errors.get(i)) for i, file in enumerate(files)]


def _files(images: Iterable[Path | str]) -> list[Path]:
    """The files, a folder replaced by the images in it; one that has none or cannot be read stays, to be refused."""
    from cifar_lab.dataset import images_in

    files: list[Path] = []
    for place in map(Path, images):
        try:
            files += (images_in(place) if place.is_dir() else []) or [place]
        except OSError:
            files.append(place)
    return files


def main(argv: Sequence[str]) -> int:
    """The command: the most probable classes of each image, printed, or as JSON; heat maps in --output."""
    parser = cli.Parser(prog="python -m cifar_lab.predict", description=(__doc__ or ""), allow_abbrev=False)
    parser.add_argument("checkpoint", help="a .ckpt file that cifar_lab.train or tune.asha left")
    parser.add_argument("images", nargs="+", help="image files of any size, or folders of them; resized to 32x32")
    parser.add_argument("--map", choices=[*METHODS, "both"], help="draw which parts of each image speak for its class")
    parser.add_argument("--output", help="folder for the drawings of --map, none of which is overwritten")
    said = parser.add_mutually_exclusive_group()
    said.add_argument("--json", action="store_true", help="print JSON alone")
    said.add_argument("--quiet", action="store_true", help="print nothing but each image's most probable class")
    asked = parser.parse_args(list(argv))
    if (asked.map is None) != (asked.output is None):
        raise InputError("--map and --output belong together: what to draw, and the folder for it.")
    import torch

    from cifar_lab.dataset import SIDE
    from cifar_lab.fit import identity, restore

    checkpoint = Path(asked.checkpoint)
    model = restore(checkpoint)
    methods = [] if asked.map is None else list(METHODS) if asked.map == "both" else [asked.map]
    if "gradcam" in methods:  # what the network cannot give is refused before any image is read
        gradcam(model, torch.zeros(3, SIDE, SIDE, dtype=torch.uint8), 0)
    if methods:
        cli.make_folder(Path(asked.output), asked.output, "output")
    answers = _predictions(model, asked.images)
    drawn: dict[int, Path] = {}
    if methods:
        answers, drawn = _draw(model, answers, methods, Path(asked.output))
    if asked.json:
        records = [_record(answer, drawn.get(i)) for i, answer in enumerate(answers)]
        print(cli.as_json({"model": identity(model, checkpoint), "images": records}))
    else:
        for i, answer in enumerate(answers):
            _print(answer, drawn.get(i), quiet=asked.quiet)
    return cli.FAILED if any(answer.error for answer in answers) else cli.DONE


def _draw(
    model: ImageClassifier, answers: Sequence[Prediction], methods: Sequence[str], folder: Path
) -> tuple[list[Prediction], dict[int, Path]]:
    """Draw each image that was read beside its maps; the drawings, by the image's place among the answers.

    A drawing that cannot be written is its answer's error and stops no other.

    Raises:
        InputError: one of them is there already.
    """
    import torch

    from cifar_lab import plots

    answers, drawn = list(answers), _drawings(answers, methods, folder)
    for i, place in list(drawn.items()):
        answer = answers[i]
        assert answer.pixels is not None and answer.probabilities is not None
        image, label = torch.from_numpy(answer.pixels), int(answer.probabilities.argmax())
        maps = {method: METHODS[method](model, image, label) for method in methods}
        name, probability = answer.top(1)[0]
        try:
            plots.save(plots.explained(answer.pixels, maps, f"{name}, {probability:.1%}"), place)
        except OSError as error:
            with contextlib.suppress(OSError):
                place.unlink()  # what a full disk took of it
            said = f"{answer.image}: its drawing {place} cannot be written ({error.strerror})."
            answers[i] = replace(answer, error=said)
            del drawn[i]
    return answers, drawn


def _drawings(answers: Sequence[Prediction], methods: Sequence[str], folder: Path) -> dict[int, Path]:
    """Where the drawing of each image that was read goes, all of them new."""
    there = {place.name for place in folder.iterdir()}
    drawings: dict[int, Path] = {}
    used: Counter[str] = Counter()
    for i, answer in enumerate(answers):
        if answer.pixels is None:
            continue
        stem = f"{answer.image.stem}-{'-'.join(methods)}"
        used[stem] += 1  # two folders may hold images of the same name
        drawings[i] = folder / (f"{stem}.png" if used[stem] == 1 else f"{stem}-{used[stem]}.png")
        if drawings[i].name in there:
            raise InputError(
                f"output: {str(drawings[i])!r} exists already, and results are never overwritten. Name another folder."
            )
    return drawings


def _record(answer: Prediction, drawn: Path | None) -> dict[str, Any]:
    """An image's entry in the JSON."""
    record: dict[str, Any] = {"image": str(answer.image)}
    if top := answer.top():
        record["top"] = [{"class": name, "probability": probability} for name, probability in top]
    if drawn is not None:
        record["map"] = str(drawn)
    return record if answer.error is None else record | {"error": answer.error}


def _print(answer: Prediction, drawn: Path | None, *, quiet: bool) -> None:
    top = answer.top()
    if top and quiet:
        print(f"{_shown(top[0][0])}\t{_shown(answer.image)}")
    elif top:
        print(_shown(answer.image))
        for name, probability in top:
            print(f"  {probability:6.1%}  {_shown(name)}")
        if drawn is not None:
            print(f"  {_shown(drawn)}")
    if answer.error is not None:
        print(f"error: {_shown(answer.error)}", file=sys.stderr)


def _shown(text: object) -> str:
    """A name on one line, whatever characters it has: a file's may hold line breaks or be no text at all."""
    return "".join(c if c.isprintable() else "�" for c in str(text))


if __name__ == "__main__":
    cli.run(main)
