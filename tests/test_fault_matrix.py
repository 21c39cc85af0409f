"""One search and what may befall it: what its user reads after each fault, and that it ends as if none had been."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import psutil
import pytest
from conftest import install_callback

from cifar_lab import cli
from cifar_lab.checkpoint import read_checkpoint
from cifar_lab.fit import fit
from cifar_lab.recipe import InputError
from tune import asha, campaign, cluster
from tune.experiment import locked
from tune.plan import checkpoint_bytes
from tune.question import ask

ROOT = Path(__file__).parent.parent
QUESTION = (
    "--arch classic_cnn --width 3 --dataset digits --optimizer adam --limit_train 200 --num_samples 3 --max_epochs 4 "
    "--grace_period 4 --finalists 1 --finalist_seeds 1"
)
RAISED = "RuntimeError: the cat sat on the switch"
NO_MEMORY = (
    "out of memory: Ray killed its process, for the machine ran low. Fewer at once (--max_concurrent) leave more to "
    "each; a smaller batch_size needs less."
)

# Lightning takes callbacks from installed packages; this one does to the trainings what a file says, in the epoch that
# it says, and notes which were trained, by which process.
FAULTS = """
import errno, json, os, time
from pathlib import Path
from pytorch_lightning.callbacks import Callback

PLACE = Path(os.environ["FAULTS"])

class Faults(Callback):
    def asked(self, fault, trainer):
        return json.loads((PLACE / "faults.json").read_text()).get(fault) == trainer.current_epoch + 1

    def note(self, file, trainer):
        with open(PLACE / file, "a") as notes:
            notes.write(f"{Path(trainer.default_root_dir).name} {trainer.current_epoch + 1} {os.getpid()}\\n")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1 and self.asked("hold", trainer):
            self.note("held", trainer)
            while self.asked("hold", trainer):
                time.sleep(0.05)

    def on_train_epoch_end(self, trainer, pl_module):
        self.note("trained", trainer)
        if self.asked("raise", trainer):
            raise RuntimeError("the cat sat on the switch")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self.asked("full", trainer):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def made():
    return Faults()
"""


@dataclass(frozen=True)
class Ran:
    """What a run of the search left: its exit status, what it printed, the rows of its trials and curves."""

    status: int
    out: str
    err: str
    trials: pd.DataFrame
    curves: pd.DataFrame


@dataclass
class Search:
    """A search that is run again and again, on machines that come and go."""

    place: Path
    results: Path
    machines: Any
    last: Any = None
    lost: tuple[str, int, int] | None = None
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.results / "unlucky"

    def add_machine(self) -> Any:
        # No machine has a GPU that could be used; Ray counts what it is told.
        return self.machines.add_node(num_cpus=1, num_gpus=1)

    def replace_last(self) -> None:
        self.machines.remove_node(self.last)
        self.last = self.add_machine()

    def command(self, *words: str) -> list[str]:
        return ["--results_dir", str(self.results), "--name", "unlucky", "--address", self.machines.address, *words]

    def run(self, *words: str, **faults: int) -> Ran:
        """One run; `faults` names the epoch in which each befalls every trial."""
        self.set_faults(**faults)
        with captured(self.place) as said:
            status = asha.main(self.command(*words))
        return Ran(status, *said(), *(pd.read_csv(self.folder / f"{name}.csv") for name in ("trials", "curves")))

    def set_faults(self, **faults: int) -> None:
        aside = self.place / "aside.json"
        aside.write_text(json.dumps(faults))
        aside.replace(self.place / "faults.json")

    def noted(self, file: str) -> list[tuple[str, int, int]]:
        """Trial, epoch and process of each note."""
        with contextlib.suppress(FileNotFoundError):
            lines = [line.split() for line in (self.place / file).read_text().splitlines()]
            return [(trial, int(epoch), int(process)) for trial, epoch, process in lines]
        return []

    @property
    def no_room(self) -> str:
        return paragraphs(f"error: {self.folder} cannot be written (No space left on device). Mend that, then go on.")

    def files(self) -> dict[Path, str]:
        return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in self.folder.rglob("*") if p.is_file()}


@contextlib.contextmanager
def captured(place: Path) -> Iterator[Callable[[], tuple[str, str]]]:
    """What Python, or Ray's own libraries, write to the terminal meanwhile."""
    before = os.dup(1), os.dup(2)
    out, err = place / "out", place / "err"
    with out.open("w") as one, err.open("w") as two:
        os.dup2(one.fileno(), 1)
        os.dup2(two.fileno(), 2)
        try:
            with contextlib.redirect_stdout(one), contextlib.redirect_stderr(two):
                yield lambda: (out.read_text(), err.read_text())
        finally:
            for number, own in enumerate(before, 1):
                os.dup2(own, number)
                os.close(own)


