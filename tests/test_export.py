"""The exported model answers as the checkpoint does, says what it is, and is not left behind otherwise."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from cifar_lab import cli
from cifar_lab.checkpoint import best_record
from cifar_lab.evaluate import Evaluation, probabilities, record_of_test
from cifar_lab.export import BATCHES, CARD, TOLERANCE, main, model_card, record_of_run, to_onnx
from cifar_lab.files import read_json, sha256, write_json
from cifar_lab.fit import identity, restore
from cifar_lab.models import ARCHITECTURES
from cifar_lab.predict import predict
from cifar_lab.recipe import InputError, Recipe

MakeCheckpoint = Callable[..., Path]
IMAGES = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def answers(model: Path | bytes, images: torch.Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found: np.ndarray = onnxruntime.InferenceSession(model, options).run(["probabilities"], {"images": images.numpy()})[
        0
    ]
    return found


def card(text: str) -> str:
    return " ".join(text.split())


# The model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_exported_and_answers_as_evaluation_does(
    arch: str, make_checkpoint: MakeCheckpoint
) -> None:
    model = restore(make_checkpoint(arch=arch))
    exported = to_onnx(model, {})
    wanted = probabilities(model, IMAGES)
    assert wanted.min() > 0.01 and wanted.std() > 1e-3, "answers that are all 0 or 1 would show no difference"
    np.testing.assert_allclose(answers(exported, IMAGES), wanted, atol=1e-5)
    np.testing.assert_allclose(answers(exported, IMAGES[1:2]), wanted[1:2], atol=1e-5)
    assert answers(exported, IMAGES[:0]).shape == (0, 2)


def test_the_weights_are_those_that_evaluate_uses_and_no_others(make_checkpoint: MakeCheckpoint) -> None:
    model = restore(make_checkpoint(ema=0.5))
    exported = to_onnx(model, {})
    np.testing.assert_allclose(answers(exported, IMAGES), probabilities(model, IMAGES), atol=1e-6)
    model.averaged = None
    assert np.abs(answers(exported, IMAGES) - probabilities(model, IMAGES)).max() > 1e-4
    assert len(exported) < 1.2 * 4 * sum(p.numel() for p in model.network.parameters())


def test_the_command_leaves_the_model_and_its_card(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = "/home/somebody/images"
    checkpoint, folder = make_checkpoint(classes=("apple", "p|<i>r"), data_dir=place), tmp_path / "out"
    assert main([str(checkpoint), "--output", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "model.onnx" in said.out.splitlines()[-1] and "no probability is further" in said.out
    assert sorted(p.name for p in folder.iterdir()) == ["MODEL_CARD.md", "model.onnx"]

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 3, 32, 32])
    assert (returned.name, returned.type, returned.shape) == ("probabilities", "tensor(float)", ["batch", 2])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["apple", "p|<i>r"] and metadata["sha256"] == sha256(checkpoint)
    assert Recipe(**json.loads(metadata["recipe"])) == restore(checkpoint).recipe.replace(data_dir=None)
    assert "uint8 (N, 3, 32, 32)" in metadata["input"] and "softmax" in metadata["output"]
    assert {"torch", "onnx", "onnxruntime"} <= set(json.loads(metadata["versions"]))
    text = (folder / "MODEL_CARD.md").read_text()
    for path in (str(Path.cwd()), place):
        assert path not in text and path.encode() not in (folder / "model.onnx").read_bytes()
    assert text.startswith("# classic_cnn on digits\n") and "62,006" not in text and "61,326 parameters" in text
    assert sha256(folder / "model.onnx") in text and sha256(checkpoint) in text
    assert f"python -m cifar_lab.export {checkpoint} --output {folder}" in text
    assert "Not tested" in text and "apple, p\\|&lt;i&gt;r" in text and not re.search(r"[{}] |%s", text)
    assert metadata["input"] in text and metadata["output"] in text

    # Into a file of another name, to the bit.
    own = tmp_path / "own" / "pears.onnx"
    assert main([str(checkpoint), "--output", str(own), "--quiet"]) == 0
    assert capsys.readouterr().out == f"{os.path.relpath(own)}\n" and "`pears.onnx`" in own.with_name(CARD).read_text()
    assert own.read_bytes() == (folder / "model.onnx").read_bytes()

    assert main([str(checkpoint), "--output", str(tmp_path / "told"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == os.path.relpath(tmp_path / "told" / "model.onnx") and told["bytes"] == own.stat().st_size
    assert told["sha256"] == sha256(checkpoint) and 0 <= told["largest_difference"] <= 1e-4

    # The card's own example says what predict says.
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / "image.png")
    monkeypatch.chdir(folder)
    exec(text.partition("```python\n")[2].partition("```")[0], {})
    name, probability = capsys.readouterr().out.split()
    expected = predict(checkpoint, "image.png")[0].top()[0]
    assert name == expected[0] and float(probability) == pytest.approx(expected[1], abs=1e-5)


def test_a_model_that_answers_otherwise_is_not_left(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = torch.onnx.export

    def disturbed(network: torch.nn.Module, *words: Any, **options: Any) -> Any:
        other = copy.deepcopy(network)
        other[0].std *= 1.05  # type: ignore[index]
        return plain(other, *words, **options)

    monkeypatch.setattr(torch.onnx, "export", disturbed)
    assert main([str(make_checkpoint()), "--output", str(tmp_path / "out")]) == 1
    said = card(capsys.readouterr().err)
    found = re.fullmatch(
        r"error: the exported model's probabilities are up to (\S+) from PyTorch's, more than 0.0001. "
        r"Nothing was written.", said
    )  # fmt: skip
    assert found and float(found[1]) > TOLERANCE and not (tmp_path / "out").exists()


def test_a_model_that_answers_no_number_is_not_left(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cifar_lab.export.to_onnx", lambda *_: b"")
    monkeypatch.setattr("cifar_lab.export.difference", lambda *_: float("nan"))
    assert main([str(make_checkpoint()), "--output", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_one_image_and_several_are_compared() -> None:
    assert BATCHES[0] == 1 and max(BATCHES) > 1


# The card's figures


def record(checkpoint: Path, seeds: list[float], **changes: Any) -> Path:
    """Leave best.json and per_class.csv in the checkpoint's run, as evaluation does."""
    run, recipe = checkpoint.parents[1], restore(checkpoint).recipe
    row = {"epoch": 7.0, "val_acc": 0.8125}
    best = best_record(recipe, row, checkpoint, run, trial_id="T001", command="python -m tune.asha --arch x")
    labels = np.arange(200) % 2
    said = np.where(np.arange(200) < 20, 1 - labels, labels)
    result = Evaluation(labels, np.eye(2)[said], ("apple", "pear"))
    result.write(run)
    write_json(run / "best.json", best | (record_of_test(result, seeds) if seeds else {}) | changes)
    return run


