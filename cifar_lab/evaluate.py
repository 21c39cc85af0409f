"""Evaluate a checkpoint: the only reader of the test set; python -m cifar_lab.evaluate."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_lab import cli
from cifar_lab.recipe import InputError, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from cifar_lab.classifier import ImageClassifier
    from cifar_lab.dataset import ImageSet
    from cifar_lab.recipe import Recipe

CONFIDENCE = 0.95
MISTAKES = 16  # shown of the most confident ones


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95% Wilson interval of a proportion, fractions. Source: Wilson 1927, through scipy."""
    from scipy.stats import binomtest

    interval = binomtest(int(correct), int(n)).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% Student t interval of the mean of two or more values."""
    import numpy as np
    from scipy.stats import t

    n, mean, spread = len(values), float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * spread / n**0.5
    return mean - half, mean + half


def accuracy_interval(accuracies: Sequence[float]) -> tuple[float, float]:
    """The t interval of the mean accuracy of two or more seeds or folds, cut off at 0 and 1."""
    low, high = t_interval(accuracies)
    return max(low, 0.0), min(high, 1.0)


def confident_mistakes(labels: np.ndarray, predictions: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """The indices of the MISTAKES wrong predictions with the highest confidence, the surest first; all (N,)."""
    surest: np.ndarray = (-confidence).argsort(kind="stable")
    wrong: np.ndarray = surest[(predictions != labels)[surest]]
    return wrong[:MISTAKES]


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint's answers on a set of images.

    labels (N,) int, probabilities (N, C) float, class names; images (N, 3, 32, 32) uint8, where they are at hand.
    `with_tta` are the answers to the same images with the test-time augmentation `tta`; all else here is without.
    `files` name the images where they are not the test set.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]
    images: Tensor | None = None
    tta: str = "none"
    with_tta: Evaluation | None = None
    files: tuple[str, ...] | None = None

    @property
    def predictions(self) -> np.ndarray:
        """The most probable class of each image, (N,) int."""
        most: np.ndarray = self.probabilities.argmax(1)
        return most

    @property
    def correct(self) -> int:
        """How many images have the most probable class as their label."""
        return int((self.predictions == self.labels).sum())

    @property
    def accuracy(self) -> float:
        """Fraction of images whose label is the most probable class."""
        return self.correct / len(self.labels)

    @property
    def interval(self) -> tuple[float, float]:
        """The accuracy's 95% Wilson interval."""
        return wilson(self.correct, len(self.labels))

    def confusion(self) -> np.ndarray:
        """Counts (C, C), true classes in the rows, predicted ones in the columns."""
        from sklearn.metrics import confusion_matrix

        counts: np.ndarray = confusion_matrix(self.labels, self.predictions, labels=range(len(self.classes)))
        return counts

    def per_class(self) -> list[dict[str, Any]]:
        """A row a class: class, n, correct, accuracy (its recall), and the Wilson interval low..high."""
        rows = []
        for name, counts, i in zip(self.classes, self.confusion(), range(len(self.classes)), strict=True):
            n, correct = int(counts.sum()), int(counts[i])
            low, high = wilson(correct, n) if n else (0.0, 1.0)
            rows.append(
                {
                    "class": name,
                    "n": n,
                    "correct": correct,
                    "accuracy": correct / n if n else None,
                    "low": low,
                    "high": high,
                }
            )
        return rows

    def write(self, folder: Path) -> None:
        """Leave test_predictions.csv, per_class.csv, confusion.csv and the figure of mistakes in the folder.

        The first is predictions.csv, with a column `file` for `index`, where the images are not the test set.
        """
        from cifar_lab import plots
        from cifar_lab.files import write_csv

        columns = [f"p{i}" for i in range(len(self.classes))]
        place, first = ("test_predictions.csv", "index") if self.files is None else ("predictions.csv", "file")
        write_csv(
            folder / place,
            (first, "label", "prediction", *columns),
            [
                {
                    first: i,
                    "label": int(label),
                    "prediction": int(said),
                    **dict(zip(columns, map(float, p), strict=True)),
                }
                for i, label, said, p in zip(
                    self.files or range(len(self.labels)),
                    self.labels,
                    self.predictions,
                    self.probabilities,
                    strict=True,
                )
            ],
        )
        write_csv(folder / "per_class.csv", ("class", "n", "correct", "accuracy", "low", "high"), self.per_class())
        rows = [dict(zip(("class", *self.classes), (name, *map(int, counts)), strict=True))
                for name, counts in zip(self.classes, self.confusion(), strict=True)]  # fmt: skip
        write_csv(folder / "confusion.csv", ("class", *self.classes), rows)
        wrong = confident_mistakes(self.labels, self.predictions, self.probabilities.max(1))
        if self.images is not None and len(wrong):
            true, said = ([self.classes[i] for i in part[wrong]] for part in (self.labels, self.predictions))
            sure = self.probabilities[wrong].max(1)
            captions = [f"{a}\nas {b}\n{p:.1%}" for a, b, p in zip(true, said, sure, strict=True)]
            pictures = self.images[wrong].permute(0, 2, 3, 1).numpy()
            plots.save(plots.mistakes(pictures, captions), folder / "figures" / "mistakes.svg")


