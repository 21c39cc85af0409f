"""Ray: a cluster started or joined, and trainings run on it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cifar_lab.recipe import InputError, Recipe

# Ray reads these when it is imported: our own records replace its loggers, nothing is sent anywhere, and a cluster
# that is started here listens on 127.0.0.1 only, as it does on a Mac; to join another makes no difference.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_WARN_THRESHOLD_S", "60")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # `ending` has the handlers
# A worker runs each trial in a new thread; glibc would keep a store of memory for each of up to eight threads a core.
os.environ.setdefault("MALLOC_ARENA_MAX", "1")

import ray
import ray._private.worker
import ray.tune
import ray.tune.execution.class_cache as actors
import ray.tune.search
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cifar_lab import machine
from cifar_lab.dataset import opened
from cifar_lab.files import unwritable
from tune.scheduler import ASHA
from tune.storage import Mirror, seen, token
from tune.trial import GRADIENTS, Training

T = TypeVar("T")
PLACES = ("CIFAR_LAB_DATA", "XDG_CACHE_HOME")
LIFE_SIGN = 2.0  # seconds between two looks whether Ray lives
LOST = 45.0  # seconds for which the head may be silent: it may be restarted, but after 60 Ray ends the process itself
RETRIES = 2  # of a trial that raised or whose worker died; each goes on after its last checkpoint
NO_MEMORY = ("can't allocate memory", "ALLOC_FAILED")  # how torch and CUDA's libraries say it
MORE_MEMORY = "Fewer at once (--max_concurrent) leave more to each; a smaller batch_size needs less."


@dataclass(frozen=True)
class Job:
    """A training to run: an id, its recipe, the folder of its checkpoints.

    `patience`: seconds without a step after which it is killed and tried again; `gradients` names a file for its
    gradient histograms; `every_epoch` keeps each epoch's checkpoint, epoch-N.ckpt. `storage` is the URL of the
    checkpoints where the machines do not share the folder; they are then brought to it when the training has ended.
    """

    job_id: str
    recipe: Recipe
    folder: Path
    patience: float = 600.0
    gradients: Path | None = None
    every_epoch: bool = False
    storage: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `run_trial` gets, in primitives."""
        gradients = None if self.gradients is None else str(self.gradients)
        return vars(self) | {"recipe": self.recipe.to_dict(), "folder": str(self.folder), "gradients": gradients}

    def fetch(self) -> None:
        """Copy what the training left in its storage to its folder."""
        if self.storage is not None:
            Mirror(self.storage, self.folder).pull()
            if self.gradients is not None and (brought := self.folder / GRADIENTS).exists():
                self.gradients.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(brought, self.gradients)

    def forget(self) -> None:
        """Remove it from its storage: it has ended, and was fetched."""
        if self.storage is not None:
            Mirror(self.storage, self.folder).remove()


@dataclass(frozen=True)
class Joined:
    """A cluster in use: what each machine has, CPU and GPU among it; HOST:PORT of the dashboard, if served."""

    machines: list[dict[str, float]]
    dashboard: str


@contextlib.contextmanager
def cluster(address: str | None, afterwards: contextlib.ExitStack, *, dashboard: bool) -> Iterator[Joined]:
    """Join the cluster at `address`, or start one of this machine's processors, which ends with the block.

    Its processes take a second to end, beside what follows the block; `afterwards` waits for them.

    Raises:
        InputError: no cluster answers at that address.
    """
    options: dict[str, Any] = {
        "num_cpus": machine.cores(),
        "num_gpus": torch.cuda.device_count(),
        "include_dashboard": dashboard,
        "dashboard_host": "127.0.0.1",
        "log_to_driver": False,
        "logging_level": logging.CRITICAL,
        "configure_logging": True,
    }
    # Workers do not stand where the driver does: what names a place is made absolute for them.
    os.environ.update({name: str(Path(os.environ[name]).absolute()) for name in PLACES if os.environ.get(name)})
    if address is None:
        os.environ.update(actors.DEFAULT_ENV_VARS)  # for Ray's workers, which then do for Tune's actors
    else:
        options = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    ray._private.worker._worker_logs_enabled = False  # a dead worker is our news to tell, in a line
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
        with one_environment() if address is None else contextlib.nullcontext():
            yield Joined(
                [node["Resources"] for node in ray.nodes() if node["Alive"]],  # type: ignore[no-untyped-call]
                context.dashboard_url or "" if dashboard else "",
            )
    finally:
        node = ray._private.worker._global_node if address is None else None
        if node is not None:
            ray._private.worker._global_node = None
        ray.shutdown()  # never in a thread: a reference to one of its objects that is freed meanwhile ends the process
        if node is not None:
            end_processes(node, afterwards)


