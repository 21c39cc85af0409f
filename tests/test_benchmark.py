"""The benchmark: each figure against a count or a machine whose answer is known."""

from __future__ import annotations

import copy
import itertools
import json
import time
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from cifar_lab import benchmark, machine, models, progress
from cifar_lab.augment import Augmentation
from cifar_lab.classifier import ImageClassifier
from cifar_lab.data import CIFAR10DataModule
from cifar_lab.dataset import ImageSet, image_moments
from cifar_lab.recipe import InputError, Recipe

# Python 3.12 says of every fork what the loader's workers are not touched by.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def test_a_networks_operations_are_those_of_its_layers() -> None:
    first, second = 28 * 28 * 6 * 3 * 25, 10 * 10 * 16 * 6 * 25  # products of its two convolutions, unpadded
    dense = 16 * 25 * 120 + 120 * 84 + 84 * 10
    forward = 2 * (first + second + dense)
    # Backward each layer has as many again for its weights and for its input, of which the image needs none.
    assert benchmark.image_flops(Recipe(arch="classic_cnn")) == 3 * forward - 2 * first


def test_a_matrix_products_operations_are_counted_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(step=0.5)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert benchmark.gemm_flops("32") == 2 * 2048**3 / 0.5


def test_batches_beat_a_loader_of_single_images() -> None:
    assert benchmark.augment_ratio({}, count=1_000) > 5


