"""Evaluation: figures that other libraries confirm, and a test set that nothing else reads."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.transforms.functional as tvf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from cifar_lab import dataset
from cifar_lab.checkpoint import CheckpointError, best_record, read_checkpoint
from cifar_lab.classifier import ImageClassifier
from cifar_lab.corruptions import corrupt
from cifar_lab.dataset import DataError
from cifar_lab.evaluate import (
    TTA,
    Evaluation,
    accuracy_interval,
    evaluate,
    main,
    record_of_test,
    run_folder,
    t_interval,
    view,
    wilson,
)
from cifar_lab.evaluate import (
    answers as answers_of,
)
from cifar_lab.files import sha256
from cifar_lab.fit import fit
from cifar_lab.recipe import InputError, Recipe


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


def test_the_interval_of_a_mean_accuracy_ends_at_0_and_1() -> None:
    near = [0.7, 0.72, 0.69]
    assert accuracy_interval(near) == t_interval(near)
    low, high = t_interval([0.2, 0.9])
    assert low < 0 and high > 1 and accuracy_interval([0.2, 0.9]) == (0.0, 1.0)


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
    assert told["label"].tolist() == dataset.load(Recipe(dataset="digits"), "test").labels.tolist()
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
    plain = dataset.load

    def train_only(recipe: Recipe, part: dataset.Part) -> dataset.ImageSet:
        assert part == "train"
        return plain(recipe, part)

    monkeypatch.setattr(dataset, "load", train_only)
    run = fit(small(root), tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="is not a readable image"):
        evaluate(run.best_checkpoint)


# Test-time augmentation


def network_of(checkpoint: Path) -> ImageClassifier:
    content = read_checkpoint(checkpoint)
    model = ImageClassifier(**content["hyper_parameters"])
    model.load_state_dict(content["state_dict"])
    return model.eval()


def noise(n: int = 6) -> torch.Tensor:
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shift", [-1, 0, 1])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_view_is_a_window_of_the_reflected_image_mirrored_or_not(shift: int, mirrored: bool) -> None:
    images = noise()
    windows = tvf.pad(images, [1], padding_mode="reflect")[:, :, 1 - shift : 33 - shift, 1 - shift : 33 - shift]
    assert torch.equal(view(images, mirrored, shift), tvf.hflip(windows) if mirrored else windows)


@pytest.mark.parametrize("tta", TTA)
def test_tta_is_the_softmax_of_the_weighted_mean_of_the_logits(tta: str, trained: Path) -> None:
    model, images = network_of(trained), noise(20)
    padded = tvf.pad(images, [1], padding_mode="reflect")

    def logits(some: torch.Tensor) -> torch.Tensor:
        return model(some) / 2 + model(some.flip(-1)) / 2

    with torch.no_grad():
        shifted = (logits(padded[:, :, :32, :32]) + logits(padded[:, :, 2:, 2:])) / 2
        expected = {
            "none": model(images), "flip": logits(images), "flip_shift": logits(images) / 2 + shifted / 2,
        }[tta].softmax(1)  # fmt: skip
        plain = model(images).softmax(1)
    found = answers_of(model, images, np.zeros(20, int), tta)
    assert found.tta == tta and sum(weight for weight, _, _ in TTA[tta]) == 1
    np.testing.assert_allclose(found.probabilities, plain, rtol=1e-4, atol=1e-6)
    if tta == "none":
        assert found.with_tta is None
    else:
        assert found.with_tta is not None and not np.allclose(found.with_tta.probabilities, plain, atol=1e-3)
        np.testing.assert_allclose(found.with_tta.probabilities, expected, rtol=1e-4, atol=1e-6)


def test_a_probability_of_zero_is_no_veto_of_a_view(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certain = iter([np.array([[1.0, 0.0]], np.float32), np.array([[0.0, 1.0]], np.float32)])
    monkeypatch.setattr("cifar_lab.evaluate.probabilities", lambda *_: next(certain))
    found = answers_of(network_of(trained), noise(1), np.zeros(1, int), "flip").with_tta
    assert found is not None and found.probabilities.tolist() == [[0.5, 0.5]]


# The command, on a run as cifar_lab.train leaves it


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The folder of a run; its best checkpoint is that of `trained`."""
    folder = tmp_path / "run"
    shutil.copytree(trained.parent, folder / "checkpoints", ignore=shutil.ignore_patterns("*.jsonl"))
    best = {"epoch": 3, "val_acc": 0.5}
    recipe = network_of(trained).recipe
    record = best_record(recipe, best, folder / "checkpoints" / "best.ckpt", folder, trial_id="run", command="made")
    (folder / "best.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page and no figures, which take a second, where a test does not look at them."""
    monkeypatch.setattr("cifar_lab.report.write_report", lambda _: None)


def checkpoint_of(run: Path) -> str:
    return str(run / "checkpoints" / "best.ckpt")


def readings(folder: Path) -> list[dict[str, Any]]:
    place = folder / "test_readings.jsonl"
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def best_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "best.json").read_text())
    return found


