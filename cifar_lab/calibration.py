"""Calibration: whether what is said with 80% confidence is right 80% of the time.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks". The temperature is judged on images that it was not
fitted on, by cross-fitting two halves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cifar_lab.evaluate import wilson

BINS = 15  # of equal width, from 0 to 1
SMALLEST = 1e-30  # a probability that the softmax rounded to zero


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, float]]:
    """A row a bin that holds images: from, to, n, confidence (mean), accuracy, and its Wilson interval low..high.

    Args:
        confidence: (N,) float, the probability of the prediction; a bin contains its upper edge, not its lower one.
        correct: (N,) bool, whether the prediction is right.
    """
    edges = np.linspace(0, 1, BINS + 1)
    place = np.digitize(confidence, edges[1:-1], right=True)
    rows = []
    for i in np.unique(place):
        inside = place == i
        n, right = int(inside.sum()), int(correct[inside].sum())
        low, high = wilson(right, n)
        rows.append(
            {
                "from": float(edges[i]), "to": float(edges[i + 1]), "n": n,
                "confidence": float(confidence[inside].mean()), "accuracy": right / n, "low": low, "high": high,
            }
        )  # fmt: skip
    return rows


def expected_error(bins: Sequence[Mapping[str, float]]) -> float:
    """ECE, the expected calibration error: the mean over the images of their bin's |accuracy - confidence|."""
    return sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / sum(row["n"] for row in bins)


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The mean negative log likelihood of the labels (N,) int under the probabilities (N, C)."""
    own = probabilities[np.arange(len(labels)), labels].astype(float)
    return float(-np.log(own.clip(SMALLEST)).mean())


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """The probabilities (N, C) of logits divided by the temperature: above 1 they are less sure."""
    from scipy.special import softmax

    logits: np.ndarray = np.log(probabilities.astype(float).clip(SMALLEST))
    scaled: np.ndarray = softmax(logits / temperature, axis=1)
    return scaled


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The temperature, from 0.05 to 20, under which the labels are likeliest."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log: log_loss(tempered(probabilities, float(np.exp(log))), labels),
        bounds=(np.log(0.05), np.log(20)), method="bounded",
    )  # fmt: skip
    return float(np.exp(found.x))


@dataclass(frozen=True)
class CrossFit:
    """Two temperatures, each fitted on one half of the images; what the other half, judged with it, comes to."""

    temperatures: tuple[float, float]
    log_loss: float
    expected_error: float


def cross_fit(probabilities: np.ndarray, labels: np.ndarray) -> CrossFit:
    """Fit a temperature on the images of even index and judge the odd ones with it, and the other way round."""
    even = np.arange(len(labels)) % 2 == 0
    temperatures = tuple(fit_temperature(probabilities[half], labels[half]) for half in (even, ~even))
    judged = np.where(even[:, None], tempered(probabilities, temperatures[1]), tempered(probabilities, temperatures[0]))
    bins = reliability(judged.max(1), judged.argmax(1) == labels)
    return CrossFit((temperatures[0], temperatures[1]), log_loss(judged, labels), expected_error(bins))
