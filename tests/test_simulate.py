"""Curves replayed: by hand, against a brute-force model, and from what a search left."""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cifar_lab.recipe import InputError
from tune.question import ask, question_file
from tune.scheduler import Rungs
from tune.simulate import (
    MINIMUM,
    Curve,
    MedianStopping,
    Outcome,
    Policy,
    ReplayOptions,
    asha_of,
    below_median,
    main,
    policies,
    read_whole,
    replay,
    simulate,
    summary,
    tables,
    time_unit,
    whole_command,
)

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "results" / "001-classic-cnn" / "corrected"
A = Curve("A", [1.0, 1.0, 1.0], [0.5, 0.6, 0.7])
B = Curve("B", [0.75, 0.75, 0.75], [0.4, 0.8, 0.9])
C = Curve("C", [2.0, 2.0, 2.0], [0.6, 0.65, 0.66])


def made(name: str, grace_period: int = 1, max_epochs: int = 3, reduction_factor: int = 2) -> Policy:
    return policies(grace_period, max_epochs, reduction_factor)[name]()


@st.composite
def measured(draw: st.DrawFn) -> list[Curve]:
    """Up to eight trials of up to nine epochs, some shorter, some diverged."""
    found = []
    for i in range(draw(st.integers(1, 8))):
        seconds = draw(st.lists(st.integers(1, 50), min_size=1, max_size=9))
        values = [draw(st.integers(0, 20)) / 20 for _ in seconds]
        found.append(Curve(f"T{i}", [float(s) for s in seconds], values, draw(st.integers(0, 5)) == 0))
    return found


# By hand


def test_one_worker_trains_one_trial_after_the_other() -> None:
    # B stops at .4 < .5; C passes rung 1 at .6 > .45 and rung 2 at .65 > .6.
    outcome = replay([A, B, C], 1, made("ASHA"), target=0.66)
    assert outcome.trained == {"A": 3, "B": 1, "C": 3} and outcome.epochs == 7
    assert outcome.wall_seconds == 3 + 0.75 + 6 and outcome.val_acc == 0.7
    assert (outcome.epochs_to_target, outcome.wall_seconds_to_target) == (3, 3.0)
    assert replay([A, B, C], 1, made("ASHA"), target=0.71).epochs_to_target == math.inf


def test_with_two_workers_the_order_of_arrival_decides() -> None:
    # B arrives first at rung 1, and at rung 2 with .8, where A (.6) stops; C stops there at .65 < .7.
    outcome = replay([A, B, C], 2, made("ASHA"), target=0.9)
    assert outcome.trained == {"A": 2, "B": 3, "C": 2}
    assert outcome.wall_seconds == 2 + 4 and outcome.val_acc == 0.9
    assert (outcome.epochs_to_target, outcome.wall_seconds_to_target) == (5, 2.25)


def test_of_two_epochs_that_end_together_the_earlier_trials_is_judged_first() -> None:
    twins = [Curve("low", [1.0, 1.0], [0.1, 0.1]), Curve("high", [1.0, 1.0], [0.9, 0.9])]
    assert replay(twins, 2, made("ASHA", max_epochs=2)).trained == {"low": 2, "high": 2}
    assert replay(twins[::-1], 2, made("ASHA", max_epochs=2)).trained == {"high": 2, "low": 1}


def test_each_trial_takes_its_startup_once() -> None:
    assert replay([A, B, C], 1, made("random search"), startup=10).wall_seconds == 3 + 2.25 + 6 + 30
    outcome = replay([A, B, C], 2, made("random search"), target=0.9, startup=10)
    assert (outcome.wall_seconds, outcome.wall_seconds_to_target) == (12.25 + 10 + 6, 12.25)


def test_a_diverged_trial_cannot_win_and_its_last_epoch_enters_no_rung() -> None:
    wild = Curve("D", [1.0, 1.0], [0.95, 0.99], diverged=True)
    outcome = replay([wild, A], 1, made("ASHA"), target=0.9)
    assert outcome.trained == {"D": 2, "A": 1}, "A is judged against its first epoch"
    assert outcome.val_acc == 0.5 and outcome.epochs_to_target == math.inf
    assert replay([Curve("D", [1.0], [0.95], diverged=True), A], 1, made("ASHA")).trained == {"D": 1, "A": 3}


def test_an_accuracy_exactly_half_a_point_below_the_best_has_reached_it() -> None:
    just = Curve("just", [1.0], [0.4956])
    assert replay([just], 1, made("random search"), target=0.5006 - 0.005).epochs_to_target == 1
    assert replay([just], 1, made("random search"), target=0.5008 - 0.005).epochs_to_target == math.inf