# How the network is asked: a view is its weight, whether it is mirrored, and its shift down and right in pixels.
TTA: dict[str, tuple[tuple[float, bool, int], ...]] = {
    "none": ((1, False, 0),),
    "flip": ((1 / 2, False, 0), (1 / 2, True, 0)),
    "flip_shift": (
        (1 / 4, False, 0), (1 / 4, True, 0), (1 / 8, False, 1), (1 / 8, True, 1), (1 / 8, False, -1), (1 / 8, True, -1),
    ),
}  # fmt: skip


def view(images: Tensor, mirrored: bool, shift: int) -> Tensor:
    """Images (N, 3, H, W) shifted down and right by `shift` pixels, what is missing reflected, then mirrored or not."""
    from cifar_lab.augment import reflected

    if shift:
        height, width = images.shape[2:]
        first = abs(shift) - shift
        images = reflected(images, abs(shift))[:, :, first : first + height, first : first + width]
    return images.flip(-1) if mirrored else images


def probabilities(model: ImageClassifier, images: Tensor) -> np.ndarray:
    """A model's probabilities (N, C) float of the classes of images (N, 3, 32, 32) uint8.

    On this process's device, in the precision of the model's recipe.
    """
    import torch

    from cifar_lab.data import EVALUATION_BATCH, Batches
    from cifar_lab.fit import trainer

    n = len(images)
    batches = Batches(images, torch.zeros(n, dtype=torch.int64), torch.arange(n), EVALUATION_BATCH)
    answers = trainer(model.recipe, Path(), []).predict(model, batches, weights_only=True) or []
    found: np.ndarray = torch.cat([probable for _, probable in answers]).cpu().numpy()
    return found


def answers(model: ImageClassifier, images: Tensor, labels: np.ndarray, tta: str = "none") -> Evaluation:
    """A model's answers on images (N, 3, 32, 32) uint8 with labels (N,), plain, and beside it with TTA if it is asked.

    Test-time augmentation, one of `TTA`, takes the weighted mean of the logits over an image's views: `flip` the image
    and its mirror image; `flip_shift` gives half the weight to these two, half to both shifted by one pixel down and
    right and by one up and left, as airbench does (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds").
    """
    import numpy as np
    from scipy.special import softmax

    found = [probabilities(model, view(images, mirrored, shift)) for _, mirrored, shift in TTA[tta]]
    plain = Evaluation(labels, found[0], model.classes, images)
    if tta == "none":
        return plain
    # A view's log-probabilities are its logits less one number, which the softmax of their mean does not see.
    logs = np.log(np.clip(found, np.finfo(np.float32).tiny, None))
    mean = softmax(np.tensordot([weight for weight, _, _ in TTA[tta]], logs, 1), axis=1)
    return replace(plain, tta=tta, with_tta=replace(plain, probabilities=mean))


READINGS = "test_readings.jsonl"


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint is of: above its `checkpoints`, or the checkpoint's own."""
    own = checkpoint.resolve().parent
    return next((place.parent for place in (own, own.parent) if place.name == "checkpoints"), own)


def times_read(*folders: Path) -> int:
    """How often the test set was read, by the logs in the folders."""
    logs = [folder / READINGS for folder in folders]
    return sum(len(log.read_text().splitlines()) for log in logs if log.exists())