def end_processes(node: Any, afterwards: contextlib.ExitStack) -> None:
    """End the processes of the cluster that was started here; `afterwards` waits for it, whatever interrupts."""
    ended = threading.Event()

    def end() -> None:
        try:
            node.destroy_external_storage()
            node.kill_all_processes(check_alive=False, allow_graceful=True)
        finally:
            ended.set()

    def wait() -> None:
        # Not `join`: of a thread for which an interrupted one waited, Python 3.11 believes that it has ended.
        while thread.ident is not None and not ended.is_set():
            with contextlib.suppress(KeyboardInterrupt, SystemExit):  # all else has been done, and told
                ended.wait()

    thread = threading.Thread(target=end)
    afterwards.callback(wait)
    thread.start()
    if torch.cuda.is_available():  # what follows may want the memory that trials have there
        wait()


@contextlib.contextmanager
def one_environment() -> Iterator[None]:
    """Tune's actors in the driver's environment, as the workers that Ray has started: for another it starts others."""
    own, passed_on = dict(actors.DEFAULT_ENV_VARS), set(actors.ENV_VARS_TO_PROPAGATE)
    actors.DEFAULT_ENV_VARS.clear()
    actors.ENV_VARS_TO_PROPAGATE.clear()
    try:
        yield
    finally:
        actors.DEFAULT_ENV_VARS.update(own)
        actors.ENV_VARS_TO_PROPAGATE.update(passed_on)


@contextlib.contextmanager
def ending(last_words: Callable[[], str]) -> Iterator[threading.Event]:
    """While Ray runs trials Ctrl-C and SIGTERM end them in order; a second one ends at once.

    `last_words` are printed at either: who sends the first, `ray job stop` say, may kill before the end is reached.
    Yields whether one came.
    """
    signals, asked = (signal.SIGINT, signal.SIGTERM), threading.Event()

    def in_order(*_: Any) -> None:
        asked.set()
        print(f"Ending; once more ends at once. {last_words()}", file=sys.stderr, flush=True)
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
                print(last_words(), flush=True)
                os._exit(1)  # what Ray still has to do may take long, and each epoch is on disk

    before = {number: signal.signal(number, in_order) for number in signals}
    signal.signal(signal.SIGUSR1, too_early)  # Ray replaces it when it begins
    wakeup = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(told)  # which the thread reads as the end
        thread.join()
        os.close(heard)


@contextlib.contextmanager
def alive(last_words: Callable[[], str]) -> Iterator[None]:
    """End the process, after `last_words`, when Ray dies, on this machine or at the head of the cluster.

    Its calls would wait for ever, or end the process without a word.
    """
    context = ray.get_runtime_context()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    (own,) = [node for node in nodes if node["NodeID"] == context.get_node_id()]
    host, _, port = context.gcs_address.rpartition(":")
    ended = threading.Event()

    def watch() -> None:
        heard = time.monotonic()
        while not ended.wait(LIFE_SIGN):
            if silence(host, int(port)) is None:
                heard = time.monotonic()
            refused = isinstance(silence(own["NodeManagerAddress"], own["NodeManagerPort"]), ConnectionRefusedError)
            if (refused or time.monotonic() > heard + LOST) and not ended.is_set():
                print("error: Ray has died beneath the search.", file=sys.stderr, flush=True)
                print(last_words(), flush=True)
                os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def blind(place: str) -> list[str]:
    """The addresses of the cluster's machines that do not see a folder or URL which is seen from here.

    Raises:
        InputError: one cannot run this package.
    """

    def look(name: str) -> bool:
        return seen(place, name)

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    with token(place) as name:
        there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        remote: Any = ray.remote(num_cpus=0)(look)
        looks = [remote.options(scheduling_strategy=place).remote(name) for place in there]
        asked = zip(nodes, looks, strict=True)
        return [node["NodeManagerAddress"] for node, look in asked if not left(look) and not answered(look)]


def left(asked: Any) -> bool:
    """Whether the machine that was asked has left the cluster since."""
    try:
        ray.get(asked)
    except ray.exceptions.TaskUnschedulableError:
        return True
    except ray.exceptions.RayError:
        pass  # which `answered` tells
    return False