# Median stopping


def test_below_the_median_is_strictly_below_it_and_the_first_passes() -> None:
    assert not below_median(0.1, [])
    assert below_median(0.49, [0.4, 0.6]) and not below_median(0.5, [0.4, 0.6])
    assert below_median(0.2, [0.1, 0.3, 0.9]) and not below_median(0.3, [0.1, 0.3, 0.9])


def test_median_stopping_compares_the_best_so_far_with_the_others_averages() -> None:
    rule = MedianStopping(grace_period=2)
    assert [rule.stops("A", epoch, value) for epoch, value in ((1, 0.2), (2, 0.6))] == [False, False]  # average .4
    assert [rule.stops("B", epoch, value) for epoch, value in ((1, 0.1), (2, 0.3))] == [False, True]  # average .2
    # Its best, .35, is of the first epoch, and above the median .3 of the averages .4 and .2.
    assert [rule.stops("C", epoch, value) for epoch, value in ((1, 0.35), (2, 0.0))] == [False, False]


# Against a model, and what must hold of any curves


@given(measured(), st.integers(1, 3), st.integers(2, 4))
@settings(max_examples=150, deadline=None)
def test_one_worker_decides_as_a_plain_loop(curves: list[Curve], grace: int, factor: int) -> None:
    for policy in policies(grace, 9, factor).values():
        stops, expected = policy(), {}
        for curve in curves:
            for epoch, value in enumerate(curve.val_acc, 1):
                expected[curve.trial_id] = epoch
                if curve.diverged and epoch == len(curve.val_acc):
                    continue
                if stops(curve.trial_id, epoch, value):
                    break
        outcome = replay(curves, 1, policy())
        assert outcome.trained == expected
        assert outcome.wall_seconds == sum(sum(curve.seconds[: expected[curve.trial_id]]) for curve in curves)


