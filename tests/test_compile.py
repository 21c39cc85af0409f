"""A compiled training is the same training: its numbers, its checkpoints, its resume; what cannot compile is told."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from conftest import NARROW, interrupted
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from cifar_lab import benchmark, machine
from cifar_lab.files import read_csv
from cifar_lab.fit import fit, restore
from cifar_lab.gradients import GradientWatch
from cifar_lab.layers import Conv2d
from cifar_lab.models import ARCHITECTURES, build
from cifar_lab.recipe import Recipe, RecipeError
from tune import asha, campaign

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"dataset": "digits", "precision": "32", "limit_train": 150, "batch_size": 32}


def recipe(arch: str, **fields: Any) -> Recipe:
    return Recipe(**{"arch": arch, "max_epochs": 2, **SMALL, **NARROW.get(arch, {}), **fields})


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of inputs of what was compiled: traced, with its gradient, but run by PyTorch's own kernels.

    So no compiler is needed, and numbers are those of an uncompiled network. To give a network up is an error.
    """
    made: list[int] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        made.append(len(inputs))
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield made
    torch.compiler.reset()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_network_compiles_in_one_piece(arch: str) -> None:
    in_one_piece(build(recipe(arch), 10), torch.rand(4, 3, 32, 32))


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_convolutions_with_ways_of_their_own_compile_in_one_piece(precision: str) -> None:
    # Uncompiled they go by Winograd, or with the images side by side.
    convolutions = [Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(2)]
    network = nn.Sequential(convolutions[0], nn.MaxPool2d(2), convolutions[1])
    images = torch.rand(48, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        in_one_piece(network, images, rtol=1e-4 if precision == "32" else 2e-2, atol=1e-4)


def in_one_piece(network: nn.Module, images: torch.Tensor, **close: float) -> None:
    """See that compiled the network gives the same."""

    def passed() -> list[torch.Tensor]:
        torch.manual_seed(0)
        network.zero_grad()
        out = network(images).float()
        out.square().mean().backward()
        return [out.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]

    plain = passed()
    network.compile(fullgraph=True, backend="aot_eager")
    try:
        for one, other in zip(passed(), plain, strict=True):
            torch.testing.assert_close(one, other, **({"rtol": 1e-4, "atol": 1e-5} | close))
    finally:
        torch.compiler.reset()


# The third is the one with most code: the bias of its whitening is trained for three epochs, images are small in two of
# them, the last batch is smaller than the others.
@pytest.mark.parametrize(
    ("asked", "count"),
    [
        (recipe("three_layer_cnn"), 3),
        (recipe("classic_cnn", ema=0.9, mixup=0.2, precision="bf16"), 2),
        (recipe("speed_cnn", small_share=0.4, max_epochs=5, accumulate=2), 8),
    ],
    ids=["plain", "mixup in bf16, averaged", "small images"],
)
def test_a_compiled_training_has_the_numbers_and_names_of_any_other(
    asked: Recipe, count: int, graphs: list[int], tmp_path: Path
) -> None:
    plain = fit(asked, tmp_path / "plain")
    assert not graphs
    compiled = fit(asked.replace(compile=True), tmp_path / "compiled")
    assert len(graphs) == count
    for one, other in zip(plain.history, compiled.history, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    weights = [restore(run.best_checkpoint).state_dict() for run in (plain, compiled)]
    assert list(weights[0]) == list(weights[1])
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_a_process_compiles_as_many_trainings_as_it_is_given(
    graphs: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cifar_lab.fit.CODES", 4)
    for width in (1, 2, 3):
        fit(recipe("classic_cnn", width=width, max_epochs=1, compile=True), tmp_path / str(width))
    assert len(graphs) == 9


def test_gradients_and_dead_relus_of_a_compiled_network_are_seen(graphs: list[int], tmp_path: Path) -> None:
    asked = recipe("three_layer_cnn", batch_size=6)  # more steps than are looked at
    for compiled in (False, True):
        watch = GradientWatch(tmp_path / f"{compiled}.csv")
        fit(asked.replace(compile=compiled), tmp_path / str(compiled), callbacks=[watch])
    rows = read_csv(tmp_path / "False.csv")
    assert {row["kind"] for row in rows} == {"gradient", "relu"}
    assert read_csv(tmp_path / "True.csv") == rows and graphs


def test_a_compiled_network_that_is_slower_is_seen_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(graph: Any, inputs: Any) -> Any:
        def slow(*given: Any) -> Any:
            time.sleep(0.3)
            return graph(*given)

        return slow

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    assert benchmark.compiled_ratio(recipe("classic_cnn"), "32", threads=1) < 0.5


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_a_compiled_run_resumes_bit_by_bit(tmp_path: Path) -> None:
    asked = recipe("classic_cnn", max_epochs=3, dropout=0.5, compile=True)
    whole = fit(asked, tmp_path / "whole")
    interrupted(asked, tmp_path / "parts", 1)
    parts = fit(asked, tmp_path / "parts", resume=True)
    assert [row["train_loss"] for row in parts.history] == [row["train_loss"] for row in whole.history]
    one, other = (restore(run.best_checkpoint).state_dict() for run in (whole, parts))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    plain = fit(asked.replace(compile=False), tmp_path / "plain")
    assert plain.history[-1]["train_loss"] == pytest.approx(whole.history[-1]["train_loss"], rel=1e-4)


def test_without_a_compiler_nothing_is_begun(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "cifar_lab.train", "--arch", "classic_cnn", "--dataset", "digits", "--compile", "true",
         "--results_dir", tmp_path / "runs"],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"CXX": "/absent/c++", "CC": "/absent/cc", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "code")},
    )  # fmt: skip
    assert told.returncode == 2, told.stderr
    assert "compile: True. PyTorch cannot compile" in told.stderr and "/absent" in told.stderr
    assert "Traceback" not in told.stderr and not (tmp_path / "runs").exists()