def on_a_worker(function: Callable[..., T], takes: dict[str, float], *words: Any) -> T:
    """What a function gives when it is called where a trial would run.

    Raises:
        InputError: that machine cannot run this package.
    """
    remote: Any = ray.remote(num_cpus=takes["CPU"], num_gpus=takes["GPU"])(function)
    found: T = answered(remote.remote(*words))
    return found


def answered(asked: Any) -> Any:
    """What machines of a cluster answer.

    Raises:
        InputError: one cannot run this package, or was lost.
    """
    try:
        return ray.get(asked)
    except ray.exceptions.RayError as error:
        raise InputError(
            f"address: a machine of the cluster cannot run this package ({str(error).strip().splitlines()[-1]}). "
            "Each needs the version that is here, with the same versions of Python and Ray."
        ) from error


def shipped(folder: Path) -> dict[str, Any]:
    """Decoded images for machines that lack them: what `run_jobs` takes as `images`, of a folder of the cache."""
    images = opened(folder)
    return {"name": folder.name, "held": ray.put((images.images.numpy(), images.labels.numpy(), images.classes))}


def silence(host: str, port: int) -> OSError | None:
    """Why nothing answers there; None where something listens."""
    try:
        socket.create_connection((host, port), timeout=LIFE_SIGN).close()
    except OSError as error:
        return error
    return None