@given(measured(), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_random_search_trains_everything_and_more_workers_never_take_longer(curves: list[Curve], workers: int) -> None:
    outcome = replay(curves, workers, made("random search"), startup=3)
    assert outcome.epochs == sum(len(curve.seconds) for curve in curves)
    assert outcome.trained == {curve.trial_id: len(curve.seconds) for curve in curves}
    assert replay(curves, workers + 1, made("random search"), startup=3).wall_seconds <= outcome.wall_seconds
    work = [3 + sum(curve.seconds) for curve in curves]
    assert max(max(work), sum(work) / workers) <= outcome.wall_seconds <= sum(work)


@given(measured(), st.integers(1, 9), st.integers(1, 3), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_stopping_never_finds_more_than_training_everything(
    curves: list[Curve], workers: int, grace: int, target: float
) -> None:
    everything = replay(curves, workers, made("random search"), target=target)
    for policy in policies(grace, 9, 3).values():
        outcome = replay(curves, workers, policy(), target=target)
        assert set(outcome.trained) == {curve.trial_id for curve in curves}
        assert outcome.epochs <= everything.epochs and outcome.val_acc <= everything.val_acc
        assert all(epochs >= min(grace, len(c.seconds)) for c in curves for epochs in [outcome.trained[c.trial_id]])
        assert math.isfinite(outcome.epochs_to_target) == (outcome.val_acc >= target - 1e-9)
        if math.isfinite(outcome.epochs_to_target):
            assert outcome.epochs_to_target <= outcome.epochs
            assert outcome.wall_seconds_to_target <= outcome.wall_seconds


def outcome(epochs: float) -> Outcome:
    return Outcome({"A": 1}, 2.0, 0.5, epochs, epochs)


def test_an_order_that_never_reaches_the_target_counts_as_infinite() -> None:
    found = summary([outcome(epochs) for epochs in [1.0, 2.0, 3.0, math.inf]])
    assert found["reached"] == 0.75 and found["epochs_to_target"] == 2
    assert (found["epochs_to_target_low"], found["epochs_to_target_high"]) == (1, math.inf)
    assert summary([outcome(math.inf), outcome(math.inf), outcome(1)])["epochs_to_target"] == math.inf
    assert (found["wall_seconds"], found["wall_seconds_low"], found["wall_seconds_high"]) == (2, 2, 2)


def test_the_interval_leaves_out_a_fortieth_of_the_orders_at_either_end() -> None:
    found = summary([outcome(float(epochs)) for epochs in range(1, 201)])
    assert (found["epochs_to_target_low"], found["epochs_to_target_high"]) == (5, 195)


def test_with_a_worker_a_trial_the_order_is_of_no_account() -> None:
    rows = simulate([A, B, C], policies(1, 3, 2), [1, 3], orders=20, seed=0, target=0.9, startup=0.0)
    spread = {(row["workers"], row["policy"]): row["epochs_high"] - row["epochs_low"] for row in rows}
    assert spread[1, "ASHA"] > 0 and spread[3, "ASHA"] == spread[3, "median stopping"] == 0


@pytest.mark.parametrize(("seconds", "unit"), [(119, "s"), (120, "min"), (7200, "h"), (4e5, "days")])
def test_times_are_given_in_a_unit_that_they_fill_twice(seconds: float, unit: str) -> None:
    assert time_unit(seconds)[0] == unit


@pytest.mark.parametrize("seconds", [9.99, 9.999, 119.99, 7199.9, 172799.0, 86400.0 * 150])
def test_the_widest_figures_are_not_cut_at_80_columns(seconds: float) -> None:
    of_seconds = ("wall_seconds", "wall_seconds_to_target")
    row: dict[str, Any] = {"workers": 512, "policy": "median stopping", "epochs": 9999.0, "reached": 1.0}
    for name, value in {"val_acc": 0.99, "epochs_to_target": 9999.0, **dict.fromkeys(of_seconds, seconds)}.items():
        row |= dict.fromkeys((f"{name}_low", name, f"{name}_high"), value)
    page = Console(width=80, file=io.StringIO(), record=True)
    page.print(*tables([row], 0.99))
    assert "\u2026" not in page.export_text()


# An experiment


@pytest.fixture
def left(tmp_path: Path) -> Callable[..., Path]:
    """A function that leaves an experiment of whole trials, of nine epochs each, and of stopped ones."""

    def leave(whole: int, stopped: int = 0) -> Path:
        folder = tmp_path / "experiment"
        folder.mkdir()
        noise = np.random.default_rng(0)
        states = ["completed"] * whole + ["stopped"] * stopped
        trials, curves = ["trial_id,lr,status"], ["trial_id,epoch,val_acc,seconds"]
        for i, status in enumerate(states):
            trials.append(f"{i:03},0.1,{status}")
            best = noise.uniform(0.3, 0.7)
            pace = best + noise.uniform(-0.2, 0.1)  # the better ones are rather slow, so that some are stopped
            for epoch in range(1, 10 if status == "completed" else 4):
                curves.append(f"{i:03},{epoch},{best * (1 - pace**epoch)},{noise.uniform(100, 200)}")
        (folder / "trials.csv").write_text("\n".join(trials) + "\n")
        (folder / "curves.csv").write_text("\n".join(curves) + "\n")
        return folder

    return leave


def test_whole_trials_are_read_in_their_order_and_the_others_are_counted(left: Callable[..., Path]) -> None:
    found = read_whole(left(MINIMUM, stopped=2))
    assert [curve.trial_id for curve in found.curves] == [f"{i:03}" for i in range(MINIMUM)]
    assert found.others == {"stopped": 2} and found.longest == 9
    assert found.best == max(value for curve in found.curves for value in curve.val_acc)


def test_too_few_whole_trials_are_refused_with_their_number_and_what_makes_more(left: Callable[..., Path]) -> None:
    folder = left(MINIMUM - 1, stopped=5)
    with pytest.raises(InputError, match=rf"Only {MINIMUM - 1} of the {MINIMUM + 4} trials .* are whole \(5 stopped\)"):
        read_whole(folder)


def test_few_trials_will_do_where_all_are_whole(left: Callable[..., Path]) -> None:
    assert len(read_whole(left(2)).curves) == 2


def test_the_command_named_draws_the_committed_configurations_and_stops_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Only 5 of the 30 trials .* are whole \(25 stopped\)") as refusal:
        read_whole(COMMITTED)
    command = whole_command(COMMITTED)
    assert str(refusal.value).endswith(command)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "tune.asha"]
    question = ask([*words[3:], "--results_dir", str(tmp_path)])
    drawn = pd.DataFrame.from_dict(question.configurations(), orient="index").sort_index(axis=1)
    trials = pd.read_csv(COMMITTED / "trials.csv", index_col="trial_id")
    pd.testing.assert_frame_equal(drawn, trials[list(drawn)], check_names=False, check_dtype=False, check_exact=True)
    assert list(trials)[: len(drawn.columns)] == list(drawn) and len(drawn) == 30
    assert question.base.max_epochs == trials.epochs.max() == 30
    assert not Rungs(question.options.grace_period, 30, question.options.reduction_factor).values
    assert (question.options.finalists, question.options.finalist_seeds) == (1, 1)
    assert question.folder == tmp_path / "corrected-whole"


@pytest.mark.parametrize(
    ("search", "words", "expected"),
    [
        (None, {}, (1, 3)),
        ({"grace_period": 2, "reduction_factor": 4}, {}, (2, 4)),
        ({"grace_period": 9, "reduction_factor": 4}, {}, (1, 4)),
        ({"grace_period": 2, "reduction_factor": 4}, {"grace_period": 9, "reduction_factor": 2}, (9, 2)),
    ],
    ids=["a default search's", "the experiment's", "not a grace period without rungs", "what is given"],
)
def test_ashas_options_are(
    search: dict[str, int] | None, words: dict[str, int], expected: tuple[int, int], tmp_path: Path
) -> None:
    if search is not None:
        question_file(tmp_path).parent.mkdir()
        question_file(tmp_path).write_text(json.dumps({"search": search}))
    assert asha_of(tmp_path, 9, ReplayOptions(**words)) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--workers 0", "workers: '0'. Legal: whole numbers, 1 or more"),
        ("--workers 1 x", "workers: 'x'. Legal: whole numbers, 1 or more"),
        ("--worker 1", "--worker: there is no such flag; did you mean --workers?"),
        ("--orders 0", "orders: 0. Legal: 1 or more"),
        ("--reduction_factor 1", "reduction_factor: 1. Legal: 2 or more"),
        ("--grace_period 10", "grace_period: 10. Legal: 1 to 9, the longest curve's epochs"),
        ("--startup -1", r"startup: -1.0. Legal: 0 or more seconds"),
        ("--output /proc/x", "output: '/proc/x' cannot be written"),
    ],
)
def test_what_is_impossible_is_refused(words: str, said: str, left: Callable[..., Path]) -> None:
    with pytest.raises(InputError) as refusal:
        main([str(left(2)), *words.split()])
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("000,2,", "000,3,", "the epochs of 000 are not 1, 2, 3"),
        ("000,2,", "000,second,", "is no table of trial_id, epoch, seconds, val_acc"),
        ("seconds", "minutes", "is no table of trial_id, epoch, seconds, val_acc"),
        ("000,9,", "000,9,,", "is no table of trial_id, epoch, seconds, val_acc"),
    ],
)
def test_damaged_curves_are_refused(old: str, new: str, said: str, left: Callable[..., Path]) -> None:
    curves = left(2) / "curves.csv"
    curves.write_text(curves.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=said):
        read_whole(curves.parent)


