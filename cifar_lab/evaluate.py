"""Evaluate a checkpoint: the only reader of the test set; python -m cifar_lab.evaluate."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_lab import cli
from cifar_lab.recipe import InputError

if TYPE_CHECKING:
    import numpy as np

    from cifar_lab.data import ImageSet
    from cifar_lab.recipe import Recipe

CONFIDENCE = 0.95


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95% Wilson interval of a proportion, fractions. Source: Wilson 1927, through scipy."""
    from scipy.stats import binomtest

    interval = binomtest(int(correct), int(n)).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% Student t interval of the mean of two or more values, such as accuracies over seeds."""
    import numpy as np
    from scipy.stats import t

    n, mean, spread = len(values), float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * spread / n**0.5
    return mean - half, mean + half


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint's answers on a set of images: labels (N,) int, probabilities (N, C) float, class names."""

    labels: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]

    @property
    def predictions(self) -> np.ndarray:
        """The most probable class of each image, (N,) int."""
        most: np.ndarray = self.probabilities.argmax(1)
        return most

    @property
    def accuracy(self) -> float:
        """Fraction of images whose label is the most probable class."""
        return float((self.predictions == self.labels).mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The accuracy's 95% Wilson interval."""
        return wilson(int((self.predictions == self.labels).sum()), len(self.labels))

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
        """Leave test_predictions.csv, per_class.csv and confusion.csv in the folder."""
        from cifar_lab.files import write_csv

        columns = [f"p{i}" for i in range(len(self.classes))]
        write_csv(
            folder / "test_predictions.csv",
            ("index", "label", "prediction", *columns),
            [
                {
                    "index": i,
                    "label": int(label),
                    "prediction": int(said),
                    **dict(zip(columns, map(float, p), strict=True)),
                }
                for i, (label, said, p) in enumerate(
                    zip(self.labels, self.predictions, self.probabilities, strict=True)
                )
            ],
        )
        write_csv(folder / "per_class.csv", ("class", "n", "correct", "accuracy", "low", "high"), self.per_class())
        rows = [dict(zip(("class", *self.classes), (name, *map(int, counts)), strict=True))
                for name, counts in zip(self.classes, self.confusion(), strict=True)]  # fmt: skip
        write_csv(folder / "confusion.csv", ("class", *self.classes), rows)


def evaluate(checkpoint: Path | str, *, data_dir: str | None = None) -> Evaluation:
    """A checkpoint's answers on the test set of the data it was trained on.

    Args:
        checkpoint: a file that `fit` left.
        data_dir: where the images lie now, if no longer where the recipe says.

    Raises:
        CheckpointError: no such file, or it is damaged.
        DataError: the images are absent, or have other classes than the checkpoint.
    """
    import torch

    from cifar_lab.classifier import ImageClassifier
    from cifar_lab.data import EVALUATION_BATCH, Batches
    from cifar_lab.fit import read_checkpoint, trainer

    content = read_checkpoint(Path(checkpoint))
    saved = content["hyper_parameters"]
    model = ImageClassifier(**saved)
    model.load_state_dict(content["state_dict"])
    recipe = model.recipe if data_dir is None else model.recipe.replace(data_dir=data_dir)
    images = check_test_set(recipe, model.classes)
    batches = Batches(images.images, images.labels, torch.arange(len(images)), EVALUATION_BATCH)
    answers = trainer(recipe, Path(checkpoint).parent, []).predict(model, batches, weights_only=True)
    labels, probabilities = (torch.cat(part).cpu().numpy() for part in zip(*answers or [], strict=True))
    return Evaluation(labels, probabilities, model.classes)


def record_of_test(evaluation: Evaluation, accuracies: Sequence[float]) -> dict[str, Any]:
    """What best.json says of the test set.

    `accuracies` are those of each seed of the same recipe; test_acc is of the one whose predictions are written.
    """
    low, high = evaluation.interval
    return {
        "test_acc": evaluation.accuracy,
        "test_n": len(evaluation.labels),
        "test_low": low,
        "test_high": high,
        "test_acc_seeds": list(accuracies),
    }


def check_test_set(recipe: Recipe, classes: Sequence[str]) -> ImageSet:
    """The recipe's test set, decoded, if it has the classes that are trained: better known before a search than after.

    Raises:
        DataError: it is absent or unreadable, or has other classes.
    """
    from cifar_lab.data import DataError, load

    images = load(recipe, "test")
    if images.classes != tuple(classes):
        raise DataError(
            f"The test set has the classes {', '.join(images.classes)}, the training set {', '.join(classes)}."
        )
    return images


def main(argv: Sequence[str]) -> int:
    """The command: evaluate one checkpoint on test, beside it or in --output."""
    from cifar_lab.files import sha256, write_json
    from cifar_lab.report import headline, write_report

    parser = cli.Parser(prog="python -m cifar_lab.evaluate", description=(__doc__ or ""), allow_abbrev=False)
    parser.add_argument("checkpoint", help="a .ckpt file that cifar_lab.train or tune.asha left")
    parser.add_argument("--output", help="folder for the files; default: the run's, where the checkpoint lies in one")
    parser.add_argument("--data_dir", help="where the images lie now, if no longer where the recipe says")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the accuracy")
    asked = parser.parse_args(list(argv))
    checkpoint = Path(asked.checkpoint)
    run = checkpoint.absolute().parent.parent
    result = evaluate(checkpoint, data_dir=asked.data_dir)
    # The run's best.json speaks of one checkpoint only.
    best = json.loads((run / "best.json").read_text()) if (run / "best.json").exists() else {}
    own = best.get("sha256") == sha256(checkpoint)
    output = Path(asked.output) if asked.output else run if own else checkpoint.absolute().parent
    best = {**(best if own else {}), **record_of_test(result, [result.accuracy])}
    try:
        output.mkdir(parents=True, exist_ok=True)
        result.write(output)
        write_json(output / "best.json", best)
        write_report(output)
    except OSError as error:
        raise InputError(f"output: {str(output)!r} cannot be written ({error.strerror}).") from error
    if asked.quiet:
        print(f"{result.accuracy:.4f}")
        return cli.DONE
    for row in result.per_class():
        print(f"{row['class']:>12}  {row['accuracy']:7.1%}  of {row['n']:,} ({row['low']:.1%} .. {row['high']:.1%})")
    print(headline(best))
    print(f"{os.path.relpath(output)}/report.html")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
