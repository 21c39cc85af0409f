"""Jobs on Ray: errors of ours end them all, errors of a job are told with their cause."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.exceptions import ActorDiedError

import tune.cluster
from cifar_lab.files import HUNG
from cifar_lab.recipe import InputError, Recipe
from tune.cluster import Job, _Listener, alive, cause, cluster, on_a_worker, run_jobs


@pytest.fixture(scope="module")
def processors() -> Iterator[list[dict[str, float]]]:
    with contextlib.ExitStack() as afterwards, cluster(None, afterwards, dashboard=False) as joined:
        yield joined.machines


def jobs(folder: Path, **fields: Any) -> list[Job]:
    recipe = Recipe(arch="classic_cnn", limit_train=50, max_epochs=3, **fields)
    return [Job(name, recipe, folder / name) for name in ("T000", "T001", "T002")]


def processes(words: str) -> list[psutil.Process]:
    """The processes begun here whose command line contains the words."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if words in " ".join(process.cmdline()):
                found.append(process)
    return found


def run(folder: Path, made: list[Job] | Callable[[], list[Job]], *, concurrent: int = 1, **hooks: Any) -> None:
    quiet: dict[str, Any] = {"judge": lambda *_: False, "on_start": lambda *_: None, "on_end": lambda *_: None}
    known = made if callable(made) else lambda: made
    takes = {"CPU": 1.0, "GPU": 0.0}
    run_jobs(known, **(quiet | hooks), takes=takes, concurrent=concurrent, scratch=folder / "ray")


@pytest.mark.parametrize("gpu", [False, True])
def test_ray_ends_beside_what_follows_unless_that_may_want_its_gpu(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    ended, followed = threading.Event(), threading.Event()

    class Node:
        def destroy_external_storage(self) -> None:
            followed.wait(0 if gpu else 60)

        def kill_all_processes(self, **_: bool) -> None:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)  # while it is waited for, when all is done
            time.sleep(0.2)
            ended.set()

    monkeypatch.setattr(ray, "init", lambda **_: types.SimpleNamespace(dashboard_url=None))
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray._private.worker, "_global_node", Node())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with contextlib.ExitStack() as afterwards:
        with cluster(None, afterwards, dashboard=False):
            pass
        assert ended.is_set() == gpu
        followed.set()
    assert ended.is_set()


def test_threads_of_a_worker_share_their_memory(processors: list[dict[str, float]]) -> None:
    # What comes of it is measured by tests/check_reuse.py.
    assert on_a_worker(os.getenv, {"CPU": 1.0, "GPU": 0.0}, "MALLOC_ARENA_MAX") == "1"


def test_trials_get_the_workers_that_ray_has_started(processors: list[dict[str, float]], tmp_path: Path) -> None:
    patience = time.monotonic() + 60
    while len(waiting := {process.pid for process in processes("ray::IDLE")}) < processors[0]["CPU"]:
        assert time.monotonic() < patience, waiting
        time.sleep(0.1)

    def look(config: dict[str, Any]) -> None:
        ray.tune.report({"worker": os.getpid(), "fork": os.environ["PL_DISABLE_FORK"]})

    where = ray.tune.RunConfig(storage_path=str(tmp_path), verbose=0)
    (trial,) = ray.tune.Tuner(look, run_config=where).fit()
    assert trial.metrics is not None and trial.metrics["worker"] in waiting
    assert trial.metrics["fork"] == "1", "as Tune would have given it to a worker of its own"


def test_an_error_of_ours_ends_all_jobs_and_is_raised(processors: list[dict[str, float]], tmp_path: Path) -> None:
    started: list[str] = []
    ended: list[str] = []

    def judge(job_id: str, row: dict[str, Any]) -> bool:
        raise OSError(28, "No space left on device")

    made = jobs(tmp_path, dataset="digits")
    with pytest.raises(OSError, match="No space left on device"):
        run(tmp_path, made, judge=judge, on_start=started.append, on_end=lambda job_id, error: ended.append(job_id))
    assert started == ["T000"]
    assert not ended, "what could not be recorded has not come to an end"
    assert not (tmp_path / "T001").exists()