class Evaluator:
    """A checkpoint with the images that it is asked about: the test set, or a folder of one's own.

    Each reading of the test set is logged, a line of JSON in the run's test_readings.jsonl.

    Args:
        checkpoint: a file that `fit` left.
        data_dir: where the dataset lies now, if no longer where the recipe says.
        images: a folder of one's own, CLASS/*.png, to take instead of the test set.

    Raises:
        CheckpointError: no such file, or it is damaged.
        DataError: the images are absent, unreadable, or have other classes than the checkpoint.
    """

    def __init__(self, checkpoint: Path, *, data_dir: str | None = None, images: Path | None = None) -> None:
        from cifar_lab.dataset import read_folder
        from cifar_lab.files import sha256
        from cifar_lab.fit import restore

        self.model = restore(checkpoint)
        self.checkpoint, self.sha256 = checkpoint, sha256(checkpoint)
        # A reading is logged in the first of these folders that can be written.
        self.logs = [run_folder(checkpoint)]
        self.files: list[Path] | None = None
        if images is None:
            recipe = self.model.recipe if data_dir is None else self.model.recipe.replace(data_dir=data_dir)
            test = check_test_set(recipe, self.model.classes)
            self.images, self.labels = test.images, test.labels
        else:
            self.files, self.images, self.labels = read_folder(images, self.model.classes)

    def answer(self, *, tta: str = "none", corruption: str | None = None, severity: int | None = None) -> Evaluation:
        """The checkpoint's answers: with a `TTA` too, or on the images corrupted at a severity."""
        from cifar_lab.corruptions import corrupt

        images = self.images if corruption is None else corrupt(self.images, corruption, severity or 0)
        found = answers(self.model, images, self.labels.numpy(), tta)
        if self.files is not None:
            return replace(found, files=tuple(map(str, self.files)))
        self._log(
            {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "checkpoint": os.path.relpath(self.checkpoint.resolve(), run_folder(self.checkpoint)),
                "sha256": self.sha256,
                "read": "test",
                "n": len(found.labels),
                "tta": tta,
                "corruption": corruption,
                "severity": severity,
                "accuracy": found.accuracy,
                "tta_accuracy": found.with_tta.accuracy if found.with_tta else None,
                "command": shlex.join(["python", *sys.orig_argv[1:]]),
            }
        )
        return found

    def _log(self, reading: dict[str, Any]) -> None:
        while self.logs:
            try:
                with (self.logs[0] / READINGS).open("a") as file:
                    file.write(json.dumps(reading) + "\n")
                return
            except OSError as error:
                said = f"note: the reading of the test set cannot be logged in {self.logs[0]} ({error.strerror})."
                print(cli.paragraph(said), file=sys.stderr)
                del self.logs[0]


def evaluate(checkpoint: Path | str, *, data_dir: str | None = None, tta: str = "none") -> Evaluation:
    """A checkpoint's answers on the test set of the data it was trained on: a reading, which is logged.

    Arguments and errors are those of `Evaluator`; `tta` that of `answers`.
    """
    return Evaluator(Path(checkpoint), data_dir=data_dir).answer(tta=tta)


def record_of_test(evaluation: Evaluation, accuracies: Sequence[float]) -> dict[str, Any]:
    """What best.json says of the test set.

    `accuracies` are those of each seed of the same recipe; test_acc is of the one whose predictions are written. All
    are without test-time augmentation, whose own figures are those of `tta`.
    """
    low, high = evaluation.interval
    return {
        "test_acc": evaluation.accuracy,
        "test_n": len(evaluation.labels),
        "test_low": low,
        "test_high": high,
        "test_acc_seeds": list(accuracies),
        "tta": record_of_tta(evaluation),
    }


def record_of_images(evaluation: Evaluation, folder: Path) -> dict[str, Any]:
    """What best.json says of a folder of one's own."""
    low, high = evaluation.interval
    own = {"folder": str(folder), "acc": evaluation.accuracy, "n": len(evaluation.labels), "low": low, "high": high}
    return {"images": own, "tta": record_of_tta(evaluation)}


