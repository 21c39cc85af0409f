"""Faults while a search runs: whatever is killed, and when, nothing is lost and no epoch is trained in vain."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest

ROOT = Path(__file__).parent.parent
QUESTION = (
    "--arch classic_cnn --width 3 --dataset digits --optimizer adam --limit_train 400 --num_samples 6 --max_epochs 5 "
    "--reduction_factor 2 --finalists 1 --finalist_seeds 1 --max_concurrent 1"
)
FILES = ("curves", "trials", "finalists")


class Searches:
    """Searches of the one question, in a folder of results, whose trained epochs are counted."""

    def __init__(self, folder: Path, cache: Path, site: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": f"{site}:{ROOT}"}

    def start(self, name: str, *words: str, pause: float = 0) -> subprocess.Popen[str]:
        log = str(self.folder / f"{name}.log")
        environment = {**self.environment, "EPOCHS_TRAINED": log, "EPOCH_PAUSE": str(pause)}
        command = [sys.executable, "-m", "tune.asha", "--results_dir", str(self.folder), "--name", name, *words]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def trained(self, name: str) -> Counter[str]:
        """How often each epoch of each training, the finalist's too, was trained."""
        with contextlib.suppress(FileNotFoundError):
            return Counter((self.folder / f"{name}.log").read_text().splitlines())
        return Counter()

    def await_epochs(self, name: str, process: subprocess.Popen[str], epochs: int) -> None:
        """Wait until so many epochs were trained."""
        until = time.monotonic() + 900
        while self.trained(name).total() < epochs:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)

    def assert_equal(self, one: str, other: str) -> None:
        for file in FILES:
            left, right = (pd.read_csv(self.folder / name / f"{file}.csv") for name in (one, other))
            pd.testing.assert_frame_equal(left.drop(columns="seconds"), right.drop(columns="seconds"), check_exact=True)


@pytest.fixture(scope="module")
def searches(tmp_path_factory: pytest.TempPathFactory, session_cache: Path, counter_site: Path) -> Searches:
    made = Searches(tmp_path_factory.mktemp("searches"), session_cache, counter_site)
    whole = made.start("whole", *QUESTION.split())
    _, error = whole.communicate(timeout=900)
    assert whole.returncode == 0, error
    assert set(made.trained("whole").values()) == {1}
    return made


def kill_driver(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def kill_workers(process: subprocess.Popen[str]) -> None:
    killed = 0
    while not killed and process.poll() is None:  # a worker that was killed before may not be back yet
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(process.pid).children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.Error):
                if child.name().startswith("ray::Training"):
                    child.kill()
                    killed += 1
        time.sleep(0.1)
    assert killed


def kill_ray(process: subprocess.Popen[str]) -> None:
    raylets: list[psutil.Process] = []
    while not raylets:  # a search that was only just resumed has none yet
        raylets = [child for child in psutil.Process(process.pid).children() if child.name() == "raylet"]
        time.sleep(0.1)
    raylets[0].kill()
    assert process.wait(timeout=200) == 1


def end_in_order(process: subprocess.Popen[str]) -> None:
    process.terminate()
    assert process.wait(timeout=200) == 1


# Kills a search, and where they fall: more of them for the figures in results/LOG.md.
KILLS, SEED = int(os.environ.get("CIFAR_LAB_KILLS", "2")), os.environ.get("CIFAR_LAB_KILL_SEED", "0")


def damage(folder: Path) -> int:
    """Flip a bit in each last checkpoint that has one before it; how many that were."""
    places = [place for place in folder.glob("checkpoints/*/last.ckpt") if place.with_name("previous.ckpt").exists()]
    for place in places:
        content = bytearray(place.read_bytes())
        content[len(content) // 2] ^= 1
        place.write_bytes(content)
    return len(places)


@pytest.mark.parametrize("fault", [kill_driver, kill_workers, kill_ray, end_in_order])
def test_a_search_killed_at_random_points_equals_the_uninterrupted_one(
    searches: Searches, fault: Callable[[subprocess.Popen[str]], None]
) -> None:
    name = fault.__name__
    # Or all epochs are over before a busy machine has killed anything; a search learns of Ray's end within seconds.
    pause = 1 if fault is kill_ray else 0.3
    draw = random.Random(name + SEED)
    total, flips = searches.trained("whole").total(), 0
    process = searches.start(name, *QUESTION.split(), pause=pause)
    # Anywhere in trials and finalist, but for an end that is too near for Ray's death to be noticed.
    kills = min(KILLS, 2) if fault is kill_workers else KILLS  # a trial is tried twice more
    for point in sorted(draw.sample(range(1, total - 3 * kills), kills)):
        # One that was only just resumed does not hear a signal before it has trained.
        searches.await_epochs(name, process, max(point, searches.trained(name).total() + 1))
        time.sleep(draw.uniform(0, pause))
        fault(process)
        if process.poll() is not None:
            out, error = process.communicate()
            assert fault is kill_driver or out.rstrip().endswith("--resume"), (out, error)
            flips += damage(searches.folder / name) if fault is kill_driver else 0
            process = searches.start(name, "--resume", pause=pause)
    _, error = process.communicate(timeout=900)
    assert process.returncode == 0, error
    searches.assert_equal("whole", name)
    repeated = {epoch: count - 1 for epoch, count in searches.trained(name).items() if count > 1}
    assert sum(repeated.values()) <= kills + flips, "a kill may cost the epoch under way, damage the one before"
    print(f"{name}: {kills} kills and {flips} flipped bits survived, {sum(repeated.values())} epochs repeated")


def test_a_second_signal_ends_at_once_and_says_how_to_go_on(searches: Searches) -> None:
    process = searches.start("twice", *QUESTION.split(), pause=0.3)
    searches.await_epochs("twice", process, 4)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=200) == 1
    assert time.monotonic() - begun < 5
    assert not (searches.folder / "twice" / "report.html").exists(), "which an end in order writes"
    out, _ = process.communicate(timeout=200)
    assert out.splitlines()[-1].endswith("--resume") and "--name twice" in out.splitlines()[-1]
    again = searches.start("twice", "--resume")
    again.communicate(timeout=900)
    assert again.returncode == 0
    searches.assert_equal("whole", "twice")