def card_of(checkpoint: Path) -> str:
    model, file = restore(checkpoint), checkpoint.with_name("model.onnx")
    file.write_bytes(b"a model")
    who = identity(model, checkpoint)
    best, run = record_of_run(checkpoint, who["sha256"])
    return card(model_card(model, who, best, run, file=file, largest=1e-7, command="a command"))


def test_the_card_has_the_figures_of_this_very_checkpoint(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(arch="compact_cnn", precision="bf16")
    record(checkpoint, [0.9], val_n=100, val_low=0.7, val_high=0.9)
    text = card_of(checkpoint)
    assert "Validation accuracy 81.25% (70.00% to 90.00%, Wilson 95%, n = 100), at epoch 7." in text
    assert "Test accuracy of this checkpoint 90.00% (85.06% to 93.43%, Wilson 95%, n = 200)." in text
    assert "Expected calibration error 10.00%, over 15 bins" in text  # always sure, and right nine times of ten
    assert "| apple | 100 | 90 | 90.0% |" in text and "python -m tune.asha --arch x" in text
    assert "Measured in bf16" in text and "Over the seeds" not in text and "Not tested" not in text

    record(checkpoint, [0.9, 0.92, 0.88])
    text = card_of(checkpoint)
    assert "Test accuracy 90.00% (85.03% to 94.97%, t 95%, 3 seeds, n = 200)." in text
    assert "Validation accuracy 81.25%, at epoch 7." in text

    record(checkpoint, [])
    assert "Validation accuracy 81.25% at epoch 7; not tested." in card_of(checkpoint)
    assert "| apple |" not in card_of(checkpoint)

    record(checkpoint, [0.9], val_acc=None)
    assert "Trained without validation, to epoch 7. - Test accuracy" in card_of(checkpoint)


@pytest.mark.parametrize("damage", ["another's", "torn"])
def test_figures_of_another_checkpoint_are_not_taken(
    damage: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(arch="compact_cnn")
    run = record(checkpoint, [0.9], sha256="0" * 64)
    if damage == "torn":
        (run / "best.json").write_text((run / "best.json").read_text()[:100])
    text = card_of(checkpoint)
    assert "Not tested" in text and "90.0" not in text and "81.25" not in text


def test_the_run_of_a_finalist_is_found(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("T001-s1/best.ckpt")
    run = checkpoint.parents[2]
    write_json(run / "best.json", {"sha256": sha256(checkpoint)})
    assert record_of_run(checkpoint, sha256(checkpoint)) == (read_json(run / "best.json"), run)
    assert record_of_run(checkpoint, "0" * 64) == ({}, checkpoint.parent)


@pytest.mark.parametrize("dataset", ["cifar10", "folder", "digits"])
def test_the_card_knows_each_dataset_and_its_limits(dataset: str, make_checkpoint: MakeCheckpoint) -> None:
    how = {"folder": {"folds": 3, "fold": 2}, "digits": {"val_fraction": 0.0}, "cifar10": {}}
    said = {
        "folder": "Fold 2 of 3",
        "digits": "No image of the training set validated",
        "cifar10": "10% of the training set, stratified (split_seed 0)",
    }
    text = card_of(make_checkpoint(arch="compact_cnn", dataset=dataset, limit_train=1234, **how[dataset]))
    assert ("near-duplicate" in text) == (dataset == "cifar10")
    assert said[dataset] in text and "Only 1,234 training images" in text


# What is refused


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended, cli.exit_status():
        main(words)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.startswith("error:")
    return card(said.err)


def test_a_malicious_checkpoint_runs_nothing(trap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no checkpoint of cifar_lab" in refused([str(trap), "--output", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.ckpt").write_bytes(os.urandom(100))
    assert "is no checkpoint of cifar_lab" in refused([str(tmp_path / "a.ckpt")], capsys)
    assert "no such checkpoint" in refused([str(tmp_path / "b.ckpt")], capsys)


def test_without_the_packages_the_extra_is_named(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else plain(name))
    said = refused([str(make_checkpoint())], capsys)
    assert said == "error: Exporting needs onnxscript, which the extra `onnx` installs: pip install -e '.[onnx]'."


@pytest.mark.parametrize("name", ["model.onnx", "MODEL_CARD.md"])
def test_nothing_is_overwritten(name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name}' exists already, and results are never overwritten"):
        main([str(make_checkpoint()), "--output", str(tmp_path)])
    assert (tmp_path / name).read_text() == "mine"


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cifar_lab.export.to_onnx", None)
    for place in ("/proc/nowhere", "/dev/null", "/dev/null/a.onnx"):
        assert f"--output: '{place}' cannot be written" in refused([str(make_checkpoint()), "--output", place], capsys)