@pytest.mark.parametrize("fields", benchmark.TRANSFORMS.values(), ids=benchmark.TRANSFORMS)
def test_both_loaders_shift_flip_and_turn_alike(fields: dict[str, Any]) -> None:
    # Red tells the column that a pixel came from, green its row: the middle of the image tells what was done to it.
    ramp = torch.arange(32, dtype=torch.uint8) * 8
    picture = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.zeros(32, 32, dtype=torch.uint8)])
    moments = torch.from_numpy(image_moments(picture[None].numpy()))
    images = ImageSet(picture.repeat(600, 1, 1, 1), torch.arange(600) % 2, moments.repeat(600, 1, 1), ("a", "b"))
    recipe = Recipe(val_fraction=0, **fields)
    data = CIFAR10DataModule(recipe, images)
    for epoch in benchmark.epochs(recipe, images):
        pixels = (torch.cat(list(epoch())) * data.std[:, None, None] + data.mean[:, None, None])[:, :2] * 255 / 8
        assert pixels.shape == (600, 2, 32, 32)
        x, y = pixels[:, :, 15:17, 15:17].mean((2, 3)).T - 15.5
        along, down = (pixels[:, :, 15:17, 16] - pixels[:, :, 15:17, 15]).mean(2).T
        assert 0.4 < (along < 0).float().mean() < 0.6
        for shift in (x, y):
            assert 3.8 < shift.max() < 4.2 and -4.2 < shift.min() < -3.8
        degrees = torch.rad2deg(torch.atan(down / along))
        turned = fields.get("rotate", 0)
        assert degrees.abs().max() < turned + 1.5
        assert not turned or (degrees.max() > 13 and degrees.min() < -13)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backward passes of both loops, and of nothing else."""
    done: list[str] = []
    plain = torch.Tensor.backward

    def backward(self: torch.Tensor, *words: Any, **options: Any) -> None:
        done.append("backward")
        plain(self, *words, **options)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(machine, "step_seconds", lambda recipe, precision: 0.01)
    return done


def test_what_lightning_costs_shows(monkeypatch: pytest.MonkeyPatch, steps: list[str]) -> None:
    plain = ImageClassifier.training_step

    def slow(self: ImageClassifier, batch: Any, batch_idx: int) -> Any:
        steps.append("fit")
        time.sleep(0.1)
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", slow)
    recipe = Recipe(arch="classic_cnn", batch_size=16, precision="32")
    ratio = benchmark.lightning_ratio(recipe, count=64)
    per_side = 4 * (machine.REPEATS + 1)
    assert steps.count("fit") == per_side and steps.count("backward") == 2 * per_side, "the same steps on both sides"
    assert ratio > 2


def test_the_loops_take_about_as_long_and_both_train_whatever_the_learning_rate(
    monkeypatch: pytest.MonkeyPatch, steps: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[torch.nn.Module, dict[str, torch.Tensor]]] = []
    plain, began = models.build, list[bool]()

    def build(recipe: Recipe, classes: int) -> Any:
        network = plain(recipe, classes)
        made.append((network, copy.deepcopy(network.state_dict())))
        return network

    def begin(self: ImageClassifier) -> None:
        began.append(progress.shown())

    monkeypatch.setattr(models, "build", build)
    monkeypatch.setattr(ImageClassifier, "on_fit_start", begin)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(progress, "quiet", False)
    recipe = Recipe(arch="classic_cnn", batch_size=64, precision="32", lr=1e30)  # of which any weights were no numbers
    ratio = benchmark.lightning_ratio(recipe, count=64 * 40)
    assert 0.5 < ratio < 2.5
    assert steps.count("backward") == 2 * 40 * (machine.REPEATS + 1), "no loop ended early"
    ((network, before),) = made
    after = network.state_dict()
    assert all(value.isfinite().all() and not torch.equal(value, before[name]) for name, value in after.items())
    assert began == [False] and progress.shown(), "no bar is drawn in the loop that is timed"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "augment_ratio", lambda fields: 25.0)
    monkeypatch.setattr(benchmark, "lightning_ratio", lambda recipe: 1.0 + recipe.batch_size / 1000)
    monkeypatch.setattr(benchmark, "gemm_flops", lambda precision, threads: 1e11 * threads)
    monkeypatch.setattr(benchmark, "batch_seconds", lambda recipe, threads: recipe.batch_size / 1000 / threads)
    monkeypatch.setattr(benchmark, "record_seconds", lambda recipe: 9.0)
    monkeypatch.setattr(benchmark, "compiled_ratio", lambda recipe, precision, threads: 1.0 + 0.5 * (precision == "32"))

    def step_seconds(recipe: Recipe, precision: str, *, threads: int = 1) -> float:
        return {"32": 0.2, "bf16": 0.1}[precision] / threads

    monkeypatch.setattr(machine, "step_seconds", step_seconds)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("emulated", [False, True])
def test_json_has_the_figures_by_architecture_and_precision(
    emulated: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capability = "AVX2" if emulated else "AVX512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert benchmark.main(["--json", "--archs", "classic_cnn", "compact_cnn", "--batch_size", "10"]) == 0
    found = json.loads(capsys.readouterr().out)
    speeds = {"32": 50.0} if emulated else {"32": 50.0, "bf16": 100.0}
    assert found["images_per_second"] == {"classic_cnn": speeds, "compact_cnn": speeds}
    flops = benchmark.image_flops(Recipe(arch="compact_cnn"))
    assert found["peak_fraction"]["compact_cnn"] == {
        name: pytest.approx(v * flops / 1e11) for name, v in speeds.items()
    }
    assert found["gemm_tflops"] == 0.1
    assert found["augment_ratio"] == 25 and found["lightning_ratio"] == pytest.approx(1.128)
    assert found["lightning_ratios"] == pytest.approx({"resnet": 1.128, "classic_cnn": 1.064})
    # A batch of ten is made in 10 ms, and trained on in 200 or, with bf16, in 100.
    assert found["data_shares"] == pytest.approx(dict.fromkeys(found["images_per_second"], max(speeds.values()) / 1000))
    assert not {"record_share", "compiled_ratios"} & set(found), "neither was asked for"
    assert found["threads"] == torch.get_num_threads() == 1
    assert found["hardware"] == machine.hardware() and "torch" in found["versions"]
    monkeypatch.setattr(machine, "compile_fault", lambda: "")
    assert benchmark.main(["--json", "--compiled", "--archs", "compact_cnn"]) == 0
    compiled = json.loads(capsys.readouterr().out)["compiled_ratios"]
    assert compiled == {"compact_cnn": 1.5 if emulated else 1.0}, "in the faster precision"


@pytest.mark.usefixtures("quick")
def test_the_table_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(machine, "compile_fault", lambda: "")
    assert benchmark.main(["--compiled"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert max(map(len, said)) <= 80
    assert any(line.split()[:2] == ["wide_cnn", "160"] for line in said)
    assert any(line.split() == ["wide_cnn", "1.00"] for line in said)
    assert any(line.split() == ["resnet", "6.40%"] for line in said), "9 s of the 141 that 45,000 images take in bf16"


@pytest.mark.usefixtures("quick")
def test_the_threads_asked_for_are_those_of_the_speeds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settled: list[bool] = []
    monkeypatch.setattr(machine, "settle", lambda: settled.append(True))
    assert benchmark.main(["--json", "--archs", "classic_cnn", "--batch_size", "10", "--threads", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["threads"] == 3 and found["images_per_second"]["classic_cnn"]["32"] == pytest.approx(150)
    assert found["gemm_tflops"] == pytest.approx(0.3) and settled == [True]
    with pytest.raises(InputError, match="threads: 0"):
        benchmark.main(["--threads", "0"])


def test_a_matrix_product_is_made_by_the_threads_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(benchmark, "timed", lambda work: seen.append(torch.get_num_threads()) or 1.0)
    before = torch.get_num_threads()
    benchmark.gemm_flops("32", before + 1)
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


def test_a_batch_takes_as_long_as_its_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Augmentation.__call__

    def slow(self: Augmentation, *words: Any) -> Any:
        time.sleep(0.02)
        return plain(self, *words)

    recipe = Recipe(arch="classic_cnn", batch_size=4)
    assert benchmark.batch_seconds(recipe, 1, batches=3) < 0.02
    monkeypatch.setattr(Augmentation, "__call__", slow)
    assert 0.02 < benchmark.batch_seconds(recipe, 1, batches=3) < 0.04


def test_the_record_of_an_epoch_takes_as_long_as_its_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    plain = pl.Trainer.save_checkpoint

    def slow(self: pl.Trainer, path: Any, *words: Any, **options: Any) -> None:
        written.append(path.name)
        time.sleep(0.05)
        plain(self, path, *words, **options)

    recipe = Recipe(arch="classic_cnn")
    assert benchmark.record_seconds(recipe) < 0.1
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", slow)
    assert 0.1 < benchmark.record_seconds(recipe) < 0.2
    assert len(written) == 2 * machine.REPEATS, "the best and the last"


def test_what_cannot_be_compiled_is_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compile_fault", lambda: "no compiler")
    with pytest.raises(InputError, match=r"--compiled: .*no compiler"):
        benchmark.main(["--compiled"])


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(InputError, match=r"'resent'; did you mean resnet\? Legal: classic_cnn, "):
        benchmark.main(["--archs", "resent"])
