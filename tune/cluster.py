"""Ray: a cluster started or joined, and trainings run on it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_lab.recipe import InputError, Recipe

# Ray reads these when it is imported: our own records replace its loggers, nothing is sent anywhere, and a cluster
# that is started here listens on 127.0.0.1 only, as it does on a Mac; to join another makes no difference.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_WARN_THRESHOLD_S", "60")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # `ending` has the handlers

import psutil
import ray
import ray.tune
import torch

from cifar_lab import machine
from tune.scheduler import ASHA
from tune.trial import Training

PLACES = ("CIFAR_LAB_DATA", "XDG_CACHE_HOME")
LIFE_SIGN = 5.0  # seconds between two looks whether Ray lives
RETRIES = 2  # of a trial that raised or whose worker died; each goes on after its last checkpoint


@dataclass(frozen=True)
class Job:
    """A training to run: an id, its recipe, the folder of its checkpoints.

    `patience`: seconds without a step after which it is killed and tried again; `gradients` names a file for its
    gradient histograms; `every_epoch` keeps each epoch's checkpoint, epoch-N.ckpt.
    """

    job_id: str
    recipe: Recipe
    folder: Path
    patience: float = 600.0
    gradients: Path | None = None
    every_epoch: bool = False

    def to_dict(self) -> dict[str, Any]:
        """What `run_trial` gets, in primitives."""
        gradients = None if self.gradients is None else str(self.gradients)
        return vars(self) | {"recipe": self.recipe.to_dict(), "folder": str(self.folder), "gradients": gradients}


@dataclass(frozen=True)
class Joined:
    """A cluster in use: its resources, CPU and GPU among them, and HOST:PORT of its dashboard, if that is served."""

    resources: dict[str, float]
    dashboard: str


@contextlib.contextmanager
def cluster(address: str | None, *, dashboard: bool) -> Iterator[Joined]:
    """Join the cluster at `address`, or start one of this machine's processors, which ends with the block.

    Raises:
        InputError: no cluster answers at that address.
    """
    options: dict[str, Any] = {
        "num_cpus": machine.cores(),
        "num_gpus": torch.cuda.device_count(),
        "include_dashboard": dashboard,
        "dashboard_host": "127.0.0.1",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    # Workers do not stand where the driver does: what names a place is made absolute for them.
    places = {name: str(Path(os.environ[name]).absolute()) for name in PLACES if os.environ.get(name)}
    os.environ.update(places)
    if address is not None:
        options = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": {"env_vars": places}}
    try:
        context = ray.init(address=address or "local", **options)
    except Exception as error:  # Ray's own kinds of error are many, and not documented
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if address is None:
            ray.shutdown()
            raise OSError(f"Ray could not be started on this machine ({reason})") from error
        raise InputError(
            f"address: no Ray cluster answers at {address!r} ({reason}). Legal: HOST:PORT, or auto; one that asks "
            "for a token wants RAY_AUTH_MODE=token in the environment."
        ) from error
    try:
        yield Joined(
            ray.cluster_resources(),  # type: ignore[no-untyped-call]
            context.dashboard_url or "" if dashboard else "",
        )
    finally:
        ray.shutdown()


@contextlib.contextmanager
def ending(last_words: str) -> Iterator[None]:
    """While Ray runs trials Ctrl-C and SIGTERM end them in order; a second one prints `last_words` and ends at once."""
    signals = (signal.SIGINT, signal.SIGTERM)

    def in_order(*_: Any) -> None:
        print("Ending; once more ends at once.", flush=True)
        os.kill(os.getpid(), signal.SIGUSR1)  # which Ray takes for its own word to stop

    def too_early(*_: Any) -> None:
        raise KeyboardInterrupt

    heard, told = os.pipe()
    os.set_blocking(told, False)

    def count() -> None:
        """End the process with the second signal, though the main thread may be deep in a call of Ray's."""
        received = 0
        while number := os.read(heard, 1):
            received += number[0] in signals
            if received > 1:
                print(last_words, flush=True)
                os._exit(1)  # what Ray still has to do may take long, and each epoch is on disk

    before = {number: signal.signal(number, in_order) for number in signals}
    signal.signal(signal.SIGUSR1, too_early)  # Ray replaces it when it begins
    wakeup = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(told)  # which the thread reads as the end
        thread.join()
        os.close(heard)


