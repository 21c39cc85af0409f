"""The benchmark: each figure against a count or a machine whose answer is known."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
import torch

from cifar_lab import benchmark, machine
from cifar_lab.classifier import ImageClassifier
from cifar_lab.recipe import InputError, Recipe


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
    assert benchmark.augment_ratio({}, count=1_000) > 3


def test_what_lightning_costs_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    plain = ImageClassifier.training_step

    def slow(self: ImageClassifier, batch: Any) -> Any:
        steps.append("fit")
        time.sleep(0.05)
        return plain(self, batch)

    monkeypatch.setattr(ImageClassifier, "training_step", slow)
    monkeypatch.setattr(torch.Tensor, "backward", counted(torch.Tensor.backward, steps))
    ratio = benchmark.lightning_ratio(Recipe(arch="classic_cnn", batch_size=16), count=64)
    epochs = machine.REPEATS + 1
    assert steps.count("fit") == 4 * epochs and steps.count("backward") == 2 * 4 * epochs, (
        "the same steps on both sides"
    )
    assert ratio > 3


def counted(plain: Any, steps: list[str]) -> Any:
    def backward(self: torch.Tensor, *words: Any, **options: Any) -> None:
        steps.append("backward")
        plain(self, *words, **options)

    return backward


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "augment_ratio", lambda fields: 25.0)
    monkeypatch.setattr(benchmark, "lightning_ratio", lambda recipe: 1.0 + recipe.batch_size / 1000)
    monkeypatch.setattr(benchmark, "gemm_flops", lambda precision: 1e11)
    monkeypatch.setattr(machine, "step_seconds", lambda recipe, precision: {"32": 0.2, "bf16": 0.1}[precision])


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
    assert found["augment_ratio"] == 25 and found["lightning_ratio"] == 1.128
    assert found["lightning_ratios"] == {"resnet": 1.128, "classic_cnn": 1.064}
    assert found["hardware"] == machine.hardware() and "torch" in found["versions"]


@pytest.mark.usefixtures("quick")
def test_the_table_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert benchmark.main([]) == 0
    said = capsys.readouterr().out.splitlines()
    assert max(map(len, said)) <= 80
    assert any(line.split()[:2] == ["wide_cnn", "160"] for line in said)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(InputError, match=r"'resent'; did you mean resnet\? Legal: classic_cnn, "):
        benchmark.main(["--archs", "resent"])
