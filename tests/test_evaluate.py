"""Evaluation: figures that other libraries confirm, and a test set that nothing else reads."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from cifar_lab import data
from cifar_lab.data import DataError
from cifar_lab.evaluate import Evaluation, evaluate, record_of_test, t_interval, wilson
from cifar_lab.fit import CheckpointError, fit
from cifar_lab.recipe import Recipe


def wilson_by_hand(correct: int, n: int) -> tuple[float, float]:
    z, p = 1.959963984540054, correct / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return middle - half, middle + half


@settings(deadline=None)
@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_closed_formula(counts: tuple[int, int]) -> None:
    low, high = wilson(*counts)
    assert (low, high) == pytest.approx(wilson_by_hand(*counts), abs=1e-9)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1


def test_the_t_interval_is_scipys() -> None:
    values = [0.91, 0.935, 0.92, 0.9]
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((interval.low, interval.high))


def test_seeds_that_agree_have_an_interval_of_no_width() -> None:
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)


@pytest.fixture
def answers() -> Evaluation:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), 200).astype(np.float32)
    labels = np.where(rng.random(200) < 0.5, probabilities.argmax(1), rng.integers(0, 3, 200))
    return Evaluation(labels, probabilities, ("a", "b", "c", "absent"))


def test_accuracy_and_confusion_are_sklearns(answers: Evaluation) -> None:
    said = answers.probabilities.argmax(1)
    assert answers.accuracy == accuracy_score(answers.labels, said)
    assert np.array_equal(answers.confusion(), confusion_matrix(answers.labels, said, labels=range(4)))
    assert answers.interval == pytest.approx(wilson_by_hand(int((said == answers.labels).sum()), 200), abs=1e-9)


def test_a_class_has_its_recall_and_its_interval(answers: Evaluation) -> None:
    rows = answers.per_class()
    recall = recall_score(answers.labels, answers.predictions, labels=range(3), average=None)
    assert [row["class"] for row in rows] == list(answers.classes)
    for i in range(3):
        assert rows[i]["accuracy"] == pytest.approx(recall[i])
        assert rows[i]["n"] == int((answers.labels == i).sum())
        expected = wilson_by_hand(rows[i]["correct"], rows[i]["n"])
        assert (rows[i]["low"], rows[i]["high"]) == pytest.approx(expected, abs=1e-9)


def test_a_class_without_images_has_no_accuracy() -> None:
    labels = np.array([0, 0, 1])
    rows = Evaluation(labels, np.eye(3)[labels], ("a", "b", "c")).per_class()
    assert (rows[2]["n"], rows[2]["accuracy"], rows[2]["low"], rows[2]["high"]) == (0, None, 0.0, 1.0)


# A checkpoint of digits


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(session_cache))
        patch.delenv("CIFAR_LAB_DATA", raising=False)
        asked = Recipe(
            arch="classic_cnn", dataset="digits", optimizer="adam", max_epochs=3, lr=2e-3, augment=False, precision="32"
        )
        return fit(asked, tmp_path_factory.mktemp("evaluated")).best_checkpoint


def test_the_files_say_what_sklearn_says(trained: Path, tmp_path: Path) -> None:
    answers = evaluate(trained)
    answers.write(tmp_path)
    best = record_of_test(answers, [answers.accuracy])
    told = pd.read_csv(tmp_path / "test_predictions.csv")
    assert list(told) == ["index", "label", "prediction", *(f"p{i}" for i in range(10))]
    assert told["index"].tolist() == list(range(360))
    assert told["label"].tolist() == data.load(Recipe(dataset="digits"), "test").labels.tolist()
    probabilities = told[[f"p{i}" for i in range(10)]].to_numpy()
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert probabilities.argmax(1).tolist() == told["prediction"].tolist()

    accuracy = accuracy_score(told["label"], told["prediction"])
    assert accuracy > 0.5
    assert (best["test_acc"], best["test_n"], best["test_acc_seeds"]) == (accuracy, 360, [accuracy])
    assert (best["test_low"], best["test_high"]) == pytest.approx(wilson_by_hand(round(accuracy * 360), 360), abs=1e-9)

    classes = pd.read_csv(tmp_path / "per_class.csv", dtype={"class": str})
    assert list(classes) == ["class", "n", "correct", "accuracy", "low", "high"]
    assert classes["class"].tolist() == list("0123456789")
    np.testing.assert_allclose(classes["accuracy"], recall_score(told["label"], told["prediction"], average=None))
    confusion = pd.read_csv(tmp_path / "confusion.csv", index_col="class", dtype={"class": str})
    assert list(confusion) == confusion.index.tolist() == list("0123456789")
    assert np.array_equal(confusion.to_numpy(), confusion_matrix(told["label"], told["prediction"]))


def test_the_accuracies_of_all_seeds_stand_beside_that_of_the_predictions(answers: Evaluation) -> None:
    best = record_of_test(answers, [0.1, 0.2])
    assert best["test_acc_seeds"] == [0.1, 0.2] and best["test_acc"] == answers.accuracy


def test_an_evaluation_can_be_repeated_to_the_bit(trained: Path) -> None:
    assert np.array_equal(evaluate(trained).probabilities, evaluate(trained).probabilities)


def test_an_absent_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        evaluate(tmp_path / "absent.ckpt")


def small(root: Path, **fields: Any) -> Recipe:
    return Recipe(
        arch="classic_cnn", width=2, dataset="folder", data_dir=str(root), max_epochs=1, precision="32", **fields
    )


def test_other_classes_than_the_checkpoints_are_refused(make_tree: Callable[..., Path], tmp_path: Path) -> None:
    root = make_tree()
    checkpoint = fit(small(root), tmp_path / "run").best_checkpoint
    (root / "test" / "pear").rename(root / "test" / "quince")
    with pytest.raises(DataError, match="apple, quince, the training set apple, pear"):
        evaluate(checkpoint)


def test_images_that_moved_are_found_by_data_dir(make_tree: Callable[..., Path], tmp_path: Path) -> None:
    root = make_tree()
    checkpoint = fit(small(root), tmp_path / "run").best_checkpoint
    shutil.move(root, tmp_path / "elsewhere")
    with pytest.raises(DataError):
        evaluate(checkpoint)
    assert len(evaluate(checkpoint, data_dir=str(tmp_path / "elsewhere")).labels) == 20


def test_training_never_reads_the_test_part(
    make_tree: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_tree()
    for file in (root / "test").rglob("*.png"):
        file.write_bytes(b"poison")
    plain = data.load

    def train_only(recipe: Recipe, part: data.Part) -> data.ImageSet:
        assert part == "train"
        return plain(recipe, part)

    monkeypatch.setattr(data, "load", train_only)
    run = fit(small(root), tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="is not a readable image"):
        evaluate(run.best_checkpoint)
