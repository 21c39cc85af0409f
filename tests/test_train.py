"""Training: it learns, says what sklearn says, resumes bit by bit, and refuses what it cannot trust."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import InterruptionError, interrupted, look_into_resnets
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch import Tensor

from cifar_lab import augment, machine
from cifar_lab.checkpoint import (
    CURVE_COLUMNS,
    CheckpointError,
    Row,
    Run,
    difference,
    ended_run,
    read_checkpoint,
)
from cifar_lab.classifier import ImageClassifier, macro_f1
from cifar_lab.cli import exit_status
from cifar_lab.data import CIFAR10DataModule
from cifar_lab.dataset import DataError
from cifar_lab.evaluate import main as evaluate_command
from cifar_lab.fit import fit, trainer
from cifar_lab.prepare import FEW_STEPS, shortage
from cifar_lab.recipe import InputError, Recipe
from cifar_lab.train import main as train_command

EPOCHS = 4


def recipe(**fields: Any) -> Recipe:
    small = {
        "arch": "classic_cnn",
        "width": 3,
        "limit_train": 120,
        "max_epochs": EPOCHS,
        "optimizer": "adam",
        "lr": 3e-3,
    }
    return Recipe(**{**small, "dataset": "digits", "precision": "32", "rotate": 0.0, **fields})


def test_what_would_make_lightnings_steps_longer_is_still_there_to_be_avoided(tmp_path: Path) -> None:
    assert "_current_fx_name" in vars(pl.LightningModule()), "the name of the attribute that it sets at every hook"
    profiler: Any = trainer(recipe(), tmp_path, []).profiler
    assert profiler.profile("one") is profiler.profile("another"), "no context is made at every hook"


def test_each_step_has_the_gradient_of_its_own_batch_alone(tmp_path: Path) -> None:
    def gradients(batch_size: int) -> list[torch.Tensor]:
        """The gradient at every step of an epoch, in which the weights stay as they are."""
        found: list[torch.Tensor] = []

        class Look(pl.Callback):
            def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
                own = [parameter.grad for parameter in pl_module.parameters()]
                found.append(torch.cat([gradient.flatten() for gradient in own if gradient is not None]))

        still: dict[str, Any] = {"optimizer": "sgd", "lr": 1e-12, "max_epochs": 1, "augment": False, "dropout": 0.0}
        fit(recipe(**still, batch_size=batch_size), tmp_path / str(batch_size), callbacks=[Look()])
        return found

    (whole,), halves = gradients(120), gradients(60)
    assert len(halves) == 2 and whole.norm() > 0
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole, rtol=1e-3, atol=1e-6)


def weights(folder: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = read_checkpoint(folder / name)["state_dict"]
    return found


def curves(run: Run) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in run.history]


# What a training leaves


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(session_cache))
        patch.delenv("CIFAR_LAB_DATA", raising=False)
        asked = Recipe(
            arch="classic_cnn", dataset="digits", optimizer="adam", lr=1e-3, max_epochs=12, flip="none", rotate=0.0,
            crop=2, batch_size=32, precision="32",
        )  # fmt: skip
        return fit(asked, tmp_path_factory.mktemp("learned"))


def test_digits_are_learned(learned: Run) -> None:
    assert learned.best["val_acc"] > 0.9
    assert learned.history[-1]["train_loss"] < learned.history[0]["train_loss"] / 2
    assert not learned.diverged


def test_a_row_has_the_names_of_the_curves(learned: Run) -> None:
    assert [row["epoch"] for row in learned.history] == list(range(1, 13))
    for row in learned.history:
        assert tuple(row) == CURVE_COLUMNS and row["seconds"] > 0 and row["lr"] == 1e-3


def test_the_metrics_are_sklearns_of_the_best_checkpoint(learned: Run) -> None:
    content = read_checkpoint(learned.best_checkpoint)
    model = ImageClassifier(**content["hyper_parameters"])
    model.load_state_dict(content["state_dict"])
    data = CIFAR10DataModule(learned.recipe)
    with torch.no_grad():
        probabilities = model.eval()(data.set.images[data.val_indices]).double().softmax(1).numpy()
    labels, said = data.set.labels[data.val_indices].numpy(), probabilities.argmax(1)
    assert learned.best["val_acc"] == accuracy_score(labels, said)
    assert learned.best["val_macro_f1"] == pytest.approx(f1_score(labels, said, average="macro"))
    assert learned.best["val_loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-5)


def test_macro_f1_counts_an_absent_class_as_zero() -> None:
    rng = np.random.default_rng(0)
    labels, said = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
    confusion = np.zeros((5, 5), int)
    np.add.at(confusion, (labels, said), 1)
    expected = f1_score(labels, said, labels=range(5), average="macro", zero_division=0)
    assert float(macro_f1(torch.from_numpy(confusion))) == pytest.approx(expected)


def test_the_best_epoch_is_the_first_of_the_highest() -> None:
    losses = {"train_loss": 1.0, "val_loss": 1.0}
    rows: list[Row] = [{"epoch": i + 1, "val_acc": acc, **losses} for i, acc in enumerate((0.1, 0.5, 0.5, 0.2))]
    assert Run(recipe(), Path(), rows).best["epoch"] == 2


def test_best_holds_the_weights_of_the_best_epoch(tmp_path: Path) -> None:
    kept: dict[int, dict[str, torch.Tensor]] = {}
    run = fit(recipe(), tmp_path, on_epoch=lambda row: kept.update({int(row["epoch"]): weights(tmp_path)}))
    best = weights(tmp_path, "best.ckpt")
    assert all(torch.equal(best[name], tensor) for name, tensor in kept[int(run.best["epoch"])].items())


def test_checkpoints_hold_tensors_and_primitives(learned: Run) -> None:
    for name in ("best.ckpt", "last.ckpt"):
        content = torch.load(learned.folder / name, weights_only=True)
        assert Recipe(**content["hyper_parameters"]["recipe"]) == learned.recipe
        assert content["hyper_parameters"]["classes"] == list("0123456789")
    assert sorted(p.name for p in learned.folder.iterdir()) == ["best.ckpt", "last.ckpt", "sha256.json"]


def test_what_was_measured_is_in_the_recipe_and_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(**fields: str) -> None:
        monkeypatch.setattr(machine, "measured", lambda asked: asked.replace(**fields))

    asked = recipe(precision="auto", max_epochs=1)
    answer(precision="32", memory_format="contiguous")
    assert fit(asked, tmp_path).recipe.precision == "32"
    answer(precision="bf16", memory_format="channels_last")
    again = fit(asked, tmp_path, resume=True).recipe
    assert (again.precision, again.memory_format) == ("32", "contiguous"), "a resumed run is the same run"
    with pytest.raises(CheckpointError, match="memory_format"):
        fit(asked.replace(memory_format="channels_last"), tmp_path, resume=True)


def test_absent_images_are_said_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        fit(recipe(dataset="folder", data_dir=str(tmp_path / "absent")), tmp_path / "run")


# Without validation

ALL = {"val_fraction": 0.0, "limit_train": 100}


def test_without_validation_the_last_epoch_is_the_best(tmp_path: Path) -> None:
    run = fit(recipe(**ALL), tmp_path)
    for row in run.history:
        assert tuple(row) == tuple(name for name in CURVE_COLUMNS if not name.startswith("val_"))
    assert run.best is run.history[-1] and len(run.history) == EPOCHS and not run.diverged
    last = weights(tmp_path)
    assert all(torch.equal(last[name], tensor) for name, tensor in weights(tmp_path, "best.ckpt").items())


def test_without_validation_every_image_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(val_fraction=0.0, limit_train=None, max_epochs=1, batch_size=500)
    sizes: list[int] = []
    plain = ImageClassifier.training_step
    monkeypatch.setattr(
        ImageClassifier,
        "training_step",
        lambda self, batch, batch_idx: sizes.append(len(batch[1])) or plain(self, batch, batch_idx),
    )
    fit(asked, tmp_path)
    assert sizes == [500, 500, 437]


def test_without_validation_a_diverged_run_is_marked(tmp_path: Path) -> None:
    assert fit(recipe(**ALL, optimizer="sgd", lr=1e30), tmp_path).diverged


# Progressive resizing


def test_the_first_epochs_train_on_small_images_and_validate_on_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    fields = {"arch": "resnet", "width": 8, "limit_train": 40, "batch_size": 40}
    asked = recipe(**fields, max_epochs=5, small_share=0.5, small_side=12)
    look_into_resnets(monkeypatch, lambda network, images: seen.append((network.training, images.shape[-1])))
    fit(asked, tmp_path)
    assert [side for training, side in seen if training] == [12, 12, 32, 32, 32]
    assert {side for training, side in seen if not training} == {32}


def test_what_is_shrunk_is_the_normalised_image() -> None:
    asked = recipe(arch="resnet", width=8, small_share=0.5, small_side=12)
    model = ImageClassifier(asked.to_dict(), "0123456789", [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    seen: list[Tensor] = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    model.training_step((images, torch.zeros(8, dtype=torch.int64)), 0)
    torch.testing.assert_close(seen, [augment.shrink(model.normalise(images), 12)])


# Resuming

PLATEAU = {"schedule": "plateau", "lr_patience": 0, "optimizer": "sgd", "lr": 1e-5}
SAME: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
    "muon": {"optimizer": "muon", "lr": 0.05, "weight_decay": 0.01},
    "step": {"schedule": "step", "lr_step": 1},
    "plateau": PLATEAU,
    "plateau after warm-up": {**PLATEAU, "warmup_epochs": 1.5},
    "cosine after warm-up": {"schedule": "cosine", "warmup_epochs": 2.5},
    "onecycle": {"schedule": "onecycle"},
    "linear": {"schedule": "linear"},
    "no validation": ALL,
    "dropout": {"dropout": 0.5},
    "mixup": {"mixup": 1.0},
    "cutmix": {"cutmix": 1.0, "label_smoothing": 0.1},
    "ema": {"ema": 0.9},
    "accumulate": {"accumulate": 2, "schedule": "linear"},
    "rotate and cutout": {"rotate": 30.0, "cutout": 8, "flip": "alternating"},
    "resnet": {"arch": "resnet", "width": 8, "stem": "imagenet", "dropout": 0.2, "limit_train": 65, "batch_size": 32},
    "small images": {"arch": "resnet", "width": 8, "stem": "imagenet", "limit_train": 65, "small_share": 0.75},
}  # fmt: skip


@pytest.mark.parametrize("fields", SAME.values(), ids=SAME)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(fields: dict[str, Any], tmp_path: Path) -> None:
    asked = recipe(**fields)
    whole = fit(asked, tmp_path / "whole")
    interrupted(asked, tmp_path / "parts", 2)
    torch.manual_seed(12345), torch.rand(7)  # another process has drawn other numbers
    parts = fit(asked, tmp_path / "parts", resume=True)
    assert curves(parts) == curves(whole) and len(parts.history) == EPOCHS
    for name in ("last.ckpt", "best.ckpt"):
        one, other = weights(tmp_path / "whole", name), weights(tmp_path / "parts", name)
        assert one.keys() == other.keys()
        assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize("images", [96, 80], ids=["full", "and a lone batch at the end"])
def test_batches_that_make_a_step_together_are_one_batch(tmp_path: Path, optimizer: str, images: int) -> None:
    fields = {"augment": False, "limit_train": images, "optimizer": optimizer, "lr": 0.02, "ema": 0.5}
    fields["schedule"] = "linear"
    whole = fit(recipe(**fields, batch_size=32), tmp_path / "whole")
    parts = fit(recipe(**fields, batch_size=16, accumulate=2), tmp_path / "parts")
    assert [row["lr"] for row in parts.history] == [row["lr"] for row in whole.history]
    one, other = (weights(tmp_path / name, "last.ckpt") for name in ("whole", "parts"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("accumulate", "images", "epochs", "said"),
    [
        (8, 360, 8, "only 24 steps: 23 batches an epoch, 8 to a step. A smaller --accumulate"),
        (2, 16 * 2 * (FEW_STEPS - 1), 1, f"only {FEW_STEPS - 1} steps"),
        (2, 16 * 2 * FEW_STEPS, 1, None),
        (1, 16, 1, None),
    ],
)
def test_too_few_steps_are_said(accumulate: int, images: int, epochs: int, said: str | None) -> None:
    note = shortage(recipe(batch_size=16, accumulate=accumulate, max_epochs=epochs), images)
    assert said in note if said else note == ""


def test_a_plateau_drops_the_lr_at_all(tmp_path: Path) -> None:
    rates = [row["lr"] for row in fit(recipe(**SAME["plateau"]), tmp_path).history]
    assert rates[0] == 1e-5 and rates[-1] < 1e-5, "else the test above would prove nothing"


@pytest.mark.parametrize("after", [1, 2, 3])
def test_early_stopping_survives_a_resume(tmp_path: Path, after: int) -> None:
    asked = recipe(optimizer="sgd", lr=1e-9, momentum=0.0, early_stop_patience=3, max_epochs=9)
    whole = fit(asked, tmp_path / "whole")
    interrupted(asked, tmp_path / "parts", after)
    assert curves(fit(asked, tmp_path / "parts", resume=True)) == curves(whole)
    assert len(whole.history) == 4, "one epoch, then three without a better val_acc"


def test_a_run_may_be_interrupted_again_and_again(tmp_path: Path) -> None:
    whole = fit(recipe(), tmp_path / "whole")
    for epoch in range(1, EPOCHS):

        def stop(row: Row, epoch: int = epoch) -> None:
            if row["epoch"] == epoch:
                raise InterruptionError

        with pytest.raises(InterruptionError):
            fit(recipe(), tmp_path / "parts", resume=True, on_epoch=stop)
    assert curves(fit(recipe(), tmp_path / "parts", resume=True)) == curves(whole)


def test_resuming_a_finished_run_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fit(recipe(), tmp_path)
    stamp = (tmp_path / "last.ckpt").stat().st_mtime_ns
    monkeypatch.setattr("cifar_lab.fit.trainer", lambda *_, **__: pytest.fail("trained again"))
    heard: list[Row] = []
    after = fit(recipe(), tmp_path, resume=True, on_epoch=heard.append)
    assert after.history == before.history and heard == before.history[-1:]
    assert (tmp_path / "last.ckpt").stat().st_mtime_ns == stamp


def test_a_run_interrupted_after_its_last_epoch_is_finished(tmp_path: Path) -> None:
    interrupted(recipe(), tmp_path, EPOCHS)
    ended = ended_run(tmp_path)
    assert ended is not None and len(ended.history) == EPOCHS
    assert fit(recipe(), tmp_path, resume=True).history == ended.history


def test_ended_run_knows_what_has_not_ended(tmp_path: Path) -> None:
    assert ended_run(tmp_path) is None
    interrupted(recipe(), tmp_path, 2)
    assert ended_run(tmp_path) is None


def test_a_resumed_run_first_repeats_the_last_epoch(tmp_path: Path) -> None:
    interrupted(recipe(), tmp_path, 2)
    heard: list[Row] = []
    run = fit(recipe(), tmp_path, resume=True, on_epoch=heard.append)
    assert [row["epoch"] for row in heard] == [2, 3, 4] and heard[0] == run.history[1]


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path: Path) -> None:
    assert len(fit(recipe(max_epochs=1), tmp_path / "new", resume=True).history) == 1


def test_without_resume_an_old_run_is_begun_anew(tmp_path: Path) -> None:
    before = fit(recipe(max_epochs=2), tmp_path)
    assert curves(fit(recipe(max_epochs=2), tmp_path)) == curves(before)


def test_resuming_with_another_recipe_is_refused(tmp_path: Path) -> None:
    interrupted(recipe(), tmp_path, 1)
    with pytest.raises(CheckpointError) as caught:
        fit(recipe(lr=0.5, batch_size=32), tmp_path, resume=True)
    assert "lr was 0.003, asked 0.5" in str(caught.value) and "batch_size was 64, asked 32" in str(caught.value)
    assert isinstance(caught.value, InputError)


# Divergence


def test_a_diverged_run_ends_and_is_marked(tmp_path: Path) -> None:
    run = fit(recipe(optimizer="sgd", lr=1e30), tmp_path)
    assert run.diverged and len(run.history) == 1
    assert not math.isfinite(run.history[-1]["train_loss"])
    ended = ended_run(tmp_path)
    assert ended is not None and ended.diverged


def test_a_diverged_run_keeps_its_earlier_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ImageClassifier.training_step

    def worse(self: ImageClassifier, batch: Any, batch_idx: int) -> Any:
        return plain(self, batch, batch_idx) * (math.nan if self.current_epoch == 2 else 1)

    monkeypatch.setattr(ImageClassifier, "training_step", worse)
    kept: list[dict[str, torch.Tensor]] = []
    run = fit(recipe(), tmp_path, on_epoch=lambda _: kept.append(weights(tmp_path, "best.ckpt")))
    assert run.diverged and len(run.history) == 3 and math.isnan(run.history[2]["val_loss"])
    assert run.best["epoch"] < 3, "the best is never an epoch that diverged"
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path, "best.ckpt").values())
    assert all(torch.equal(kept[1][name], tensor) for name, tensor in weights(tmp_path, "best.ckpt").items())


def test_the_best_epoch_of_a_diverged_run_is_one_with_losses() -> None:
    good = {"epoch": 1, "train_loss": 2.0, "val_loss": 2.0, "val_acc": 0.1}
    bad = {"epoch": 2, "train_loss": math.nan, "val_loss": math.nan, "val_acc": 0.2}
    assert Run(recipe(), Path(), [good, bad], diverged=True).best == good


def test_an_epoch_without_its_val_acc_is_an_error_that_names_it_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ImageClassifier.on_validation_epoch_end

    def forgetful(self: ImageClassifier) -> None:
        plain(self)
        del self.metrics["val_acc"]

    monkeypatch.setattr(ImageClassifier, "on_validation_epoch_end", forgetful)
    with pytest.raises(KeyError, match="val_acc"):
        fit(recipe(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_training_that_ended_holds_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(machine, "return_memory", lambda: given_back.append(True))
    asked = recipe()
    data = CIFAR10DataModule(asked)  # which its caller still has
    known = {id(each) for each in gc.get_objects()}
    gc.disable()  # by itself Python may look for circles at any time, or after dozens of trainings
    try:
        fit(asked, tmp_path, data=data)
        kinds = (torch.nn.Module, torch.optim.Optimizer, pl.Trainer)
        left = [each for each in gc.get_objects() if issubclass(type(each), kinds) and id(each) not in known]
    finally:
        gc.enable()
    assert not left and given_back


# Checkpoints that cannot be trusted


def test_an_absent_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        read_checkpoint(tmp_path / "absent.ckpt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(learned: Run, tmp_path: Path, share: float) -> None:
    whole = (learned.folder / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: int(len(whole) * share)])
    for attempt in (
        lambda: read_checkpoint(tmp_path / "last.ckpt"),
        lambda: fit(learned.recipe, tmp_path, resume=True),
    ):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert str(tmp_path / "last.ckpt") in str(caught.value)
    assert str(caught.value).endswith(f"To begin that training anew, remove {tmp_path}.")


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_flipped_bit_is_seen(learned: Run, tmp_path: Path, name: str) -> None:
    whole = bytearray((learned.folder / name).read_bytes())
    whole[len(whole) // 2] ^= 1  # in the middle of the weights: torch.load does not notice
    (tmp_path / name).write_bytes(whole)
    read_checkpoint(tmp_path / name)
    (tmp_path / "sha256.json").write_text((learned.folder / "sha256.json").read_text())
    with pytest.raises(CheckpointError, match="sha256 is not the one noted"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("harm", ["truncated", "flipped", "absent"])
def test_a_damaged_last_checkpoint_costs_an_epoch_and_nothing_else(tmp_path: Path, harm: str) -> None:
    whole = fit(recipe(), tmp_path / "whole")
    interrupted(recipe(), tmp_path / "cut", 3)
    last = tmp_path / "cut" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.unlink()
    if harm != "absent":
        last.write_bytes(content if harm == "flipped" else content[:1000])
    again: list[float] = []
    parts = fit(recipe(), tmp_path / "cut", resume=True, on_epoch=lambda row: again.append(row["epoch"]))
    assert again == [2, 3, 4]
    assert curves(parts) == curves(whole)
    for name in ("last.ckpt", "best.ckpt"):
        one, other = weights(tmp_path / "whole", name), weights(tmp_path / "cut", name)
        assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert not (tmp_path / "cut" / "previous.ckpt").exists()


class Malice:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.place,)


@pytest.mark.parametrize("through_torch", [True, False])
def test_a_malicious_checkpoint_runs_nothing(tmp_path: Path, through_torch: bool) -> None:
    place, content = tmp_path / "last.ckpt", {"hyper_parameters": Malice(tmp_path / "harm"), "state_dict": {}}
    if through_torch:
        torch.save(content, place)
    else:
        place.write_bytes(pickle.dumps(content))
    for attempt in (lambda: read_checkpoint(place), lambda: fit(recipe(), tmp_path, resume=True)):
        with pytest.raises(CheckpointError):
            attempt()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["last.ckpt", "previous.ckpt"])
@pytest.mark.parametrize("command", [evaluate_command, train_command])
def test_the_commands_refuse_a_malicious_checkpoint_in_a_paragraph(
    command: Callable[[list[str]], int], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "one" / "checkpoints" / name
    place.parent.mkdir(parents=True)
    content = pickle.dumps({"hyper_parameters": {"recipe": {}}, "state_dict": Malice(tmp_path / "harm")})
    place.write_bytes(content)
    words = ["--resume", "--name", "one", "--results_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as ended, exit_status():
        command([str(place)] if command is evaluate_command else words)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.split()[0] == "error:"
    assert "no checkpoint of cifar_lab" in " ".join(said.err.split()) or name == "previous.ckpt"
    assert "Traceback" not in said.err and "\n\n" not in said.err
    assert [p.name for p in (tmp_path / "one").rglob("*") if p.is_file()] == [name]
    assert not (tmp_path / "harm").exists()
    pickle.loads(content)
    assert (tmp_path / "harm").exists(), "else the checkpoint was harmless"


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, [1, 2], {"hyper_parameters": {}, "state_dict": {}}])
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="is no checkpoint of cifar_lab"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_weights_alone_are_no_run_to_resume(tmp_path: Path) -> None:
    fit(recipe(max_epochs=1), tmp_path)
    (tmp_path / "best.ckpt").replace(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError):
        fit(recipe(max_epochs=1), tmp_path, resume=True)


# Averages and devices


def test_the_average_is_what_is_validated(tmp_path: Path) -> None:
    asked = recipe(ema=0.95)
    run = fit(asked, tmp_path)
    content = read_checkpoint(tmp_path / "last.ckpt")
    model = ImageClassifier(**content["hyper_parameters"])
    model.load_state_dict(content["state_dict"])
    model.eval()
    data = CIFAR10DataModule(asked)
    images, labels = data.set.images[data.val_indices], data.set.labels[data.val_indices]
    assert model.averaged is not None
    with torch.no_grad():
        averaged = torch.nn.functional.cross_entropy(model.averaged(model.normalise(images)), labels)
        raw = torch.nn.functional.cross_entropy(model.network(model.normalise(images)), labels)
    assert (
        run.history[-1]["val_loss"] == pytest.approx(float(averaged), rel=1e-5) != pytest.approx(float(raw), rel=1e-3)
    )


def test_the_average_does_not_change_what_is_trained(tmp_path: Path) -> None:
    one, other = fit(recipe(ema=0.9), tmp_path / "ema"), fit(recipe(), tmp_path / "plain")
    assert [row["train_loss"] for row in one.history] == [row["train_loss"] for row in other.history]


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine.device() == torch.device("cuda")
    assert machine.processor() == "H200" and machine.hardware() == "1 x H200"


def test_the_difference_of_two_recipes_names_what_differs() -> None:
    was = recipe()
    assert difference(was, dataclasses.replace(was, lr=0.5)) == "lr was 0.003, asked 0.5"