def paragraphs(*texts: str) -> str:
    return "".join(cli.paragraph(text) + "\n" for text in texts)


def raylet(machine: Any) -> int:
    return int(machine.all_processes["raylet"][0].process.pid)


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Iterator[Search]:
    """The search, of which nothing was run yet, and its three machines."""
    from ray.cluster_utils import Cluster  # after tune.cluster, which sees to it that Ray listens on 127.0.0.1 only

    place = tmp_path_factory.mktemp("faults")
    install_callback(place, "faults", FAULTS)
    address = Path("/tmp/ray/ray_current_cluster")  # Cluster leaves it behind
    known = address.read_text() if address.exists() else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{place}:{ROOT}")
        patch.setenv("FAULTS", str(place))
        patch.setenv("XDG_CACHE_HOME", str(session_cache))
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        head = {"num_cpus": 1, "include_dashboard": False}
        made = Search(place, tmp_path_factory.mktemp("results"), Cluster(initialize_head=True, head_node_args=head))
        try:
            made.add_machine()
            made.last = made.add_machine()
            yield made
        finally:
            made.machines.shutdown()
            if known is None:
                address.unlink(missing_ok=True)
            else:
                address.write_text(known)


# The runs, each going on where the one before ended


@pytest.fixture(scope="module")
def failed(search: Search) -> Ran:
    """All trials fail: one on a machine whose memory has run low, the others in their second epoch."""
    with pytest.MonkeyPatch.context() as patch:

        def run_short(*words: Any, **named: Any) -> None:
            with pytest.MonkeyPatch.context() as low:
                low.setenv("RAY_memory_monitor_refresh_ms", "100")
                low.setenv("RAY_memory_usage_threshold", "0.01")
                search.replace_last()
            cluster.run_jobs(*words, **named)

        patch.setattr(campaign, "run_jobs", run_short)
        patch.setattr(cluster, "RETRIES", 0)
        return search.run(*QUESTION.split(), "--gpus_per_trial", "0", **{"raise": 2})


@pytest.fixture(scope="module")
def full_in_a_trial(search: Search, failed: Ran) -> Ran:
    """A better machine in place of the last; Ray's own files emptied; no room for the checkpoint of a third epoch."""
    search.replace_last()
    own = [file for file in (search.folder / "ray" / "attempt-1").iterdir() if file.is_file()]
    assert "tuner.pkl" in {file.name for file in own}
    for file in own:
        file.write_bytes(b"")
    return search.run("--resume", "--max_concurrent", "1", full=3)


