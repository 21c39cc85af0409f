"""ASHA's decisions: pure numbers against a brute-force model and against Ray's own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import ray.tune.schedulers
from hypothesis import given, settings
from hypothesis import strategies as st

from tune.scheduler import Rungs, milestones


@st.composite
def reports(draw: st.DrawFn) -> list[tuple[str, int, float]]:
    """Reports (trial, epoch, val_acc) of up to eight trials, interleaved at random, each trial's epochs in order."""
    curves = draw(
        st.lists(
            st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000001, 0.9]), min_size=1, max_size=30),
            min_size=1,
            max_size=8,
        )
    )
    turns = [f"T{i}" for i, curve in enumerate(curves) for _ in curve]
    order = draw(st.permutations(turns))
    seen: dict[str, int] = {}
    found = []
    for trial in order:
        seen[trial] = seen.get(trial, 0) + 1
        found.append((trial, seen[trial], curves[int(trial[1:])][seen[trial] - 1]))
    return found


def play(rungs: Rungs, sequence: list[tuple[str, int, float]]) -> dict[str, int]:
    """The epoch after which each stopped trial stopped; reports after a stop are not made."""
    stopped: dict[str, int] = {}
    for trial, epoch, value in sequence:
        if trial not in stopped and rungs.decide(trial, epoch, value).stop:
            stopped[trial] = epoch
    return stopped


@given(reports(), st.integers(1, 4), st.integers(2, 4))
@settings(max_examples=300, deadline=None)
def test_decisions_are_those_of_a_brute_force_model(
    sequence: list[tuple[str, int, float]], grace: int, factor: int
) -> None:
    expected: dict[str, int] = {}
    for i, (trial, epoch, value) in enumerate(sequence):
        if trial in expected or epoch not in [grace * factor**k for k in range(6) if grace * factor**k < 30]:
            continue
        before = [v for t, e, v in sequence[:i] if e == epoch and (t not in expected or expected[t] >= e)]
        if before:
            ordered = sorted(before)
            place = (len(ordered) - 1) * (1 - 1 / factor)
            low = int(place)
            high = min(low + 1, len(ordered) - 1)
            cutoff = ordered[low] + (ordered[high] - ordered[low]) * (place - low)
            if value < cutoff - 1e-15:
                expected[trial] = epoch
    assert play(Rungs(grace, 30, factor), sequence) == expected


@given(reports(), st.integers(1, 4), st.integers(2, 4))
@settings(max_examples=200, deadline=None)
def test_decisions_are_those_of_rays_asha(sequence: list[tuple[str, int, float]], grace: int, factor: int) -> None:
    theirs = ray.tune.schedulers.AsyncHyperBandScheduler(
        time_attr="epoch", metric="val_acc", mode="max", max_t=31, grace_period=grace, reduction_factor=factor
    )
    stopped: dict[str, int] = {}
    known = set()
    for trial, epoch, value in sequence:
        handle = SimpleNamespace(trial_id=trial)
        if trial not in known:
            theirs.on_trial_add(None, handle)
            known.add(trial)
        if trial not in stopped and theirs.on_trial_result(None, handle, {"epoch": epoch, "val_acc": value}) == "STOP":
            stopped[trial] = epoch
    assert play(Rungs(grace, 31, factor), sequence) == stopped


@given(reports(), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_rungs_refilled_from_the_curves_decide_as_uninterrupted_ones(
    sequence: list[tuple[str, int, float]], cut: int
) -> None:
    whole = Rungs(1, 30, 3)
    expected = play(whole, sequence)
    first = Rungs(1, 30, 3)
    before = play(first, sequence[:cut])
    second = Rungs(1, 30, 3)
    curves: dict[str, list[tuple[int, float]]] = {}
    for trial, epoch, value in sequence[:cut]:
        if epoch <= before.get(trial, 99):
            curves.setdefault(trial, []).append((epoch, value))
    for trial, curve in curves.items():
        second.enter(trial, curve, judged=len(curve))
    for trial, curve in curves.items():  # each trial that goes on repeats its last epoch, which it passed
        if trial not in before and curve[-1][0] in second.values:
            assert not second.decide(trial, *curve[-1]).stop
    after = play(second, [report for report in sequence[cut:] if report[0] not in before])
    assert before | after == expected


def test_a_decision_asked_again_is_the_same() -> None:
    rungs = Rungs(1, 9, 3)
    first = rungs.decide("a", 1, 0.5)
    rungs.decide("b", 1, 0.9)
    assert rungs.decide("a", 1, 0.5) is first
    assert not first.stop


def test_a_report_that_was_recorded_but_not_judged_is_judged_against_the_others_only() -> None:
    rungs = Rungs(1, 9, 3)
    rungs.enter("a", [(1, 0.9)], judged=1)
    rungs.enter("b", [(1, 0.2)], judged=0)
    decision = rungs.decide("b", 1, 0.2)
    assert decision.stop and decision.cutoff == 0.9 and decision.judged == 1


def test_whoever_passed_before_a_restart_is_not_stopped_by_those_who_came_later() -> None:
    rungs = Rungs(1, 9, 3)
    rungs.enter("a", [(1, 0.3), (2, 0.4)], judged=2)
    rungs.enter("b", [(1, 0.5)], judged=1)
    assert not rungs.decide("a", 1, 0.3).stop


def test_ties_survive_and_the_first_arrival_passes() -> None:
    rungs = Rungs(1, 9, 3)
    assert [rungs.decide(name, 1, 0.1).stop for name in "abcd"] == [False] * 4
    assert rungs.decide("e", 1, 0.0999).stop


@pytest.mark.parametrize(
    ("grace", "longest", "factor", "expected"),
    [(1, 30, 3, [1, 3, 9, 27]), (1, 27, 3, [1, 3, 9]), (5, 5, 2, []), (2, 30, 4, [2, 8])],
)
def test_rungs_lie_at_powers_below_the_last_epoch(grace: int, longest: int, factor: int, expected: list[int]) -> None:
    assert milestones(grace, longest, factor) == expected


def test_a_decision_says_which_rung_and_which_cutoff() -> None:
    rungs = Rungs(1, 9, 3)
    assert str(rungs.decide("a", 1, 0.5)) == "rung 1: first to arrive"
    assert str(rungs.decide("b", 1, 0.4)) == "rung 1: below the cutoff 0.5000 of the 1 before it"
    assert str(rungs.decide("b", 2, 0.4)) == ""
    assert np.isclose(rungs.decide("c", 1, 0.7).cutoff or 0, 0.4 + 2 / 3 * 0.1)