@contextlib.contextmanager
def alive(last_words: str) -> Iterator[None]:
    """End the process, after `last_words`, when the Ray that it started dies: its calls would wait for ever."""
    own = [child for child in psutil.Process().children() if child.name() in ("raylet", "gcs_server")]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LIFE_SIGN):
            dead = [process for process in own if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE]
            if dead and not ended.is_set():
                print("error: Ray has died beneath the search.", file=sys.stderr, flush=True)
                print(last_words, flush=True)
                os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Listener(ray.tune.Callback):
    """Tells what Ray alone knows: that a trial started, ended by itself, or failed for good."""

    def __init__(self, on_start: Callable[[str], None], on_end: Callable[[str, str], None]) -> None:
        self.on_start, self.on_end = on_start, on_end

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as in ASHA: Ray's snapshot is never read

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_start(trial.config["job"]["job_id"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_end(trial.config["job"]["job_id"], "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_end(trial.config["job"]["job_id"], cause(trial))


class _StopAll(ray.tune.Stopper):
    """Ends all trials once something went wrong on our side."""

    def __init__(self, faults: list[Exception]) -> None:
        self.faults = faults

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as in ASHA

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Whether to end everything."""
        return bool(self.faults)


def cause(trial: Any) -> str:
    """Why a trial failed, in one line."""
    try:
        error = trial.get_pickled_error() or trial.get_error()
    except Exception as unreadable:  # the error's own class may not import here
        error = unreadable
    error = getattr(error, "cause", None) or error
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def run_jobs(
    jobs: Sequence[Job],
    *,
    judge: Callable[[str, dict[str, Any]], bool],
    on_start: Callable[[str], None],
    on_end: Callable[[str, str], None],
    takes: dict[str, float],
    concurrent: int,
    scratch: Path,
    last_words: str = "",
    named: bool = False,
) -> None:
    """Run the jobs, in order, some at a time; returns when all have ended, or when Ctrl-C ended them.

    Args:
        jobs: what to run.
        judge: gets a job's id and its row after every epoch; True stops it.
        on_start: gets the id of a job that starts.
        on_end: gets the id of a job that ended, and the error if it failed for good.
        takes: CPU and GPU a job.
        concurrent: how many at once.
        scratch: Ray's own folder, in that of the whole.
        last_words: printed where a second Ctrl-C ends the process at once.
        named: a process of its own for each job, which Ray's dashboard can call by the job's id; it costs a job the
            seconds in which torch and Lightning are imported.
    """
    faults: list[Exception] = []

    def guarded(hook: Callable[..., Any], *words: Any) -> Any:
        """Call a hook; Ray would take its error, a full disk say, for the trial's: it is kept, and ends everything."""
        try:
            return hook(*words)
        except Exception as error:
            faults.append(error)
            return True

    configs = [job.to_dict() for job in jobs]
    attempt = len(list(scratch.glob("attempt-*"))) + 1
    tuner = ray.tune.Tuner(
        Training,
        param_space={
            "job": ray.tune.grid_search(configs),
            "takes": takes,
            "search": scratch.parent.name,
            "alone": named,
        },
        tune_config=ray.tune.TuneConfig(
            metric="val_acc",
            mode="max",
            scheduler=ASHA(functools.partial(guarded, judge)),
            max_concurrent_trials=concurrent,
            reuse_actors=not named,
            trial_name_creator=lambda trial: str(trial.config["job"]["job_id"]),
            trial_dirname_creator=lambda trial: str(trial.config["job"]["job_id"]),
        ),
        run_config=ray.tune.RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(scratch),
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=RETRIES),
            callbacks=[_Listener(functools.partial(guarded, on_start), functools.partial(guarded, on_end))],
            stop=_StopAll(faults),
        ),
    )
    with ending(last_words):
        tuner.fit()
    if faults:
        raise faults[0]