def test_an_empty_folder_and_trials_that_all_diverged_are_refused(left: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trials\.csv: there is no such file"):
        read_whole(tmp_path)
    trials = left(2) / "trials.csv"
    trials.write_text(trials.read_text().replace("completed", "diverged"))
    with pytest.raises(InputError, match=r"None of the 2 trials .* finite losses"):
        read_whole(trials.parent)


def test_the_command_leaves_table_and_figure_and_prints_80_columns(
    left: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)  # what is printed names the place from here
    folder, output = left(30, stopped=1), tmp_path / "new" / "place"
    words = [str(folder), "--orders", "20", "--startup", "1.5", "--output", str(output)]
    assert main([*words, "--workers", "1", "512", "1"]) == 0
    said = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 80
    assert "Left out: 1 stopped." in said and "whatever their order" in " ".join(said.split())
    assert {p.name for p in folder.iterdir()} == {"trials.csv", "curves.csv"}
    assert (output / "figures" / "simulation.png").stat().st_size > 10_000
    rows = pd.read_csv(output / "simulation.csv")
    kept = ["ASHA", "median stopping", "random search"]
    assert list(zip(rows.workers, rows.policy, strict=True)) == [(w, name) for w in (1, 512) for name in kept]
    assert rows[rows.policy == "random search"].epochs.tolist() == [270.0, 270.0]
    assert (rows.startup == 1.5).all() and (rows.trials == 30).all() and (rows.grace_period == 1).all()
    assert np.allclose(rows.target, read_whole(folder).best - 0.005)

    assert main([*words, "--workers", "1", "512", "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["left_out"] == {"stopped": 1} and told["orders"] == 20
    found = pd.DataFrame(told["rows"]).fillna(math.inf)
    pd.testing.assert_frame_equal(found, rows[list(found)], check_dtype=False)
    assert np.isinf(found.epochs_to_target_high).any(), "the test needs an order that never reaches the target"