def test_a_search_that_cannot_compile_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "compile_fault", lambda: "no compiler")
    words = ["--arch", "classic_cnn", "--dataset", "digits", "--results_dir", str(tmp_path), "--compile", "true"]
    with pytest.raises(RecipeError, match=r"compile: True\. .*no compiler.* Legal: False"):
        asha.main(words)
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_cannot_compile_is_refused_when_it_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(campaign, "blind", lambda where: [])
    monkeypatch.setattr(campaign, "on_a_worker", lambda *words: asked.append(words) or "no Triton")
    base = recipe("classic_cnn", compile=True)
    question = SimpleNamespace(options=SimpleNamespace(storage="s3://bucket"), base=base)
    search: Any = SimpleNamespace(question=question, recipes=lambda: [base], takes={"CPU": 1.0, "GPU": 1.0})
    with pytest.raises(RecipeError, match="no Triton"):
        campaign.Campaign.join(search)
    assert asked == [(machine.compile_fault, search.takes)]


@pytest.mark.parametrize("earlier", [None, {}])
def test_a_joined_cluster_measures_once_for_all_of_a_run(
    earlier: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "blind", lambda where: [])
    monkeypatch.setattr(campaign, "decoded", lambda *words: None)
    monkeypatch.setattr(campaign, "shipped", lambda images: None)
    monkeypatch.setattr(campaign, "on_a_worker", lambda function, *_: function.__name__)
    settled: list[str] = []
    base = recipe("classic_cnn")
    question = SimpleNamespace(options=SimpleNamespace(storage="s3://bucket"), base=base, earlier=earlier)
    search: Any = SimpleNamespace(question=question, recipes=lambda: [base], takes={}, settle_base=settled.append)
    campaign.Campaign.join(search)
    assert settled == (["measured"] if earlier is None else [])


@pytest.mark.parametrize("silence", [AssertionError(), RuntimeError("Set TORCHDYNAMO_VERBOSE=1")])
def test_a_compiler_that_fails_without_a_word_has_failed(silence: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise silence

    monkeypatch.setattr(torch, "compile", fail)
    assert machine.compile_fault() == type(silence).__name__


def test_a_training_goes_on_uncompiled_where_there_is_no_compiler(graphs: list[int], tmp_path: Path) -> None:
    asked = recipe("three_layer_cnn", compile=True)
    whole = fit(asked, tmp_path / "whole")
    interrupted(asked, tmp_path / "parts", 1)
    count = len(graphs)
    parts = fit(asked.replace(compile=False), tmp_path / "parts", resume=True)
    assert len(graphs) == count and not parts.recipe.compile
    assert parts.history[-1]["train_loss"] == whole.history[-1]["train_loss"]


def test_of_a_cluster_a_worker_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(machine, "compile_fault", lambda: pytest.fail("the driver compiles nothing"))

    def worker() -> str:
        asked.append("worker")
        return "no Triton"

    machine.check_compile([recipe("classic_cnn")], worker)
    assert not asked, "nothing is to be compiled"
    with pytest.raises(RecipeError, match="no Triton"):
        machine.check_compile([recipe("classic_cnn"), recipe("classic_cnn", compile=True)], worker)