class _Listener(ray.tune.Callback):
    """Tells what Ray alone knows: that a trial started, ended by itself, failed for good, or could not write.

    `lost` gets the job of a worker that died as it went from one trial to the next: of this one death Ray makes two
    failures, and gives up on a trial that it had just put back in line. It also gets the job whose worker was not
    ready for it in time, still busy with ending the one before: that one Ray gives up without a word.
    """

    def __init__(
        self,
        on_start: Callable[[str], None],
        on_end: Callable[[str, str], None],
        faults: list[Exception],
        lost: list[str],
        ended: set[str],
    ) -> None:
        self.on_start, self.on_end, self.faults, self.lost, self.ended = on_start, on_end, faults, lost, ended
        self.in_line: set[str] = set()
        self.trials: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as in ASHA: Ray's snapshot is never read

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.trials = trials  # Ray's own list, which grows

    def wrong(self) -> bool:
        """Whether to end everything: something went wrong on our side, or a job was lost."""
        given_up = [trial.config["job"]["job_id"] for trial in self.trials if trial.status == "ERROR"]
        self.lost += [job for job in given_up if job not in self.ended and job not in self.lost]
        return bool(self.faults or self.lost)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.in_line.discard(trial.config["job"]["job_id"])
        self.on_start(trial.config["job"]["job_id"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not self.faults:  # else it was ended by us, before its last epoch was recorded perhaps
            self.on_end(trial.config["job"]["job_id"], "")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.in_line.add(trial.config["job"]["job_id"])
        self.heed(last_failure(trial)[0])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        job, (error, text) = trial.config["job"]["job_id"], last_failure(trial)
        if job in self.in_line and isinstance(error, ray.exceptions.RayActorError):
            self.lost.append(job)
            return
        self.heed(error)
        if not self.faults:
            self.on_end(job, cause(error, text))

    def heed(self, error: Any) -> None:
        """Keep an error that the next try, and every other trial, would meet too."""
        if unwritable(error):
            self.faults.append(error)


class _StopAll(ray.tune.Stopper):
    """Ends all trials once `wrong` says so."""

    def __init__(self, wrong: Callable[[], bool]) -> None:
        self.wrong = wrong

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as in ASHA

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Whether to end everything."""
        return self.wrong()


def last_failure(trial: Any) -> tuple[Any, str]:
    """What a trial failed of last: the exception, None where Ray has none to give, and its text.

    They are read where the driver wrote them: of a full disk the copies among the results are empty.
    """
    error, text = None, ""
    with contextlib.suppress(Exception):  # the error's own class may not import here
        text = Path(trial.error_file).read_text().rpartition("Failure # ")[2].partition("\n")[2].strip()
        error = pickle.loads(Path(trial.pickled_error_file).read_bytes())
    return getattr(error, "cause", None) or error, text


def cause(error: Any, text: str) -> str:
    """Why a trial failed, in one line, which is the same for all trials that failed of the same."""
    kind = type(error).__name__
    if "node running low on memory" in text:
        return f"out of memory: Ray killed its process, for the machine ran low. {MORE_MEMORY}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in NO_MEMORY):
        return f"out of memory: {kind}. {MORE_MEMORY}"
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process died: killed, perhaps for want of memory, or crashed, or its machine was lost"
    said = text.rpartition("\n")[2] if error is None else f"{kind}: {' '.join(str(error).split())}"
    return said[:300]


class _Supply(ray.tune.search.Searcher):
    """Hands Ray one job after another, as they become known.

    While others train a free worker waits for the next job, which may follow from what they do; Ray keeps one such.
    """

    def __init__(self, jobs: Callable[[], Iterable[Job]], ended: set[str]) -> None:
        super().__init__(metric="val_acc", mode="max")
        self.jobs, self.ended = jobs, ended
        self.begun = set(ended)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as in ASHA

    def suggest(self, trial_id: str) -> Any:
        job = next((job for job in self.jobs() if job.job_id not in self.begun), None)
        if job is None:
            return None if self.begun - self.ended else self.FINISHED
        self.begun.add(job.job_id)
        return {"job": job.to_dict()}

    def set_search_properties(self, *words: Any, **spec: Any) -> bool:
        return True  # there is no space to search: the jobs are ours

    def on_trial_complete(self, *words: Any, **news: Any) -> None:
        """Nothing: the listener hears of it."""

    def save_to_dir(self, *words: Any, **named: Any) -> None:
        """Nothing: it is never read."""


def run_jobs(
    jobs: Callable[[], Iterable[Job]],
    *,
    judge: Callable[[str, dict[str, Any]], bool],
    on_start: Callable[[str], None],
    on_end: Callable[[str, str], None],
    takes: dict[str, float],
    concurrent: int,
    scratch: Path,
    images: dict[str, Any] | None = None,
    last_words: Callable[[], str] = str,
    named: bool = False,
) -> None:
    """Run the jobs, in order, some at a time; returns when all have ended, or when Ctrl-C ended them.

    Args:
        jobs: what to run, as far as that is known; asked again whenever there is room for another, until all that it
            gave have ended.
        judge: gets a job's id and its row after every epoch; True stops it.
        on_start: gets the id of a job that starts.
        on_end: gets the id of a job that ended, and the error if it failed for good.
        takes: CPU and GPU a job.
        concurrent: how many at once.
        scratch: Ray's own folder, in that of the whole.
        images: `held`, a reference to the decoded training set, and its `name` in a cache, where machines may lack it.
        last_words: printed when Ctrl-C or SIGTERM comes.
        named: a process of its own for each job, which Ray's dashboard can call by the job's id; it costs a job the
            seconds in which torch and Lightning are imported.
    """
    faults: list[Exception] = []
    ended: set[str] = set()

    def guarded(hook: Callable[..., Any], *words: Any) -> Any:
        """Call a hook; Ray would take its error, a full disk say, for the trial's: it is kept, and ends everything."""
        try:
            return hook(*words)
        except Exception as error:
            faults.append(error)
            return True

    def end(job_id: str, error: str) -> None:
        ended.add(job_id)
        on_end(job_id, error)

    with ending(last_words) as asked:
        while any(job.job_id not in ended for job in jobs()):
            lost: list[str] = []
            started, over = functools.partial(guarded, on_start), functools.partial(guarded, end)
            listener = _Listener(started, over, faults, lost, ended)
            tuner = ray.tune.Tuner(
                Training,
                param_space={
                    "takes": takes,
                    "images": images,
                    "search": scratch.parent.name,
                    "alone": named,
                },
                tune_config=ray.tune.TuneConfig(
                    metric="val_acc",
                    mode="max",
                    num_samples=-1,  # until the supply is at its end
                    search_alg=_Supply(jobs, ended),
                    scheduler=ASHA(functools.partial(guarded, judge)),
                    max_concurrent_trials=concurrent,
                    reuse_actors=not named,
                    trial_name_creator=lambda trial: str(trial.config["job"]["job_id"]),
                    trial_dirname_creator=lambda trial: str(trial.config["job"]["job_id"]),
                ),
                run_config=ray.tune.RunConfig(
                    name=f"attempt-{len(list(scratch.glob('attempt-*'))) + 1}",
                    storage_path=str(scratch),
                    verbose=0,
                    failure_config=ray.tune.FailureConfig(max_failures=RETRIES),
                    callbacks=[listener],
                    stop=_StopAll(listener.wrong),
                ),
            )
            tuner.fit()
            if faults:
                raise faults[0]
            if asked.is_set() or not lost:
                break
    if asked.is_set():
        raise KeyboardInterrupt
