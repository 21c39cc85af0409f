"""What trials take of a machine or a cluster, and what a search will cost: pure numbers, no device needed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from cifar_lab.fit import fit
from cifar_lab.recipe import InputError, Recipe
from tune import resources
from tune.plan import checkpoint_bytes, expected_epochs, sizes
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
    assert resources.at_once(SearchOptions(**asked), there) == fit


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"gpus_per_trial": 2}, "gpus_per_trial: 2. Legal: up to 1; this machine has 1 GPUs"),
        ({"cpus_per_trial": 5}, "cpus_per_trial: 5. Legal: up to 4; this machine has 4 CPUs"),
        ({"gpus_per_trial": 2, "address": "a:1"}, "the cluster at a:1 has 1 GPUs"),
    ],
)
def test_more_than_there_is_is_refused(asked: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        resources.per_trial(SearchOptions(**asked), {"CPU": 4, "GPU": 1})


@pytest.mark.parametrize("address", ["nonsense", "host:port", ":1", "127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_where_nothing_listens_is_refused_at_once(address: str) -> None:
    with pytest.raises(InputError, match="Legal: HOST:PORT of a running cluster, or auto"):
        resources.check_address(address)


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
