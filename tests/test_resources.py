"""What trials take of a machine or a cluster, and what a search will cost: pure numbers, no device needed."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from cifar_lab import machine
from cifar_lab.fit import fit
from cifar_lab.recipe import InputError, Recipe
from tune import resources
from tune.plan import checkpoint_bytes, expected_epochs, seconds_per_image, sizes
from tune.question import SearchOptions
from tune.space import Choice


@pytest.mark.parametrize(
    ("asked", "there", "fit"),
    [
        ({}, {"CPU": 2}, 2),
        ({}, {"CPU": 16, "GPU": 1}, 1),
        ({"gpus_per_trial": 0.25}, {"CPU": 16, "GPU": 1}, 4),
        ({"gpus_per_trial": 0.1}, {"CPU": 16, "GPU": 1}, 10),
        ({"gpus_per_trial": 0.4}, {"CPU": 16, "GPU": 2}, 4),
        ({"gpus_per_trial": 2}, {"CPU": 16, "GPU": 8}, 4),
        ({"gpus_per_trial": 0, "cpus_per_trial": 4}, {"CPU": 16, "GPU": 8}, 4),
        ({"max_concurrent": 3}, {"CPU": 16, "GPU": 8}, 3),
        ({"max_concurrent": 30}, {"CPU": 4}, 4),
    ],
)
def test_trials_at_once_are_what_the_processors_hold(
    asked: dict[str, float], there: dict[str, float], fit: int
) -> None:
    assert resources.at_once(SearchOptions(**asked), [there]) == fit


@pytest.mark.parametrize(
    ("asked", "fit"),
    [({}, 3), ({"gpus_per_trial": 0.5}, 5), ({"gpus_per_trial": 0}, 8), ({"gpus_per_trial": 2}, 1)],
)
def test_trials_at_once_on_a_cluster_are_those_that_each_machine_holds(asked: dict[str, float], fit: int) -> None:
    head, large, small = {"CPU": 0.0}, {"CPU": 6.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}
    machines = [head, large, small, {"CPU": 1.0}]
    assert resources.at_once(SearchOptions(address="a:1", **asked), machines) == fit


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"gpus_per_trial": 2}, "gpus_per_trial: 2. Legal: up to 1; this machine has 1 GPUs"),
        ({"cpus_per_trial": 5}, "cpus_per_trial: 5. Legal: up to 4; this machine has 4 CPUs"),
        ({"gpus_per_trial": 2, "address": "a:1"}, "the largest machine of the cluster at a:1 has 1 GPUs"),
    ],
)
def test_more_than_there_is_is_refused(asked: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        resources.per_trial(SearchOptions(**asked), [{"CPU": 4, "GPU": 1}, {"CPU": 3, "GPU": 1}])


def test_a_gpu_on_one_machine_and_cores_on_another_are_no_place_for_a_trial() -> None:
    with pytest.raises(InputError, match=r"cpus_per_trial: 4\. Legal: fewer; no machine of the cluster at a:1 has"):
        resources.per_trial(SearchOptions(cpus_per_trial=4, address="a:1"), [{"CPU": 4}, {"CPU": 2, "GPU": 1}])


def test_results_among_the_files_of_a_ray_job_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1")
    with pytest.raises(InputError, match="results_dir: 'results/runs' lies among the files that Ray unpacked"):
        SearchOptions()
    SearchOptions(results_dir=str(tmp_path / "results"))


@pytest.mark.parametrize("address", ["nonsense", "host:port", ":1", "127.0.0.1:1"])
def test_an_address_where_nothing_listens_is_refused_at_once(address: str) -> None:
    with pytest.raises(InputError, match="Legal: HOST:PORT of a running cluster, or auto"):
        resources.check_address(address)


def test_ray_client_is_refused_though_it_answers() -> None:
    refused = pytest.raises(InputError, match=r"is Ray Client's.*Legal: HOST:PORT")
    with socket.create_server(("127.0.0.1", 0)) as server, refused:
        resources.check_address(f"ray://127.0.0.1:{server.getsockname()[1]}")


def test_an_image_costs_what_it_costs_at_each_of_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(recipe: Recipe, precision: str, *, batch: int, side: int, **_: Any) -> float:
        return batch * {32: 10.0, 16: 2.0}[side]

    monkeypatch.setattr(machine, "step_seconds", step)
    recipe = Recipe(arch="resnet", max_epochs=8, small_side=16)
    assert seconds_per_image([recipe], 1) == 10
    assert seconds_per_image([recipe, recipe.replace(small_share=0.5)], 1) == (10 + 6) / 2


def test_the_expected_epochs_are_near_those_of_the_committed_search() -> None:
    trials = pd.read_csv(Path(__file__).parent.parent / "results" / "001-classic-cnn" / "corrected" / "trials.csv")
    assert abs(expected_epochs(30, 1, 3, 30) / trials.epochs.mean() - 1) < 0.2


def test_without_rungs_every_trial_runs_to_the_end() -> None:
    assert expected_epochs(5, 5, 3, 10) == 5


def test_the_sizes_to_measure_are_those_searched() -> None:
    base = Recipe(arch="resnet", width=8)
    assert [r.depth for r in sizes(base, {"depth": Choice(18, 34), "dropout": Choice(0.1, 0.3)})] == [18, 34]


def test_the_bytes_of_checkpoints_are_foretold(tmp_path: Path) -> None:
    recipe = Recipe(arch="classic_cnn", dataset="digits", limit_train=50, max_epochs=1, optimizer="adam", ema=0.9)
    fit(recipe, tmp_path)
    best, last = checkpoint_bytes([recipe], 10)
    for name, expected in (("best", best), ("last", last)):
        assert abs((tmp_path / f"{name}.ckpt").stat().st_size / expected - 1) < 0.1, name


@pytest.mark.parametrize(
    ("gpus", "share", "said"),
    [
        (1.0, 0.07, "--gpus_per_trial 0.0909 up to 11 of them share a GPU"),
        (0.5, 0.07, "up to 11 of them"),
        (0.1, 0.07, "up to 11 of them"),
        (0.0909, 0.07, ""),
        (1.0, 0.6, ""),
        (1.0, 0.0, ""),
        (0.0, 0.5, ""),
        (2.0, 0.1, ""),
    ],
)
def test_the_measured_peak_suggests_the_fraction(gpus: float, share: float, said: str) -> None:
    told = resources.advice(gpus, share)
    assert said in told and bool(said) == bool(told)


def test_the_fraction_that_is_suggested_holds_as_many_trials_as_it_says() -> None:
    for share in (0.011, 0.03, 0.07, 0.13, 0.2, 0.39):
        told = resources.advice(1.0, share)
        fraction, count = float(told.split("--gpus_per_trial ")[1].split()[0]), int(told.split("up to ")[1].split()[0])
        assert resources.at_once(SearchOptions(gpus_per_trial=fraction), [{"CPU": 99, "GPU": 1}]) == count
        assert count * 1.25 * share <= 1


def test_a_processs_share_of_a_gpu_is_its_peak_and_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.gpu_share() == 0.0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 100_000_000_000))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 9_400_000_000)
    assert machine.gpu_share() == pytest.approx(0.1)