def record_of_tta(evaluation: Evaluation) -> dict[str, Any] | None:
    """What best.json says of test-time augmentation; None where there was none."""
    if evaluation.with_tta is None:
        return None
    low, high = evaluation.with_tta.interval
    return {"name": evaluation.tta, "acc": evaluation.with_tta.accuracy, "low": low, "high": high}


def check_test_set(recipe: Recipe, classes: Sequence[str]) -> ImageSet:
    """The recipe's test set, decoded, if it has the classes that are trained: better known before a search than after.

    Raises:
        DataError: it is absent or unreadable, or has other classes.
    """
    from cifar_lab.dataset import DataError, load

    images = load(recipe, "test")
    if images.classes != tuple(classes):
        raise DataError(
            f"The test set has the classes {', '.join(images.classes)}, the training set {', '.join(classes)}."
        )
    return images


CORRUPTION_COLUMNS = ("corruption", "severity", "n", "correct", "accuracy", "low", "high")


def corrupted(
    evaluator: Evaluator, names: Sequence[str], severities: Sequence[int], clean: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The rows of corruptions.csv, said meanwhile as a table: a line a corruption, a column a severity."""

    def line(name: str, accuracies: Sequence[float]) -> str:
        mean = sum(accuracies) / len(accuracies)
        return f"{name:>18}" + "".join(f"{accuracy:8.1%}" for accuracy in [*accuracies, mean])

    rows: list[dict[str, Any]] = []
    say(f"{'severity':>18}" + "".join(f"{severity:>8}" for severity in [*severities, "mean"]))
    for name in names:
        for severity in severities:
            found = evaluator.answer(corruption=name, severity=severity)
            values = (name, severity, len(found.labels), found.correct, found.accuracy, *found.interval)
            rows.append(dict(zip(CORRUPTION_COLUMNS, values, strict=True)))
        say(line(name, [row["accuracy"] for row in rows if row["corruption"] == name]))
    by_severity = ([row["accuracy"] for row in rows if row["severity"] == severity] for severity in severities)
    say(line("mean", [sum(accuracies) / len(accuracies) for accuracies in by_severity]))
    say(f"{'clean':>18}{clean:{8 * len(severities) + 8}.1%}")
    return rows


def check_replaceable(output: Path, digest: str, images: Path | None) -> None:
    """Refuse a folder that holds a search, or another checkpoint's results, or those on other images than asked for.

    Raises:
        InputError: says so.
    """
    from cifar_lab.files import read_json

    there = read_json(output / "best.json") if (output / "best.json").exists() else {}
    same = there.get("sha256") == digest and ("images" in there) == (images is not None)
    if (output / "trials.csv").exists() or (there and not same):
        raise InputError(
            f"output: {str(output)!r} holds other results, which are not overwritten. Legal: another folder."
        )


def asked_of(argv: Sequence[str]) -> Any:
    """The command's flags, with the names of the corruptions and their severities in full.

    Raises:
        InputError: an unknown flag, an impossible value, or one that says nothing beside the others.
    """
    from cifar_lab.corruptions import CORRUPTIONS, SEVERITIES, check

    parser = cli.Parser(prog="python -m cifar_lab.evaluate", description=(__doc__ or ""), allow_abbrev=False)
    parser.add_argument("checkpoint", help="a .ckpt file that cifar_lab.train or tune.asha left")
    parser.add_argument("--images", help="a folder of your own, CLASS/*.png, to evaluate on instead of the test set")
    parser.add_argument("--corruptions", nargs="+", help=f"corrupt the images too: all, or {', '.join(CORRUPTIONS)}")
    parser.add_argument("--severity", nargs="+", help="of the corruptions, 1 to 5; default: all five")
    parser.add_argument("--tta", default="none", help=f"test-time augmentation, reported beside: {', '.join(TTA)}")
    parser.add_argument(
        "--output", help="folder for the files; default: the run's for its best checkpoint, else the checkpoint's own"
    )
    parser.add_argument("--data_dir", help="where the dataset lies now, if no longer where the recipe says")
    parser.offers = {"--corruptions": ["all", *CORRUPTIONS], "--severity": SEVERITIES, "--tta": TTA}
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the accuracy")
    asked = parser.parse_args(list(argv))
    if asked.tta not in TTA:
        raise InputError(f"tta: {asked.tta!r}{nearest(asked.tta, TTA)} Legal: {', '.join(TTA)}.")
    if asked.images and asked.data_dir:
        raise InputError(f"data_dir: {asked.data_dir!r} is where the dataset lies; of --images it says nothing.")
    if asked.severity and not asked.corruptions:
        raise InputError(f"severity: {asked.severity[0]} is that of --corruptions, of which none is given.")
    named = chain(*(CORRUPTIONS if word == "all" else [word] for word in asked.corruptions or []))
    asked.corruptions = list(dict.fromkeys(named))
    severities = {int(word) if str(word).isdecimal() else word for word in asked.severity or SEVERITIES}
    check(asked.corruptions, severities)
    asked.severity = sorted(severities)
    return asked


def main(argv: Sequence[str]) -> int:
    """The command: evaluate one checkpoint, leaving the files beside it or in --output."""
    asked = asked_of(argv)
    # Lightning takes seconds to import: not before the flags are known to be legal ones.
    from cifar_lab import machine
    from cifar_lab.files import read_json, write_csv, write_json
    from cifar_lab.fit import identity
    from cifar_lab.report import headline, write_report

    checkpoint, images = Path(asked.checkpoint), Path(asked.images).absolute() if asked.images else None
    evaluator = Evaluator(checkpoint, data_dir=asked.data_dir, images=images)
    run = run_folder(checkpoint)
    # The run's best.json speaks of one checkpoint only.
    best = read_json(run / "best.json") if (run / "best.json").exists() else {}
    own = best.get("sha256") == evaluator.sha256
    # A search's files are its own, those on its winner too.
    home = run if own and not (run / "trials.csv").exists() else checkpoint.absolute().parent
    default = home if images is None else home / f"images-{images.name}"
    output = Path(asked.output) if asked.output else default
    check_replaceable(output, evaluator.sha256, images)
    cli.make_folder(output, str(output), "output")
    if output.resolve() not in evaluator.logs:
        evaluator.logs.append(output.resolve())

    def say(line: str) -> None:
        if not asked.quiet and not asked.json:
            print(line, flush=True)

    result = evaluator.answer(tta=asked.tta)
    for row in result.per_class():
        reached = f"{row['accuracy']:7.1%}  of {row['n']:,} ({row['low']:.1%} .. {row['high']:.1%})" if row["n"] else ""
        say(f"{row['class']:>12}  {reached or 'no images'}")
    rows = []
    if asked.corruptions:
        rows = corrupted(evaluator, asked.corruptions, asked.severity, result.accuracy, say)
    # Of what the run's best.json says, that which is not of an evaluation; of corruptions if they are not read again.
    kept = {key: value for key, value in best.items() if not key.startswith(("test_", "tta"))} if own else {}
    if not own:
        who = identity(evaluator.model, checkpoint)
        kept = {name: who[name] for name in ("recipe", "sha256", "versions")}
        kept |= {"hardware": machine.hardware(), "command": cli.command("cifar_lab.evaluate", argv)}
    kept["checkpoint"] = os.path.relpath(checkpoint, output)
    if output.resolve() != run.resolve():
        kept.pop("corruptions_acc", None)
    if images is None:
        record = record_of_test(result, [result.accuracy])
        record["test_readings"] = times_read(*{run_folder(checkpoint), output.resolve()})
    else:
        record = record_of_images(result, images)
    if rows:
        record["corruptions_acc"] = sum(row["accuracy"] for row in rows) / len(rows)
    try:
        result.write(output)
        if rows:
            write_csv(output / "corruptions.csv", CORRUPTION_COLUMNS, rows)
        elif "corruptions_acc" not in kept:
            (output / "corruptions.csv").unlink(missing_ok=True)
        write_json(output / "best.json", kept | record)
        write_report(output)
    except OSError as error:
        raise InputError(f"output: {str(output)!r} cannot be written ({error.strerror}).") from error
    say(cli.paragraph(headline(kept | record)))
    say(f"{os.path.relpath(output)}/report.html")
    if asked.json:
        evaluated = {"checkpoint": str(checkpoint), "sha256": evaluator.sha256, "read": str(images or "test")}
        print(cli.as_json({**evaluated, **record, "per_class": result.per_class(), "corruptions": rows}))
    elif asked.quiet:
        print(f"{result.accuracy:.4f}")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
