"""Compare two networks' answers to the same test images, by McNemar's exact test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cifar_lab.evaluate import t_interval
from cifar_lab.files import read_table
from cifar_lab.recipe import InputError


@dataclass(frozen=True)
class Comparison:
    """What two networks make of the same images: fractions, counts, and how likely so uneven a split is by chance.

    Attributes:
        n: images.
        first: accuracy of the first network.
        second: accuracy of the second one.
        interval: 95% t interval of first - second, from the images' paired differences (-1, 0 or 1).
        only_first: images that only the first gets right.
        only_second: images that only the second gets right.
        p_value: McNemar's, exact and two-sided: of a fair coin over the images that only one gets right.
    """

    n: int
    first: float
    second: float
    interval: tuple[float, float]
    only_first: int
    only_second: int
    p_value: float

    @property
    def difference(self) -> float:
        """first - second."""
        return self.first - self.second


def mcnemar(first: np.ndarray, second: np.ndarray) -> Comparison:
    """Compare by which images (N,) bool each network got right, two or more. Source: McNemar 1947, through scipy."""
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    return Comparison(
        n=len(first),
        first=float(first.mean()),
        second=float(second.mean()),
        interval=t_interval(first.astype(float) - second),
        only_first=only_first,
        only_second=only_second,
        p_value=float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
    )


def class_table(by_class: Mapping[str, Comparison]) -> pd.DataFrame:
    """A row a class of `compare`: what Comparison has, and p_adjusted for so many tests at once.

    Columns: class, n, first, second, difference, low, high (fractions), only_first, only_second, p_value, p_adjusted
    (Benjamini and Hochberg 1995, through scipy: of the classes where it is below 0.05, at most 5% are expected not to
    differ).
    """
    from scipy.stats import false_discovery_control

    return pd.DataFrame(
        [
            {
                "class": name, "n": c.n, "first": c.first, "second": c.second, "difference": c.difference,
                "low": c.interval[0], "high": c.interval[1], "only_first": c.only_first, "only_second": c.only_second,
                "p_value": c.p_value,
            }
            for name, c in by_class.items()
        ]
    ).assign(p_adjusted=false_discovery_control([c.p_value for c in by_class.values()]))  # fmt: skip


def read_answers(folder: Path, name: str = "test_predictions.csv") -> tuple[pd.DataFrame, tuple[str, ...]]:
    """A folder's predictions, and the names of their classes.

    Raises:
        InputError: it was not tested.
    """
    try:
        answers = read_table(folder / name, "file")
        classes = tuple(read_table(folder / "per_class.csv", "class")["class"])
    except FileNotFoundError as error:
        raise InputError(
            f"compare: {str(folder)!r} holds no {Path(error.filename).name}. Legal: the folder of what was tested."
        ) from error
    return answers, classes


def compare(first: Path, second: Path) -> tuple[Comparison, dict[str, Comparison]]:
    """Compare what two folders' test_predictions.csv say, over all images and class by class.

    Raises:
        InputError: one was not tested, or they were tested on other images.
    """
    (ours, classes), (theirs, others) = read_answers(first), read_answers(second)
    if classes != others:
        raise InputError(
            f"compare: {str(second)!r} knows the classes {', '.join(others)}, {str(first)!r} {', '.join(classes)}. "
            "Legal: a folder tested on the same images."
        )
    if not ours.label.equals(theirs.label):
        raise InputError(
            f"compare: {str(second)!r} was tested on {len(theirs):,} images, {str(first)!r} on {len(ours):,}; their "
            "labels differ. Legal: a folder tested on the same images."
        )
    right = [(table.label == table.prediction).to_numpy() for table in (ours, theirs)]
    by_class = {
        name: mcnemar(right[0][own], right[1][own])
        for i, name in enumerate(classes)
        if (own := (ours.label == i).to_numpy()).sum() > 1
    }
    return mcnemar(right[0], right[1]), by_class
