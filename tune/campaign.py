"""A campaign: many trainings of one question under way on Ray, recorded, shown, able to go on after any end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import os
import shutil
import statistics
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from cifar_lab import cli, machine
from cifar_lab.board import Board
from cifar_lab.checkpoint import Row, finite
from cifar_lab.dataset import decoded
from cifar_lab.evaluate import check_test_set
from cifar_lab.files import HUNG, size, unwritable, write_json
from cifar_lab.prepare import prepare, shortage
from cifar_lab.recipe import InputError, Recipe
from tune import resources, storage
from tune.cluster import Job, alive, blind, cluster, on_a_worker, run_jobs, shipped
from tune.experiment import Experiment, Trial, locked
from tune.plan import checkpoint_bytes, record_bytes, seconds_per_image
from tune.question import Question, question_file, unbegun
from tune.view import View

Q = TypeVar("Q", bound=Question)


@dataclasses.dataclass(frozen=True)
class Task:
    """A job, and who hears of it: `judge` gets a row, True stops it; `on_end` gets its error, and says how it ended."""

    job: Job
    judge: Callable[[Row], bool]
    on_end: Callable[[str], str]


class Campaign(ABC, Generic[Q]):
    """Trainings under way: their question, their record, their view."""

    WHAT: ClassVar[str]  # a search, a grid: what it is called when it speaks
    AFTERWARDS: ClassVar[tuple[str, ...]]  # modules that are wanted when all is trained
    before: list[dict[str, Any]] | None = None  # the answers of a study's variants before it, which --json lists

    def __init__(self, question: Q) -> None:
        self.question, self.folder = question, question.folder
        self.faults: list[str] = []
        self.gpu_share = 0.0  # of a GPU's memory, the most that a trial held
        self.images: dict[str, Any] | None = None  # for machines that lack them

    # What each kind has of its own

    def take_up(self) -> None:
        """Decide what an earlier driver left undecided."""

    @abstractmethod
    def work(self) -> None:
        """Train what is left to be trained."""

    @abstractmethod
    def trained(self) -> bool:
        """Whether nothing is left to be trained."""

    @abstractmethod
    def finished(self) -> bool:
        """Whether nothing is left to do."""

    @abstractmethod
    def settle(self) -> None:
        """Draw the conclusion, once all is trained."""

    @abstractmethod
    def report(self) -> None:
        """Write the page."""

    @abstractmethod
    def plan(self) -> str:
        """What is about to happen, with the time and the disk it should take."""

    @abstractmethod
    def result(self) -> str:
        """What was found, in a paragraph."""

    @abstractmethod
    def recipes(self) -> list[Recipe]:
        """The sizes of network that will be trained, a recipe each."""

    @abstractmethod
    def checkpoints_kept(self) -> int:
        """How many best checkpoints stay."""

    @abstractmethod
    def seconds_left(self) -> float:
        """Time until the end, from the epochs that were timed so far, or from the first measurement."""

    # What they share

    def run(self) -> int:
        """Train, conclude, report; returns the exit status."""
        if self.question.earlier is not None:
            self.open_record()
            if self.finished():
                self.say(f"This {self.WHAT} is finished; nothing was changed. {self.result()}")
                return cli.DONE
        self.prepare()
        with locked(self.folder), contextlib.ExitStack() as afterwards:
            if self.question.earlier is None and not unbegun(self.folder):
                cli.check_new(self.folder)  # another was quicker
            self.open_record()
            self.experiment.check_states()
            possible = False
            try:
                options, served = self.question.options, self.question.dashboard
                with cluster(options.address, afterwards, dashboard=served) as joined, alive(self.last_words):
                    self.use(joined.machines)
                    self.check_disk()
                    if options.address is not None:
                        self.join()
                    possible = True
                    write_json(question_file(self.folder), self.question.to_dict())
                    self.take_up()
                    self.experiment.reopen()
                    self.say(self.plan())
                    recipes = map(self.question.recipe, self.experiment.trials)
                    notes = [shortage(recipe, len(self.data.train_indices)) for recipe in recipes]
                    if all(notes):
                        self.say(notes[0])
                    if joined.dashboard:
                        ray = os.path.relpath(Path(sys.executable).with_name("ray"))
                        self.say(f"Dashboard: http://{joined.dashboard} (its token: {ray} get-auth-token)")
                    self.work()
                if self.trained():
                    self.settle()
            except (KeyboardInterrupt, SystemExit):  # Lightning makes the latter of a Ctrl-C while it evaluates
                if unbegun(self.folder):
                    print(f"Interrupted before anything was begun. To begin again:\n{self.question.command}")
                    return cli.FAILED
                self.faults.append("interrupted")
            except (OSError, InputError) as error:
                if self.question.earlier is None and not (self.folder / "trials.csv").exists():
                    shutil.rmtree(self.folder)  # nothing was begun: the name stays free
                    raise InputError(self.told(error)) from error
                if isinstance(error, InputError) and not possible:
                    raise
                self.faults.append(self.told(error))
            try:
                return self.conclude()
            except (KeyboardInterrupt, SystemExit):
                print(self.last_words(), flush=True)
                return cli.FAILED

    def open_record(self) -> None:
        """Read what is known of the trials."""
        self.experiment = Experiment(self.folder, self.question.configurations())

    def prepare(self) -> None:
        """See that images, folder and processors allow it, then settle its precision and memory format.

        Raises:
            InputError: they do not.
        """
        base, earlier, options = self.question.base, self.question.earlier, self.question.options
        self.data = prepare(base)
        check_test_set(base, self.data.classes)
        # Of a cluster that is still to be joined this is a guess, to be mended when it is.
        asked = {"CPU": float(options.cpus_per_trial), "GPU": math.ceil(options.gpus_per_trial or 0)}
        self.use(resources.here() if options.address is None else [asked])
        if options.storage is not None:
            storage.checked(options.storage)
        if options.address is None:
            machine.check_compile(self.recipes())
        self.claim()
        if earlier is not None:
            self.settle_base(base.measured_as(earlier["recipe"]))
        elif options.address is None:
            self.settle_base(machine.measured(base))

    def settle_base(self, base: Recipe) -> None:
        """Take the base with its precision and memory format, once these are measured."""
        self.question = dataclasses.replace(self.question, base=base)

    def join(self) -> None:
        """Make a joined cluster fit to train: its machines get the images, and must see where checkpoints go.

        Raises:
            InputError: some do not.
        """
        options, base = self.question.options, self.question.base
        where = options.storage or str(self.folder)
        if unseeing := blind(where):
            raise InputError(
                f"{'storage' if options.storage else 'results_dir'}: {where!r} is not seen from {', '.join(unseeing)}. "
                "Name a --storage, a URL of fsspec's that all machines of the cluster reach, s3://bucket/folder say, "
                "or a --results_dir on a disk that they share."
            )
        machine.check_compile(self.recipes(), lambda: on_a_worker(machine.compile_fault, self.takes))
        self.images = shipped(decoded(base, "train"))
        if self.question.earlier is None:
            self.settle_base(on_a_worker(machine.measured, self.takes, base))

    def claim(self) -> None:
        """Make the folder; see that it can be written, and that the disk holds what is to come."""
        existed = self.folder.exists()
        cli.make_folder(question_file(self.folder).parent, self.question.options.results_dir)
        try:
            self.check_disk()
        except InputError:
            if not existed:
                shutil.rmtree(self.folder)
            raise

    def check_disk(self) -> None:
        """See that the disk holds what is to come, with so many trials at once.

        Raises:
            InputError: it does not.
        """
        there = sum(place.stat().st_size for place in self.folder.glob("checkpoints/*/*"))
        needed, free = self.bytes_needed() - there, shutil.disk_usage(self.folder).free
        if free < needed:
            others = "" if self.question.earlier else ", name another disk, or take fewer finalists"
            raise InputError(
                f"results_dir: {self.question.options.results_dir!r} has {size(free)} free, and this {self.WHAT} needs "
                f"about {size(needed)}. Free some{others}."
            )

    def use(self, machines: Sequence[Mapping[str, float]]) -> None:
        """Settle how many trials run at once, on what."""
        self.takes = resources.per_trial(self.question.options, machines)
        self.concurrent = resources.at_once(self.question.options, machines)

    def bytes_needed(self) -> int:
        """Disk: a running trial's best, last and previous checkpoint, with the ones being written; all that stays."""
        best, last = checkpoint_bytes(self.recipes(), len(self.data.classes))
        record = record_bytes(len(self.question.configurations()), self.question.base.max_epochs)
        return self.concurrent * (2 * best + 3 * last) + self.checkpoints_kept() * best + record

    def epoch_seconds(self) -> float:
        """Seconds an epoch: of those that were timed, else as measured before the first."""
        timed = [row["seconds"] for t in self.experiment.trials.values() for row in t.rows[-3:]]
        return statistics.mean(timed) if timed else self.estimate

    @functools.cached_property
    def estimate(self) -> float:
        """Seconds an epoch, from a few small batches."""
        options = self.question.options
        words = self.recipes(), max(1, options.cpus_per_trial)
        if options.address is None:
            return len(self.data.train_indices) * seconds_per_image(*words)
        return len(self.data.train_indices) * on_a_worker(seconds_per_image, self.takes, *words)

    def view(self, progress: Callable[[], str], rungs: Sequence[int] = ()) -> View:
        """The live view, which begins with what `progress` says."""
        longest, quiet = self.question.base.max_epochs, self.question.quiet
        return View(self.experiment, progress, self.seconds_left, rungs, longest, quiet)

    def run_tasks(self, tasks: Callable[[], Iterable[Task]], view: View) -> None:
        """Run what `tasks` gives, asked again whenever there is room for another, with this campaign's resources."""
        name, place = self.folder.name, self.folder / "tensorboard"
        importing = threading.Thread(target=self.import_afterwards)
        known: dict[str, Task] = {}
        boards: dict[str, Board] = {}

        def jobs() -> Iterator[Job]:
            for task in tasks():
                job = task.job
                if job.job_id not in known:
                    known[job.job_id] = task
                    boards[job.job_id] = Board(place / job.job_id, job.recipe, f"{name}/{job.job_id}")
                yield job

        def judge(job_id: str, row: Row) -> bool:
            if importing.ident is None:
                importing.start()
            view.heard(job_id, row)
            stop = known[job_id].judge(row)
            # As curves.csv has it: an epoch that had to be trained again keeps its first row.
            trial = self.experiment.trials.get(job_id)
            rows = [own for own in trial.rows if own["epoch"] == row["epoch"]] if trial else [row]
            boards[job_id].add(rows[0])
            return stop

        def on_end(job_id: str, error: str) -> None:
            view.ended(job_id, known[job_id].on_end(error))

        if not any(jobs()):
            return
        with view:
            run_jobs(
                jobs,
                judge=judge,
                on_start=view.started,
                on_end=on_end,
                takes=self.takes,
                concurrent=self.concurrent,
                scratch=self.folder / "ray",
                images=self.images,
                last_words=self.last_words,
                named=self.question.dashboard,
            )

    def import_afterwards(self) -> None:
        """Import, beside the trainings, what comes after them: it takes seconds."""
        with contextlib.suppress(Exception):  # raised again where it is wanted
            for module in self.AFTERWARDS:
                importlib.import_module(module)

    def job(self, job_id: str, recipe: Recipe) -> Job:
        """A training; a worker may stand elsewhere, so its places are absolute."""
        if recipe.data_dir is not None:
            recipe = recipe.replace(data_dir=str(Path(recipe.data_dir).absolute()))
        options, folder = self.question.options, self.experiment.checkpoints(job_id)
        url = options.storage and f"{options.storage}/{self.folder.name}/{job_id}"
        return Job(job_id, recipe, folder, options.hang_timeout, storage=url)

    def trial_tasks(
        self, trial_ids: Sequence[str], decide: Callable[[str, Row], str], tidy: Callable[[], None]
    ) -> list[Task]:
        """Trials to run, recording each epoch; `decide` gives the reason for which one stops, or an empty text."""
        experiment = self.experiment
        jobs = {trial_id: self.job(trial_id, self.question.recipe(trial_id)) for trial_id in experiment.trials}

        def bring(trial: Trial) -> None:
            if trial.ended:
                jobs[trial.trial_id].fetch()
                jobs[trial.trial_id].forget()

        for trial in experiment.trials.values():
            bring(trial)  # an earlier driver may have died before it did
        tidy()

        def judge(trial_id: str, row: Row) -> bool:
            self.gpu_share = max(self.gpu_share, row["gpu_share"])
            experiment.record(trial_id, row)
            if not finite(row):
                reason = f"epoch {row['epoch']:.0f}: train_loss {row['train_loss']:.4g}, val_loss {row['val_loss']:.4g}"
                experiment.conclude(trial_id, "diverged", reason)
                return False  # it ends by itself
            if reason := decide(trial_id, row):
                experiment.conclude(trial_id, "stopped", reason)
                return True
            experiment.save_trials()
            return False

        def on_end(trial_id: str, error: str) -> str:
            trial = experiment.trials[trial_id]
            if error:
                experiment.conclude(trial_id, "failed", self.explained(trial_id, error))
            elif trial.status == "pending" and trial.rows and (ending := self.ending(trial)):
                experiment.conclude(trial_id, "completed", ending)
            bring(trial)
            tidy()
            return f"{trial.status} {trial.reason}".rstrip()

        return [Task(jobs[name], functools.partial(judge, name), functools.partial(on_end, name)) for name in trial_ids]

    def explained(self, job_id: str, error: str) -> str:
        """Ray's error of a training that failed for good; where it hung, that is the cause."""
        note = self.experiment.checkpoints(job_id) / HUNG
        return f"hung: {note.read_text()} (--hang_timeout)" if note.exists() else error

    def ending(self, trial: Trial) -> str:
        """Why a trial that was not stopped came to its end; empty if it did not."""
        recipe = self.question.recipe(trial.trial_id)
        epochs, patience = len(trial.rows), recipe.early_stop_patience
        if epochs >= recipe.max_epochs:
            return "all epochs"
        best = trial.best
        if patience is not None and best is not None and epochs - best["epoch"] >= patience:
            return f"no better val_acc for {patience} epochs"
        return ""

    def conclude(self) -> int:
        """Write the report, say what came out and how to go on; returns the exit status."""
        failed = [t.reason for t in self.experiment.trials.values() if t.status == "failed"]
        try:
            if any(t.rows for t in self.experiment.trials.values()):
                self.report()
        except OSError as error:
            if not self.faults:  # else it is the same once more
                self.faults.append(f"the report could not be written: {self.told(error)}")
        for reason, count in Counter(failed).most_common():
            print(cli.paragraph(f"{count} of {len(self.experiment.trials)} trials failed: {reason}"), file=sys.stderr)
        if failed:
            print(cli.paragraph(f"Tracebacks: {self.place()}/ray/attempt-*/*/error.txt"), file=sys.stderr)
        for fault in self.faults:
            print(cli.paragraph(f"error: {fault}"), file=sys.stderr)
        done = self.finished()
        if self.trained() and (advice := resources.advice(self.takes["GPU"], self.gpu_share)):
            self.say(advice)
        if not self.question.json:
            self.say(self.result(), always=True)
            if not done:
                print(self.last_words())
        return cli.DONE if done else cli.FAILED

    def last_words(self) -> str:
        """What is printed last where not all is done."""
        if self.question.json:
            return cli.as_json(self.answer() if self.before is None else [*self.before, self.answer()])
        return f"{self.outlook()}\n{self.question.resume_command}"

    def outlook(self) -> str:
        """What the command that goes on would do."""
        return "Not all is done; what was reached is kept. To go on:"

    def answer(self) -> dict[str, Any]:
        """What --json prints of it."""
        counts = Counter[str](trial.status for trial in self.experiment.trials.values())
        return cli.answer(self.folder, counts, None if self.finished() else self.question.resume_command)

    def state(self) -> str:
        """How many trials are in which state, and the best so far."""
        counts = Counter(t.status for t in self.experiment.trials.values())
        leaders = self.experiment.leaders(1)
        best = leaders[0].best if leaders else None
        reached = f" Best so far: {leaders[0].trial_id}, val_acc {best['val_acc']:.4f}." if best else ""
        return f"No winner yet: {', '.join(f'{n} {status}' for status, n in counts.items())}.{reached}"

    def told(self, error: Exception) -> str:
        """An error in words."""
        if not unwritable(error):
            return str(error)
        assert isinstance(error, OSError)
        where = error.filename2 or error.filename or self.place()
        return f"{where} cannot be written ({error.strerror}). Mend that, then go on."

    def place(self) -> str:
        """Where its files lie, from here if they lie below."""
        return os.path.relpath(self.folder) if self.folder.is_relative_to(Path.cwd()) else str(self.folder)

    def say(self, text: str, *, always: bool = False) -> None:
        """Print a paragraph, unless --quiet."""
        if always or not self.question.quiet:
            print(cli.paragraph(text), flush=True)