def test_tta_is_reported_as_such_and_beside_the_plain_figure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([checkpoint_of(run), "--tta", "flip_shift"]) == 0
    out, best = " ".join(capsys.readouterr().out.split()), best_of(run)
    found = evaluate(checkpoint_of(run), tta="flip_shift")
    assert found.with_tta is not None and best["test_acc"] == found.accuracy != found.with_tta.accuracy
    low, high = found.with_tta.interval
    assert best["tta"] == {"name": "flip_shift", "acc": found.with_tta.accuracy, "low": low, "high": high}
    told = f"With test-time augmentation (flip_shift) {found.with_tta.accuracy:.2%} ({low:.2%} to {high:.2%})."
    headline = rf"Test accuracy {found.accuracy:.2%} \(.*, one seed\)\. {re.escape(told)}"
    assert re.search(headline, out) and re.search(headline, (run / "report.html").read_text())
    said = pd.read_csv(run / "test_predictions.csv")
    assert accuracy_score(said.label, said.prediction) == best["test_acc"], "the files are without"
    assert main([checkpoint_of(run)]) == 0
    assert best_of(run)["tta"] is None and "augmentation" not in capsys.readouterr().out


def test_json_is_printed_alone_and_says_what_the_files_say(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [checkpoint_of(run), "--json", "--tta", "flip", "--corruptions", "fog", "--severity", "2"]
    assert main(words) == 0
    printed, best = json.loads(capsys.readouterr().out), best_of(run)
    for name in ("test_acc", "test_n", "test_low", "test_high", "tta", "test_readings", "sha256", "corruptions_acc"):
        assert printed[name] == best[name]
    assert (printed["read"], printed["checkpoint"]) == ("test", checkpoint_of(run))
    per_class = pd.read_csv(run / "per_class.csv", dtype={"class": str})
    assert printed["per_class"] == per_class.to_dict("records")
    assert printed["corruptions"] == pd.read_csv(run / "corruptions.csv").to_dict("records")


# The log of readings


@pytest.mark.parametrize(
    ("checkpoint", "folder"),
    [("run/checkpoints/a.ckpt", "run"), ("search/checkpoints/T1-s0/a.ckpt", "search"), ("mine/a.ckpt", "mine")],
)
def test_the_log_lies_in_the_folder_of_the_run(checkpoint: str, folder: str, tmp_path: Path) -> None:
    assert run_folder(tmp_path / checkpoint) == (tmp_path / folder).resolve()


def test_each_reading_is_logged_whoever_reads(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = evaluate(checkpoint_of(run)).accuracy
    monkeypatch.setattr(sys, "orig_argv", ["/bin/python3", "-m", "cifar_lab.evaluate", "a b.ckpt"])
    assert main([checkpoint_of(run), "--quiet"]) == 0
    assert main([checkpoint_of(run), "--quiet", "--tta", "flip", "--output", str(tmp_path / "other")]) == 0
    logged = readings(run)
    assert [r["tta"] for r in logged] == ["none", "none", "flip"]
    assert logged[2]["tta_accuracy"] == best_of(tmp_path / "other")["tta"]["acc"] and logged[1]["tta_accuracy"] is None
    for reading in logged:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", reading["time"])
        assert reading["sha256"] == sha256(run / reading["checkpoint"])
        assert (reading["read"], reading["n"], reading["accuracy"]) == ("test", 360, accuracy)
        assert (reading["corruption"], reading["severity"]) == (None, None)
    assert logged[1]["command"] == "python -m cifar_lab.evaluate 'a b.ckpt'"
    assert "The test set was read 2 times for this run" in (run / "report.html").read_text()
    assert "The test set was read 3 times for this run" in (tmp_path / "other" / "report.html").read_text()
    assert best_of(run)["test_readings"] == 2 and best_of(tmp_path / "other")["test_readings"] == 3


def test_a_run_that_cannot_be_written_is_evaluated_all_the_same_and_it_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unreported: None
) -> None:
    evaluate(checkpoint_of(run))
    plain = Path.open

    def read_only(self: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        if self.parent == run and "r" not in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return plain(self, mode, *more, **options)

    monkeypatch.setattr(Path, "open", read_only)
    for count in (1, 2):
        words = [checkpoint_of(run), "--output", str(tmp_path / "other"), "--corruptions", "fog", "--severity", "1"]
        assert main(words) == 0
        printed = capsys.readouterr()
        said = " ".join(printed.err.split())
        assert said.startswith("note: the reading of the test set cannot be logged in") and said.count("note:") == 1
        assert [r["corruption"] for r in readings(tmp_path / "other")] == [None, "fog"] * count
        assert best_of(tmp_path / "other")["test_readings"] == 1 + 2 * count, "those of the run are counted"
    assert len(readings(run)) == 1
    assert evaluate(checkpoint_of(run)).accuracy > 0.5
    assert "(Read-only file system)" in " ".join(capsys.readouterr().err.split())


# Corrupted images


def test_corruptions_leave_a_row_each_and_print_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [checkpoint_of(run), "--corruptions", "gaussian_noise", "elastic_transform", "--severity", "5", "1"]
    assert main(words) == 0
    out, rows, best = capsys.readouterr().out, pd.read_csv(run / "corruptions.csv"), best_of(run)
    assert list(rows) == ["corruption", "severity", "n", "correct", "accuracy", "low", "high"]
    asked = [(name, severity) for name in ("gaussian_noise", "elastic_transform") for severity in (1, 5)]
    assert list(zip(rows.corruption, rows.severity, strict=True)) == asked
    model, test = network_of(run / "checkpoints" / "best.ckpt"), dataset.load(Recipe(dataset="digits"), "test")
    for row in rows.itertuples():
        with torch.no_grad():
            said = model(corrupt(test.images, str(row.corruption), int(str(row.severity)))).argmax(1)
        assert row.correct == int((said == test.labels).sum()) and row.accuracy == row.correct / row.n
        assert (row.low, row.high) == pytest.approx(wilson_by_hand(row.correct, row.n), abs=1e-9)
    assert best["corruptions_acc"] == pytest.approx(rows.accuracy.mean())
    logged = readings(run)
    assert [(r["corruption"], r["severity"]) for r in logged] == [(None, None), *asked]
    assert [r["accuracy"] for r in logged[1:]] == list(rows.accuracy)

    lines = out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    printed = {line.split()[0]: line.split()[1:] for line in lines}
    first = rows[rows.corruption == "gaussian_noise"].accuracy
    assert printed["severity"] == ["1", "5", "mean"]
    assert printed["gaussian_noise"] == [f"{value:.1%}" for value in [*first, first.mean()]]
    assert printed["mean"][-1] == f"{rows.accuracy.mean():.1%}" and printed["clean"] == [f"{best['test_acc']:.1%}"]
    assert (run / "figures" / "corruptions.png").exists()
    assert f"Clean {best['test_acc']:.1%}; corrupted {rows.accuracy.mean():.1%}" in (run / "report.html").read_text()


def test_what_was_said_of_corruptions_stays_with_its_checkpoint(run: Path, tmp_path: Path, unreported: None) -> None:
    assert main([checkpoint_of(run), "--quiet", "--corruptions", "contrast", "--severity", "3"]) == 0
    assert main([checkpoint_of(run), "--quiet"]) == 0
    assert "corruptions_acc" in best_of(run) and (run / "corruptions.csv").exists()
    other = tmp_path / "other"
    assert main([checkpoint_of(run), "--quiet", "--output", str(other)]) == 0
    assert "corruptions_acc" not in best_of(other) and not (other / "corruptions.csv").exists()


# A folder of one's own


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Images of the digits 7 and 3 out of the test set, some of them enlarged, one of them a JPEG."""
    test = dataset.load(Recipe(dataset="digits"), "test")
    for label, ending in ((7, "png"), (3, "jpg")):
        folder = tmp_path / "own" / str(label)
        folder.mkdir(parents=True)
        for i in torch.nonzero(test.labels == label)[:4].flatten().tolist():
            image = Image.fromarray(test.images[i].permute(1, 2, 0).numpy())
            image.resize((64, 64) if i % 2 else (32, 32)).save(folder / f"{i:03}.{ending}", quality=95)
    (tmp_path / "own" / "7" / "notes.txt").write_text("no image")
    return tmp_path / "own"


def test_a_folder_of_ones_own_may_lack_classes_and_is_no_reading_of_the_test_set(
    run: Path, own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "load", lambda *_: pytest.fail("the test set was read"))
    tested = {"test_acc": 0.9, "test_readings": 3, "corruptions_acc": 0.5}
    (run / "best.json").write_text(json.dumps({**best_of(run), **tested}))
    before = (run / "best.json").read_text()
    assert main([checkpoint_of(run), "--images", str(own), "--tta", "flip"]) == 0
    out, folder = " ".join(capsys.readouterr().out.split()), run / "images-own"
    assert (run / "best.json").read_text() == before and readings(run) == readings(folder) == []
    assert {p.name for p in folder.iterdir()} == {
        "best.json", "predictions.csv", "per_class.csv", "confusion.csv", "figures", "report.html",
    }  # fmt: skip
    said = pd.read_csv(folder / "predictions.csv")
    assert list(said["file"]) == [str(p) for p in [*sorted((own / "3").iterdir()), *sorted((own / "7").glob("*.png"))]]
    assert said.label.tolist() == [3] * 4 + [7] * 4
    best, accuracy = best_of(folder), accuracy_score(said.label, said.prediction)
    assert accuracy > 0.5, "they are the network's own test images, resized back"
    assert not [name for name in best if name in tested] and best["recipe"]["dataset"] == "digits"
    assert (best["images"]["acc"], best["images"]["n"], best["images"]["folder"]) == (accuracy, 8, str(own))
    classes = pd.read_csv(folder / "per_class.csv", dtype={"class": str})
    assert classes.n.tolist() == [0, 0, 0, 4, 0, 0, 0, 4, 0, 0] and classes.accuracy.notna().sum() == 2
    page = (folder / "report.html").read_text()
    for text in (out, page):
        assert f"Accuracy {accuracy:.2%}" in text and f"on {own}: not the test set." in text
        assert "nan%" not in text
        assert "With test-time augmentation (flip)" in text
    assert "test images" not in page and "Test accuracy" not in page and "The test set was read" not in page
    assert "0 no images 1 no images 2 no images 3 " in out
    assert sha256(run / "checkpoints" / "best.ckpt") == best["sha256"]
    assert (folder / best["checkpoint"]).resolve() == (run / "checkpoints" / "best.ckpt").resolve()


def test_own_images_may_be_corrupted_too(run: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [checkpoint_of(run), "--images", str(own), "--corruptions", "all", "--severity", "2", "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["corruptions"]) == 14 and {row["n"] for row in printed["corruptions"]} == {8}
    assert printed["read"] == str(own) and "Corrupted images" in (run / "images-own" / "report.html").read_text()
    assert readings(run) == []


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("unknown", r"images: .* holds the folders apple, which are no classes here. Legal: .* named 0, 1, 2, 3, 4"),
        ("empty", r"images: .* holds no image in a class's folder. Legal: a folder of folders of images"),
        ("absent", r"images: .* cannot be read \(No such file or directory\)"),
        ("damaged", r"is not a readable image"),
    ],
)
def test_a_folder_that_is_none_of_the_checkpoints_is_refused(harm: str, said: str, run: Path, own: Path) -> None:
    if harm == "unknown":
        (own / "apple").mkdir()
    elif harm == "damaged":
        (own / "7" / "a.png").write_bytes(b"poison")
    else:
        shutil.rmtree(own)
    if harm == "empty":
        (own / "7").mkdir(parents=True)
    with pytest.raises(DataError, match=said):
        main([checkpoint_of(run), "--images", str(own)])
    assert not (run / "images-own").exists()


# What the command refuses


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--tta flp", r"tta: 'flp'; did you mean flip\? Legal: none, flip, flip_shift"),
        ("--corruptions fogg", r"corruptions: 'fogg'; did you mean fog\? Legal: all, gaussian_noise"),
        ("--corruptions fog --severity 0", r"severity: 0. Legal: 1, 2, 3, 4, 5"),
        ("--corruptions fog --severity high", r"severity: 'high'. Legal: 1, 2, 3, 4, 5"),
        ("--severity 3", r"severity: 3 is that of --corruptions, of which none is given"),
        ("--images a --data_dir b", r"data_dir: 'b' is where the dataset lies; of --images it says nothing"),
        ("--imges a", r"--imges: there is no such flag; did you mean --images"),
    ],
)
def test_what_is_impossible_is_refused_before_the_checkpoint_is_opened(words: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        main(["/nowhere/a.ckpt", *words.split()])


def test_results_of_something_else_are_never_overwritten(
    run: Path, own: Path, tmp_path: Path, unreported: None
) -> None:
    assert main([checkpoint_of(run), "--quiet"]) == 0
    (run / "checkpoints" / "sha256.json").unlink()
    content = torch.load(checkpoint_of(run), weights_only=True)
    torch.save({**content, "note": "another"}, run / "checkpoints" / "another.ckpt")
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "trials.csv").write_text("trial_id\n")
    assert main([checkpoint_of(run), "--quiet", "--output", str(tmp_path / "out")]) == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for words in (
        [checkpoint_of(run), "--images", str(own), "--output", str(run)],
        [str(run / "checkpoints" / "another.ckpt"), "--output", str(run)],
        [str(run / "checkpoints" / "another.ckpt"), "--output", str(tmp_path / "out")],
        [checkpoint_of(run), "--output", str(tmp_path / "search")],
    ):
        with pytest.raises(InputError, match="holds other results, which are not overwritten"):
            main(words)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_checkpoint_that_its_run_does_not_speak_of_has_its_recipe_on_its_page(run: Path) -> None:
    best = best_of(run)
    (run / "best.json").write_text(json.dumps(best | {"sha256": "0" * 64}))
    before = (run / "best.json").read_bytes()
    assert main([checkpoint_of(run), "--quiet"]) == 0
    found = best_of(run / "checkpoints")
    assert (found["recipe"], found["sha256"]) == (best["recipe"], best["sha256"])
    assert found["checkpoint"] == "best.ckpt" and found["command"].startswith("python -m cifar_lab.evaluate ")
    page = (run / "checkpoints" / "report.html").read_text()
    assert "all training images, 10% of the training set held out" in page
    assert (run / "best.json").read_bytes() == before


def test_a_searchs_winner_is_known_but_its_files_are_left_alone(run: Path) -> None:
    (run / "trials.csv").write_text("trial_id\n")
    (run / "checkpoints" / "T001-s1000").mkdir()
    winner = run / "checkpoints" / "T001-s1000" / "best.ckpt"
    shutil.move(checkpoint_of(run), winner)
    before = best_of(run)
    assert main([str(winner), "--quiet"]) == 0
    found = best_of(winner.parent)
    assert (found["trial_id"], found["val_acc"], found["checkpoint"]) == ("run", 0.5, "best.ckpt")
    assert best_of(run) == before and readings(run)[0]["sha256"] == before["sha256"]


def test_an_output_that_cannot_be_written_is_refused_before_the_test_set_is_read(run: Path) -> None:
    with pytest.raises(InputError, match=r"output: '/proc/nowhere' cannot be written .* Legal: a folder you may write"):
        main([checkpoint_of(run), "--output", "/proc/nowhere"])
    assert readings(run) == []