def test_a_job_that_fails_is_told_with_its_cause_and_the_others_go_on(
    processors: list[dict[str, float]], tmp_path: Path
) -> None:
    ended: dict[str, str] = {}
    made = jobs(tmp_path, dataset="digits")
    broken = made[1].recipe.replace(dataset="folder", data_dir=str(tmp_path / "nowhere"))
    made[1] = Job("T001", broken, tmp_path / "T001")
    run(tmp_path, made, on_end=ended.__setitem__)
    assert ended["T000"] == "" and ended["T002"] == ""
    assert "nowhere' is no folder" in ended["T001"]


def test_a_job_is_stopped_when_the_judge_says_so_and_trains_no_epoch_more(
    processors: list[dict[str, float]], tmp_path: Path
) -> None:
    heard: list[tuple[str, int]] = []

    def judge(job_id: str, row: dict[str, Any]) -> bool:
        heard.append((job_id, int(row["epoch"])))
        return job_id == "T001" and row["epoch"] == 1

    run(tmp_path, jobs(tmp_path, dataset="digits"), judge=judge)
    assert [epoch for job, epoch in heard if job == "T001"] == [1]
    assert [epoch for job, epoch in heard if job == "T002"] == [1, 2, 3]


def test_a_worker_waits_for_a_job_that_follows_from_what_others_do(
    processors: list[dict[str, float]], tmp_path: Path
) -> None:
    made, ended, workers = jobs(tmp_path, dataset="digits"), list[str](), dict[str, int]()
    made = [dataclasses.replace(job, patience=5.0) for job in made]
    made[1] = dataclasses.replace(made[1], recipe=made[1].recipe.replace(max_epochs=20))
    times: dict[str, list[float]] = {}

    def judge(job_id: str, row: dict[str, Any]) -> bool:
        workers[job_id] = row["pid"]
        times.setdefault(job_id, []).append(time.monotonic())
        if job_id == "T001":
            time.sleep(0.4)
        return job_id == "T000"  # its worker waits from now on

    def known() -> list[Job]:
        return made if "T001" in ended else made[:2]

    run(tmp_path, known, concurrent=2, judge=judge, on_end=lambda job_id, error: ended.append(job_id))
    assert ended == ["T000", "T001", "T002"] and len(times["T001"]) == 20 and len(times["T002"]) == 3
    assert times["T002"][0] - times["T000"][0] > 7, "else it was not for long"
    assert workers["T002"] == workers["T000"] != workers["T001"]
    assert len(list(tmp_path.glob("ray/attempt-*"))) == 1


def test_a_job_that_ray_gives_up_without_a_word_is_lost_and_not_waited_for() -> None:
    ended, faults, lost = {"T000"}, list[Exception](), list[str]()
    listener = _Listener(lambda *_: None, lambda *_: None, faults, lost, ended)
    trials = [types.SimpleNamespace(config={"job": {"job_id": "T000"}}, status="ERROR")]  # which was told
    listener.on_step_begin(1, trials)
    assert not listener.wrong()
    trials.append(types.SimpleNamespace(config={"job": {"job_id": "T001"}}, status="RUNNING"))
    assert not listener.wrong()
    trials[1].status = "ERROR"
    assert listener.wrong() and listener.wrong() and lost == ["T001"]


def test_a_trial_that_hangs_is_killed_and_goes_on_after_its_last_epoch(
    processors: list[dict[str, float]], tmp_path: Path
) -> None:
    heard: list[tuple[str, int]] = []
    ended: dict[str, str] = {}
    made = [dataclasses.replace(job, patience=10.0) for job in jobs(tmp_path, dataset="digits")[:2]]
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
    assert not processes(str(tmp_path)), "nothing watches a training that has ended"