@pytest.fixture(scope="module")
def full_in_the_search(search: Search, full_in_a_trial: Ran) -> Ran:
    """No room for one more row of curves.csv, nor for anything else in the search's folder."""
    plain, rows = Path.write_bytes, len(full_in_a_trial.curves)
    full: list[Path] = []

    def write_bytes(place: Path, content: bytes) -> int:
        if place.name == ".curves.csv.part" and len(content.splitlines()) - 1 > rows:
            full.append(place)
        if full and search.folder in place.parents:
            plain(place, content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(place, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        return search.run("--resume", "--max_concurrent", "1")


@pytest.fixture(scope="module")
def finished(search: Search, full_in_the_search: Ran) -> Ran:
    """Two trials, on half a GPU each, are in the middle of their last epoch when the machine of one is lost."""

    over = threading.Event()

    def lose() -> None:
        while len(search.noted("held")) < 2 and not over.wait(0.05):
            pass
        search.lost = search.noted("held")[0]
        process = psutil.Process(search.lost[2])
        above = {parent.pid for parent in process.parents()}
        (machine,) = [machine for machine in search.machines.worker_nodes if raylet(machine) in above]
        search.machines.remove_node(machine, allow_graceful=False)
        process.wait(timeout=200)
        search.set_faults()

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    ran = search.run("--resume", "--max_concurrent", "2", "--gpus_per_trial", "0.5", hold=4)
    over.set()
    thread.join()
    return ran


def test_trials_that_fail_are_counted_by_cause_and_ray_adds_nothing(search: Search, failed: Ran) -> None:
    assert failed.status == 1 and set(failed.trials.status) == {"failed"}
    assert sorted(failed.trials.reason) == [RAISED, RAISED, NO_MEMORY]
    assert failed.err == paragraphs(
        f"2 of 3 trials failed: {RAISED}",
        f"1 of 3 trials failed: {NO_MEMORY}",
        f"Tracebacks: {search.folder}/ray/attempt-*/*/error.txt",
    )
    assert "raylet" not in failed.out and failed.out.splitlines()[-1].endswith("--resume")
    texts = [file.read_text() for file in search.folder.glob("ray/attempt-1/*/error.txt")]
    assert sum("in on_train_epoch_end" in text for text in texts) == 2


def test_want_of_memory_on_one_machine_leaves_the_trials_on_others_alone(failed: Ran) -> None:
    assert list(failed.trials.set_index("reason").epochs.loc[[RAISED, NO_MEMORY]]) == [1, 1, 0]


def test_a_second_search_of_the_same_name_is_refused_and_the_first_unharmed(search: Search, failed: Ran) -> None:
    with locked(search.folder):  # as the first does as long as it runs
        before = search.files()
        with pytest.raises(InputError, match=r"name: another search is running in .*unlucky\. Wait for it"):
            search.run("--resume")
        with pytest.raises(InputError, match="name: 'unlucky' exists"):
            search.run(*QUESTION.split())
        assert search.files() == before


def test_results_that_have_turned_read_only_are_refused(
    search: Search, failed: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> NoReturn:  # nothing is read-only to root
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    before = search.files()
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"results_dir: '.*' cannot be written \(Read-only file system\)"):
        search.run("--resume")
    assert search.files() == before


@pytest.mark.parametrize(("flag", "there"), [("gpus_per_trial", "1 GPUs"), ("cpus_per_trial", "1 CPUs")])
def test_what_no_machine_has_is_refused_though_all_together_have_it(
    search: Search, failed: Ran, flag: str, there: str
) -> None:
    before = search.files()
    with pytest.raises(InputError, match=f"{flag}: 2. Legal: up to 1; the largest machine of the cluster .* {there}"):
        search.run("--resume", f"--{flag}", "2")
    assert search.files() == before


def test_a_disk_that_a_trial_finds_full_ends_the_search_in_a_sentence(
    search: Search, failed: Ran, full_in_a_trial: Ran
) -> None:
    assert full_in_a_trial.status == 1 and set(full_in_a_trial.trials.status) == {"pending"}
    assert full_in_a_trial.err == search.no_room
    assert full_in_a_trial.out.splitlines()[-1].endswith("--resume")
    assert list(full_in_a_trial.trials.epochs) == [2, *failed.trials.epochs[1:]], "none was tried after the first"


def test_emptied_files_of_rays_cost_nothing(failed: Ran, full_in_a_trial: Ran) -> None:
    kept = full_in_a_trial.curves.merge(failed.curves)
    pd.testing.assert_frame_equal(kept, failed.curves, check_exact=True)


def test_a_disk_that_the_search_finds_full_ends_it_in_a_sentence(
    search: Search, full_in_a_trial: Ran, full_in_the_search: Ran
) -> None:
    assert full_in_the_search.status == 1
    assert full_in_the_search.err == search.no_room
    assert full_in_the_search.out.splitlines()[-1].endswith("--resume")
    pd.testing.assert_frame_equal(full_in_the_search.curves, full_in_a_trial.curves, check_exact=True)
    assert not list(search.folder.rglob("*.part"))
    for checkpoint in search.folder.rglob("*.ckpt"):
        read_checkpoint(checkpoint)


def test_a_trial_whose_machine_is_lost_goes_on_elsewhere_after_its_last_epoch(search: Search, finished: Ran) -> None:
    assert finished.status == 0 and set(finished.trials.status) == {"completed"}, finished.err
    assert finished.err == "" and (search.folder / "best.json").exists()
    assert search.lost is not None and search.lost[1] == 4
    (last,) = [process for trial, epoch, process in search.noted("trained") if (trial, epoch) == search.lost[:2]]
    assert last != search.lost[2], "the epoch that was lost was trained by another process"


def test_no_epoch_is_trained_in_vain_but_those_that_a_fault_undid(search: Search, finished: Ran) -> None:
    times = Counter((trial, epoch) for trial, epoch, _ in search.noted("trained") if "-" not in trial)
    again = {epoch: count for epoch, count in times.items() if count > 1}
    assert set(times.values()) <= {1, 2} and sorted(epoch for _, epoch in again) == [2, 2, 3]


def test_after_all_the_curves_are_those_of_undisturbed_trainings(search: Search, finished: Ran, tmp_path: Path) -> None:
    search.set_faults()
    question = ask(search.command("--resume"))
    measured = json.loads((search.folder / "best.json").read_text())["recipe"]
    for trial, own in finished.curves.groupby("trial_id"):
        whole = fit(question.recipe(str(trial)).measured_as(measured), tmp_path / str(trial))
        expected = pd.DataFrame(whole.history).drop(columns="seconds")
        found = own.drop(columns=["trial_id", "seconds"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_thirty_trials_never_take_more_disk_than_was_said(search: Search, finished: Ran) -> None:
    folder, ended, peak = search.results / "many", threading.Event(), 0

    def taken() -> int:
        total = 0
        for place, _, names in os.walk(folder):  # what is removed meanwhile is no error of its
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += Path(place, name).stat().st_size
        return total

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            peak = max(peak, taken())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    question = (
        "--arch resnet --depth 18 --width 8 --dataset digits --limit_train 20 --batch_size 10 --max_epochs 2 "
        "--precision 32 --finalists 1 --finalist_seeds 1 --max_concurrent 2 --gpus_per_trial 0"
    )
    words = question.split()
    try:
        with captured(search.place) as said:
            status = asha.main(["--results_dir", str(search.results), "--name", "many", *search.command()[-2:], *words])
    finally:
        ended.set()
        thread.join()
    out, err = said()
    assert status == 0, err
    most = re.search(r"([\d.]+) MB of disk at most", " ".join(out.split()))
    trials = pd.read_csv(folder / "trials.csv")
    assert most and len(trials) == 30 and set(trials.status) <= {"completed", "stopped"}
    best, last = checkpoint_bytes([ask(["--resume", *search.command()[:2], "--name", "many"]).base], 10)
    assert best + last < peak <= float(most[1]) * 1e6 < 30 * (best + last)
    assert len(list(folder.rglob("*.ckpt"))) == 2, "the winner's, of its trial and of its seed"
    print(f"peak {peak}, said {most[1]} MB, at the end {taken()}, all best and last {30 * (best + last)}")
