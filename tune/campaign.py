"""A campaign: many trainings of one question under way on Ray, recorded, shown, able to go on after any end."""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from cifar_lab import cli, fit, machine
from cifar_lab.evaluate import check_test_set
from cifar_lab.files import size, write_json
from cifar_lab.fit import Row, finite
from cifar_lab.recipe import InputError, Recipe
from tune import resources
from tune.cluster import Job, alive, cluster, run_jobs
from tune.experiment import Experiment, Trial, locked
from tune.heartbeat import HUNG
from tune.plan import checkpoint_bytes, seconds_per_image
from tune.question import Question, question_file
from tune.view import View

Q = TypeVar("Q", bound=Question)


class Campaign(Generic[Q]):
    """Trainings under way: their question, their record, their view."""

    WHAT: ClassVar[str]  # a search, a grid: what it is called when it speaks

    def __init__(self, question: Q) -> None:
        self.question, self.folder = question, question.folder
        self.faults: list[str] = []

    # What each kind has of its own

    def work(self) -> None:
        """Train what is left to be trained."""
        raise NotImplementedError

    def trained(self) -> bool:
        """Whether nothing is left to be trained."""
        raise NotImplementedError

    def finished(self) -> bool:
        """Whether nothing is left to do."""
        raise NotImplementedError

    def settle(self) -> None:
        """Draw the conclusion, once all is trained."""
        raise NotImplementedError

    def report(self) -> None:
        """Write the page."""
        raise NotImplementedError

    def plan(self) -> str:
        """What is about to happen, with the time and the disk it should take."""
        raise NotImplementedError

    def result(self) -> str:
        """What was found, in a paragraph."""
        raise NotImplementedError

    def recipes(self) -> list[Recipe]:
        """The sizes of network that will be trained, a recipe each."""
        raise NotImplementedError

    def checkpoints_kept(self) -> int:
        """How many best checkpoints stay."""
        raise NotImplementedError

    def seconds_left(self) -> float:
        """Time until the end, from the epochs that were timed so far, or from the first measurement."""
        raise NotImplementedError

    # What they share

    def run(self) -> int:
        """Train, conclude, report; returns the exit status."""
        if self.question.earlier is not None:
            self.open_record()
            if self.finished():
                self.say(f"This {self.WHAT} is finished; nothing was changed. {self.result()}")
                return cli.DONE
        self.prepare()
        with locked(self.folder):
            self.open_record()
            try:
                options, served = self.question.options, self.question.dashboard
                with cluster(options.address, dashboard=served) as joined, alive(self.last_words()):
                    self.use(joined.resources)
                    write_json(question_file(self.folder), self.question.to_dict())
                    self.experiment.reopen()
                    self.say(self.plan())
                    if joined.dashboard:
                        ray = os.path.relpath(Path(sys.executable).with_name("ray"))
                        self.say(f"Dashboard: http://{joined.dashboard} (its token: {ray} get-auth-token)")
                    self.work()
                if self.trained():
                    self.settle()
            except KeyboardInterrupt:
                self.faults.append("interrupted")
            except (OSError, InputError) as error:
                if not (self.folder / "trials.csv").exists():
                    shutil.rmtree(self.folder)  # nothing was begun: the name stays free
                    raise InputError(str(error)) from error
                self.faults.append(str(error))
            return self.conclude()

    def open_record(self) -> None:
        """Read what is known of the trials."""
        self.experiment = Experiment(self.folder, self.question.configurations())

    def prepare(self) -> None:
        """See that images, folder and processors allow it, then settle its precision.

        Raises:
            InputError: they do not.
        """
        base, earlier, options = self.question.base, self.question.earlier, self.question.options
        self.data = fit.prepare(base)
        check_test_set(base, self.data.classes)
        # Of a cluster that is still to be joined this is a guess, to be mended when it is.
        asked = {"CPU": float(options.cpus_per_trial), "GPU": options.gpus_per_trial or 0.0}
        self.use(resources.here() if options.address is None else asked)
        self.claim()
        if earlier is None:
            base = machine.resolve_precision(base)
        else:
            base = base.replace(precision=earlier["recipe"]["precision"])
        self.question = dataclasses.replace(self.question, base=base)

    def claim(self) -> None:
        """Make the folder; see that it can be written, and that the disk holds what is to come."""
        place, needed = self.question.options.results_dir, self.bytes_needed()
        existed = self.folder.exists()
        cli.make_folder(question_file(self.folder).parent, place)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            if not existed:
                shutil.rmtree(self.folder)
            raise InputError(
                f"results_dir: {place!r} has {size(free)} free, and this {self.WHAT} needs about {size(needed)}. "
                "Free some, name another disk, or take fewer finalists."
            )

    def use(self, there: dict[str, float]) -> None:
        """Settle how many trials run at once, on what."""
        self.takes = resources.per_trial(self.question.options, there)
        self.concurrent = resources.at_once(self.question.options, there)

    def bytes_needed(self) -> int:
        """Disk: a running trial's best, last and previous checkpoint, with the ones being written; those that stay."""
        best, last = checkpoint_bytes(self.recipes(), len(self.data.classes))
        return self.concurrent * (2 * best + 3 * last) + self.checkpoints_kept() * best

    def epoch_estimate(self, images: int) -> float:
        """Seconds an epoch of that many images, before any was timed."""
        return images * seconds_per_image(self.recipes(), max(1, self.question.options.cpus_per_trial))

    def epoch_timed(self, estimate: float) -> float:
        """Seconds an epoch, from those that were timed, or the estimate."""
        timed = [row["seconds"] for t in self.experiment.trials.values() for row in t.rows[-3:]]
        return statistics.mean(timed) if timed else estimate

    def view(self, title: str, rungs: Sequence[int] = ()) -> View:
        """The live view."""
        return View(
            self.experiment, self.seconds_left, rungs, self.question.base.max_epochs, self.question.quiet, title
        )

    def run_jobs(
        self, jobs: list[Job], judge: Callable[[str, Row], bool], on_end: Callable[[str, str], None], view: View
    ) -> None:
        """Run jobs with this campaign's resources, showing them."""
        with view:
            run_jobs(
                jobs,
                judge=judge,
                on_start=view.started,
                on_end=on_end,
                takes=self.takes,
                concurrent=self.concurrent,
                scratch=self.folder / "ray",
                last_words=self.last_words(),
                named=self.question.dashboard,
            )

    def job(self, job_id: str, recipe: Recipe) -> Job:
        """A training; a worker may stand elsewhere, so its places are absolute."""
        if recipe.data_dir is not None:
            recipe = recipe.replace(data_dir=str(Path(recipe.data_dir).absolute()))
        return Job(job_id, recipe, self.experiment.checkpoints(job_id), self.question.options.hang_timeout)

    def run_trials(
        self, trial_ids: Sequence[str], view: View, decide: Callable[[str, Row], str], tidy: Callable[[], None]
    ) -> None:
        """Run trials, recording each epoch; `decide` gives the reason for which one stops, or an empty text."""
        experiment = self.experiment

        def judge(trial_id: str, row: Row) -> bool:
            view.heard(trial_id, row)
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

        def on_end(trial_id: str, error: str) -> None:
            trial = experiment.trials[trial_id]
            if error:
                experiment.conclude(trial_id, "failed", self.explained(trial_id, error))
            elif trial.status == "pending" and trial.rows and (ending := self.ending(trial)):
                experiment.conclude(trial_id, "completed", ending)
            tidy()
            view.ended(trial_id, f"{trial.status} {trial.reason}".rstrip())

        jobs = [self.job(trial_id, self.question.recipe(trial_id)) for trial_id in trial_ids]
        if jobs:
            self.run_jobs(jobs, judge, on_end, view)

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
            self.faults.append(f"the report could not be written: {error}")
        for reason, count in Counter(failed).most_common():
            print(cli.paragraph(f"{count} of {len(self.experiment.trials)} trials failed: {reason}"), file=sys.stderr)
        for fault in self.faults:
            print(cli.paragraph(f"error: {fault}"), file=sys.stderr)
        self.say(self.result(), always=True)
        if self.finished():
            return cli.DONE
        print(self.last_words())
        return cli.FAILED

    def last_words(self) -> str:
        """What is printed last where not all is done."""
        return f"Not all is done; what was reached is kept. To go on:\n{self.question.resume_command}"

    def state(self) -> str:
        """How many trials are in which state, and the best so far."""
        counts = Counter(t.status for t in self.experiment.trials.values())
        leaders = self.experiment.leaders(1)
        best = leaders[0].best if leaders else None
        reached = f" Best so far: {leaders[0].trial_id}, val_acc {best['val_acc']:.4f}." if best else ""
        return f"No winner yet: {', '.join(f'{n} {status}' for status, n in counts.items())}.{reached}"

    def place(self) -> str:
        """Where its files lie, from here."""
        return os.path.relpath(self.folder)

    def say(self, text: str, *, always: bool = False) -> None:
        """Print a paragraph, unless --quiet."""
        if always or not self.question.quiet:
            print(cli.paragraph(text), flush=True)
