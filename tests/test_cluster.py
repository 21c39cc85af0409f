"""Jobs on Ray: errors of ours end them all, errors of a job are told with their cause."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cifar_lab.recipe import Recipe
from tune.cluster import Job, cluster, run_jobs
from tune.heartbeat import HUNG


@pytest.fixture(scope="module")
def processors() -> Iterator[dict[str, float]]:
    with cluster(None, dashboard=False) as joined:
        yield joined.resources


def jobs(folder: Path, **fields: Any) -> list[Job]:
    recipe = Recipe(arch="classic_cnn", limit_train=50, max_epochs=3, **fields)
    return [Job(name, recipe, folder / name) for name in ("T000", "T001", "T002")]


def processes(words: str) -> list[psutil.Process]:
    """The processes whose command line contains the words."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if words in " ".join(process.cmdline()):
                found.append(process)
    return found


def run(folder: Path, made: list[Job], **hooks: Any) -> None:
    quiet: dict[str, Any] = {"judge": lambda *_: False, "on_start": lambda *_: None, "on_end": lambda *_: None}
    run_jobs(made, **(quiet | hooks), takes={"CPU": 1.0, "GPU": 0.0}, concurrent=1, scratch=folder / "ray")


def test_an_error_of_ours_ends_all_jobs_and_is_raised(processors: dict[str, float], tmp_path: Path) -> None:
    started: list[str] = []

    def judge(job_id: str, row: dict[str, Any]) -> bool:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        run(tmp_path, jobs(tmp_path, dataset="digits"), judge=judge, on_start=started.append)
    assert started == ["T000"]
    assert not (tmp_path / "T001").exists()


def test_a_job_that_fails_is_told_with_its_cause_and_the_others_go_on(
    processors: dict[str, float], tmp_path: Path
) -> None:
    ended: dict[str, str] = {}
    made = jobs(tmp_path, dataset="digits")
    broken = made[1].recipe.replace(dataset="folder", data_dir=str(tmp_path / "nowhere"))
    made[1] = Job("T001", broken, tmp_path / "T001")
    run(tmp_path, made, on_end=ended.__setitem__)
    assert ended["T000"] == "" and ended["T002"] == ""
    assert "nowhere' is no folder" in ended["T001"]


def test_a_job_is_stopped_when_the_judge_says_so_and_trains_no_epoch_more(
    processors: dict[str, float], tmp_path: Path
) -> None:
    heard: list[tuple[str, int]] = []

    def judge(job_id: str, row: dict[str, Any]) -> bool:
        heard.append((job_id, int(row["epoch"])))
        return job_id == "T001" and row["epoch"] == 1

    run(tmp_path, jobs(tmp_path, dataset="digits"), judge=judge)
    assert [epoch for job, epoch in heard if job == "T001"] == [1]
    assert [epoch for job, epoch in heard if job == "T002"] == [1, 2, 3]


def test_a_trial_that_hangs_is_killed_and_goes_on_after_its_last_epoch(
    processors: dict[str, float], tmp_path: Path
) -> None:
    heard: list[tuple[str, int]] = []
    ended: dict[str, str] = {}
    made = [dataclasses.replace(job, patience=5.0) for job in jobs(tmp_path, dataset="digits")[:2]]
    once: list[int] = []

    def judge(job_id: str, row: dict[str, Any]) -> bool:
        heard.append((job_id, int(row["epoch"])))
        if not once:
            (beat,) = processes(f"{tmp_path / 'T000' / HUNG}")
            once.append(beat.ppid())
            os.kill(once[0], signal.SIGSTOP)
        return False

    run(tmp_path, made, judge=judge, on_end=ended.__setitem__)
    assert [epoch for job, epoch in heard if job == "T000"] == [1, 1, 2, 3], "one epoch again, none lost"
    assert [epoch for job, epoch in heard if job == "T001"] == [1, 2, 3]
    assert ended == {"T000": "", "T001": ""}
    assert not psutil.pid_exists(once[0])
    assert not processes("heartbeat-"), "nothing watches a training that has ended"


def test_nothing_watches_a_trial_that_was_stopped(processors: dict[str, float], tmp_path: Path) -> None:
    watching: list[int] = []

    def judge(job_id: str, row: dict[str, Any]) -> bool:
        watching.append(len(processes(str(tmp_path))))
        return True

    run(tmp_path, jobs(tmp_path, dataset="digits"), judge=judge)
    assert watching == [1, 1, 1], "one trial at a time, so one watch at a time"
    until = time.monotonic() + 30  # the last worker has to end first
    while processes(str(tmp_path)):
        assert time.monotonic() < until, "a watch left behind would kill a worker that is used again"
        time.sleep(0.5)