def test_a_worker_that_dies_between_two_trials_costs_neither(
    processors: list[dict[str, float]], tmp_path: Path
) -> None:
    heard: list[tuple[str, int]] = []
    ended: dict[str, str] = {}

    def judge(job_id: str, row: dict[str, Any]) -> bool:
        heard.append((job_id, int(row["epoch"])))
        if job_id != "T000":
            return False
        (beat,) = processes(f"{tmp_path / 'T000' / HUNG}")
        os.kill(beat.ppid(), signal.SIGKILL)
        return True

    run(tmp_path, jobs(tmp_path, dataset="digits"), judge=judge, on_end=ended.__setitem__)
    assert heard == [("T000", 1), *((job, epoch) for job in ("T001", "T002") for epoch in (1, 2, 3))]
    assert ended == {"T000": "", "T001": "", "T002": ""}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_when_all_is_trained_is_heard(
    number: int, processors: list[dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def on_end(job_id: str, error: str) -> None:
        if job_id == "T002":
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, jobs(tmp_path, dataset="digits"), on_end=on_end, last_words=lambda: "To go on: ...")
    assert "Ending; once more ends at once. To go on: ..." in capsys.readouterr().err


@pytest.mark.parametrize("server", ["head", "raylet"])
def test_the_process_ends_with_its_last_words_when_ray_is_gone(
    processors: list[dict[str, float]],
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    head = int(ray.get_runtime_context().gcs_address.rpartition(":")[2])
    gone, ended, plain = threading.Event(), threading.Event(), tune.cluster.silence

    def silence(host: str, port: int) -> OSError | None:
        return ConnectionRefusedError() if gone.is_set() and (port == head) == (server == "head") else plain(host, port)

    monkeypatch.setattr(tune.cluster, "silence", silence)
    monkeypatch.setattr(tune.cluster, "LIFE_SIGN", 0.02)
    monkeypatch.setattr(tune.cluster, "LOST", 0.5)
    monkeypatch.setattr(os, "_exit", lambda status: ended.set() if status == 1 else None)
    with alive(lambda: "To go on: ..."):
        assert not ended.wait(1), "as long as it is there nothing happens"
        gone.set()
        begun = time.monotonic()
        assert ended.wait(30)
        # It was last heard of up to a life sign before.
        assert time.monotonic() - begun > (0.4 if server == "head" else 0), "a head may be restarted"
    said = capsys.readouterr()
    assert "Ray has died beneath the search" in said.err and said.out.startswith("To go on: ...")


@pytest.mark.parametrize(
    ("error", "text", "said"),
    [
        (
            None,
            "1 worker(s) were killed due to the node running low on memory. Memory on ...",
            "out of memory: Ray kil",
        ),
        (
            MemoryError(),
            "",
            "out of memory: MemoryError. Fewer at once (--max_concurrent) leave more to each; a smaller",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "",
            "out of memory: OutOfMemoryErr",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), "", "out of memory: RuntimeError."),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."), "", "out of memory: RuntimeError."),
        (
            ActorDiedError(),
            "pid: 1234",
            "its process died: killed, perhaps for want of memory, or crashed, or its mach",
        ),
        (KeyError("val_acc"), "", "KeyError: 'val_acc'"),
        (None, "Traceback ...\nof_his_own.Error: an error of a class\nthat is unknown here", "that is unknown here"),
    ],
)
def test_a_failure_is_told_in_words_that_all_who_met_it_share(error: Exception | None, text: str, said: str) -> None:
    assert cause(error, text).startswith(said)


def test_a_machine_that_leaves_while_it_is_asked_is_not_waited_for(
    processors: list[dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {**nodes[0], "NodeID": "e" * len(nodes[0]["NodeID"])}])
    assert tune.cluster.blind(str(tmp_path)) == []


def test_a_machine_without_the_package_is_told_in_a_sentence(
    processors: list[dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here_only(place: str, name: str) -> bool:
        return True

    assert tune.cluster.blind(str(tmp_path)) == []
    module = types.ModuleType("here_only")
    module.here_only = here_only  # type: ignore[attr-defined]
    here_only.__module__, here_only.__qualname__ = "here_only", "here_only"
    monkeypatch.setitem(sys.modules, "here_only", module)
    monkeypatch.setattr(tune.cluster, "seen", here_only)
    with pytest.raises(InputError, match=r"^address: a machine .*No module named 'here_only'.*\. Each needs"):
        tune.cluster.blind(str(tmp_path))


def test_nothing_watches_a_trial_that_was_stopped(processors: list[dict[str, float]], tmp_path: Path) -> None:
    watching: list[int] = []

    def judge(job_id: str, row: dict[str, Any]) -> bool:
        watching.append(len(processes(str(tmp_path))))
        return True

    run(tmp_path, jobs(tmp_path, dataset="digits"), judge=judge)
    assert watching == [1, 1, 1], "one trial at a time, so one watch at a time"
    until = time.monotonic() + 100  # the last worker has to end first
    while processes(str(tmp_path)):
        assert time.monotonic() < until, "a watch left behind would kill a worker that is used again"
        time.sleep(0.5)
