"""A search under way: trials, finalists, test, report."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from cifar_lab import cli, machine
from cifar_lab.data import CIFAR10DataModule
from cifar_lab.evaluate import check_test_set, evaluate, record_of_test
from cifar_lab.files import write_json
from cifar_lab.fit import Row, best_record, ended_run, finite
from cifar_lab.recipe import InputError, Recipe
from cifar_lab.report import headline
from tune import resources
from tune.cluster import Job, cluster, run_jobs
from tune.experiment import Experiment, Trial, locked
from tune.plan import checkpoint_bytes, expected_epochs, seconds_per_image, sizes
from tune.question import Question, question_file
from tune.report import write_report
from tune.scheduler import Rungs
from tune.view import View, duration, settings, size

SEED_STEP = 1000  # a finalist's seeds are the search's seed plus multiples of this: new ones


class Search:
    """A search under way: its question, its record, its view."""

    def __init__(self, question: Question) -> None:
        self.question, self.options, self.folder = question, question.options, question.folder
        self.rungs = Rungs(self.options.grace_period, question.base.max_epochs, self.options.reduction_factor)
        self.finalist_epochs: dict[str, int] = {}
        self.faults: list[str] = []

    def run(self) -> int:
        """Search, train the finalists, test the winner, report; returns the exit status."""
        if self.question.earlier is not None and self.open_record().finished(self.options.finalists, self.seeds()):
            self.say(f"This search is finished; nothing was changed. {self.result()}")
            return cli.DONE
        self.prepare()
        with locked(self.folder):
            self.open_record()
            try:
                with cluster(self.options.address, dashboard=self.question.dashboard) as joined:
                    self.use(joined.resources)
                    write_json(question_file(self.folder), self.question.to_dict())
                    self.experiment.reopen()
                    self.say(self.plan())
                    if joined.dashboard:
                        self.say(f"Dashboard: http://{joined.dashboard} (to sign in: ray get-auth-token)")
                    self.train()
                if self.experiment.trained(self.options.finalists, self.seeds()):
                    self.test()
            except KeyboardInterrupt:
                self.faults.append("interrupted")
            except (OSError, InputError) as error:
                if not (self.folder / "trials.csv").exists():
                    shutil.rmtree(self.folder)  # nothing was begun: the name stays free
                    raise
                self.faults.append(str(error))
            return self.conclude()

    def open_record(self) -> Experiment:
        """Read what is known of the trials."""
        self.experiment = Experiment(self.folder, self.question.configurations())
        return self.experiment

    def prepare(self) -> None:
        """See that images, folder and processors allow the search, then settle its precision.

        Raises:
            InputError: they do not.
        """
        base, earlier = self.question.base, self.question.earlier
        self.data = CIFAR10DataModule(base)
        check_test_set(base, self.data.classes)
        # Of a cluster that is still to be joined this is a guess, to be mended when it is.
        asked = {"CPU": float(self.options.cpus_per_trial), "GPU": self.options.gpus_per_trial or 0.0}
        self.use(resources.here() if self.options.address is None else asked)
        self.claim()
        if earlier is None:
            base = machine.resolve_precision(base)
        else:
            base = base.replace(precision=earlier["recipe"]["precision"])
        self.question = dataclasses.replace(self.question, base=base)

    def claim(self) -> None:
        """Make the search's folder; see that it can be written, and that the disk holds what is to come."""
        place, needed = self.options.results_dir, self.bytes_needed()
        existed = self.folder.exists()
        cli.make_folder(question_file(self.folder).parent, place)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            if not existed:
                shutil.rmtree(self.folder)
            raise InputError(
                f"results_dir: {place!r} has {size(free)} free, and this search needs about {size(needed)}. "
                "Free some, name another disk, or take fewer finalists."
            )

    def use(self, there: dict[str, float]) -> None:
        """Settle how many trials run at once, on what."""
        self.takes = resources.per_trial(self.options, there)
        self.concurrent = resources.at_once(self.options, there)

    def seeds(self) -> list[int]:
        """The finalists' seeds."""
        return [(self.question.base.seed + SEED_STEP * (i + 1)) % 2**32 for i in range(self.options.finalist_seeds)]

    # What it will take

    def bytes_needed(self) -> int:
        """Disk: a best and a last checkpoint a running trial, and the best ones that are kept."""
        best, last = checkpoint_bytes(sizes(self.question.base, self.question.space), len(self.data.classes))
        kept = self.options.finalists * (1 + self.options.finalist_seeds)
        return self.concurrent * 2 * (best + last) + kept * best

    def plan(self) -> str:
        """What is about to happen, with the time and the disk it should take."""
        question, options, base = self.question, self.options, self.question.base
        varied = (
            ", ".join(f"{name} ({domain})" for name, domain in question.space.items())
            or "nothing: all fields are fixed"
        )
        recipes = sizes(base, question.space)
        images = len(self.data.train_indices)
        self.epoch_seconds = images * seconds_per_image(recipes, max(1, options.cpus_per_trial))
        rungs = ", ".join(map(str, self.rungs.values)) or "none"
        return (
            f"{base.arch} on {base.dataset}, {images:,} training images: {options.num_samples} trials of at most "
            f"{base.max_epochs} epochs, ASHA's rungs after epoch {rungs}; then the best {options.finalists} anew with "
            f"{options.finalist_seeds} seeds each. Searched: {varied}. {self.concurrent} at once, "
            f"{self.takes['CPU']:g} CPU and {self.takes['GPU']:g} GPU each. "
            f"Expected: about {duration(self.seconds_left())}, {size(self.bytes_needed())} of disk at most. "
            f"Results: {os.path.relpath(self.folder)}."
        )

    def seconds_left(self) -> float:
        """Time until the end, from the epochs that were timed so far, or from the first measurement."""
        trials = list(self.experiment.trials.values())
        timed = [row["seconds"] for t in trials for row in t.rows[-3:]]
        each = statistics.mean(timed) if timed else self.epoch_seconds
        longest = self.question.base.max_epochs
        mean = expected_epochs(longest, self.options.grace_period, self.options.reduction_factor, len(trials))
        epochs = sum(max(1.0, mean - len(t.rows)) for t in trials if t.status == "pending")
        seeds = len(self.seeds())
        epochs += (self.options.finalists * seeds - len(self.experiment.finalists)) * longest - sum(
            self.finalist_epochs.values()
        )
        return max(0.0, epochs) * each / self.concurrent

    # What it does

    def train(self) -> None:
        """Run what is left of the trials and of the finalists."""
        self.run_trials()
        if not self.experiment.pending():
            self.run_finalists()

    def view(self, title: str, rungs: Sequence[int] = ()) -> View:
        """The live view."""
        return View(
            self.experiment,
            self.seconds_left,
            rungs,
            self.question.base.max_epochs,
            self.question.quiet,
            title,
        )

    def run_jobs(
        self, jobs: list[Job], judge: Callable[[str, Row], bool], on_end: Callable[[str, str], None], view: View
    ) -> None:
        """Run jobs with this search's resources, showing them."""
        with view:
            run_jobs(
                jobs,
                judge=judge,
                on_start=view.started,
                on_end=on_end,
                takes=self.takes,
                concurrent=self.concurrent,
                scratch=self.folder / "ray",
            )

    def job(self, job_id: str, recipe: Recipe) -> Job:
        """A training of this search; a worker may stand elsewhere, so its places are absolute."""
        if recipe.data_dir is not None:
            recipe = recipe.replace(data_dir=str(Path(recipe.data_dir).absolute()))
        return Job(job_id, recipe, self.experiment.checkpoints(job_id))

    def run_trials(self) -> None:
        """Run the trials that are still pending, ASHA stopping them."""
        experiment = self.experiment
        for trial in experiment.trials.values():
            self.rungs.enter(trial.trial_id, [(int(row["epoch"]), row["val_acc"]) for row in trial.rows if finite(row)])
        jobs = [self.job(trial_id, self.question.recipe(trial_id)) for trial_id in experiment.pending()]
        view = self.view("search", list(self.rungs.values))

        def judge(trial_id: str, row: Row) -> bool:
            view.heard(trial_id, row)
            experiment.record(trial_id, row)
            if not finite(row):
                reason = f"epoch {row['epoch']:.0f}: train_loss {row['train_loss']:.4g}, val_loss {row['val_loss']:.4g}"
                experiment.conclude(trial_id, "diverged", reason)
                return False  # it ends by itself
            decision = self.rungs.decide(trial_id, int(row["epoch"]), row["val_acc"])
            if decision.stop:
                experiment.conclude(trial_id, "stopped", str(decision))
            else:
                experiment.save_trials()
            return decision.stop

        def on_end(trial_id: str, error: str) -> None:
            trial = experiment.trials[trial_id]
            if error:
                experiment.conclude(trial_id, "failed", error)
            elif trial.status == "pending" and trial.rows and (ending := self.ending(trial)):
                experiment.conclude(trial_id, "completed", ending)
            experiment.tidy(self.options.finalists)
            view.ended(trial_id, f"{trial.status} {trial.reason}".rstrip())

        if jobs:
            self.run_jobs(jobs, judge, on_end, view)

    def ending(self, trial: Trial) -> str:
        """Why a trial that was not stopped came to its end; empty if it did not."""
        epochs, patience = len(trial.rows), self.question.base.early_stop_patience
        if epochs >= self.question.base.max_epochs:
            return "all epochs"
        best = trial.best
        if patience is not None and best is not None and epochs - best["epoch"] >= patience:
            return f"no better val_acc for {patience} epochs"
        return ""

    def run_finalists(self) -> None:
        """Train the best trials anew, from scratch, each with new seeds, without stopping any."""
        experiment = self.experiment
        jobs = {}
        for key in experiment.lineup(self.options.finalists, self.seeds()):
            if key not in experiment.finalists:
                recipe = self.question.recipe(key[0]).replace(seed=key[1])
                jobs[finalist_id(*key)] = self.job(finalist_id(*key), recipe)
        view = self.view(f"finalists, {len(jobs)} to train")

        def judge(job_id: str, row: Row) -> bool:
            view.heard(job_id, row)
            self.finalist_epochs[job_id] = int(row["epoch"])
            return False

        def on_end(job_id: str, error: str) -> None:
            self.finalist_epochs.pop(job_id, None)
            job = jobs[job_id]
            run = ended_run(job.folder)
            if run is not None and not error:
                experiment.add_finalist(job_id.partition("-")[0], run)
            if error:
                self.faults.append(f"{job_id} failed: {error}")
            view.ended(job_id, error or (f"val_acc {run.best['val_acc']:.4f}" if run else "interrupted"))

        if jobs:
            self.run_jobs(list(jobs.values()), judge, on_end, view)

    def test(self) -> None:
        """Choose the winner by mean val_acc over the seeds; only its checkpoints are then read on test, once each."""
        winner = self.experiment.winner(self.options.finalists, self.seeds())
        answers = {}
        for finalist in winner:
            checkpoint = self.experiment.checkpoints(finalist_id(finalist.trial_id, finalist.seed)) / "best.ckpt"
            if checkpoint.exists():
                answers[finalist] = evaluate(checkpoint, data_dir=self.question.base.data_dir)
        if not answers:
            return
        best = max(answers, key=lambda finalist: finalist.val_acc)
        recipe = self.question.recipe(best.trial_id).replace(seed=best.seed)
        made = best_record(
            recipe,
            {"epoch": best.best_epoch, "val_acc": best.val_acc},
            self.experiment.checkpoints(finalist_id(best.trial_id, best.seed)) / "best.ckpt",
            self.folder,
            trial_id=best.trial_id,
            command=self.question.command,
        )
        tested = record_of_test(answers[best], [answer.accuracy for answer in answers.values()])
        answers[best].write(self.folder)
        write_json(self.folder / "best.json", made | tested)

    # What it says

    def conclude(self) -> int:
        """Write the report, say what came out and how to go on; returns the exit status."""
        failed = [t.reason for t in self.experiment.trials.values() if t.status == "failed"]
        try:
            if any(t.rows for t in self.experiment.trials.values()):
                write_report(self.folder)
        except OSError as error:
            self.faults.append(f"the report could not be written: {error}")
        for reason, count in Counter(failed).most_common():
            print(cli.paragraph(f"{count} of {len(self.experiment.trials)} trials failed: {reason}"), file=sys.stderr)
        for fault in self.faults:
            print(cli.paragraph(f"error: {fault}"), file=sys.stderr)
        self.say(self.result(), always=True)
        if self.experiment.finished(self.options.finalists, self.seeds()):
            return cli.DONE
        print("Not all is done; what was reached is kept. To go on:")
        print(self.question.resume_command)
        return cli.FAILED

    def result(self) -> str:
        """What the search found, in a paragraph."""
        place = self.folder / "best.json"
        if not place.exists():
            counts = Counter(t.status for t in self.experiment.trials.values())
            state = ", ".join(f"{n} {status}" for status, n in counts.items())
            leaders = self.experiment.leaders(1)
            best = leaders[0].best if leaders else None
            reached = f" Best so far: {leaders[0].trial_id}, val_acc {best['val_acc']:.4f}." if best else ""
            return f"No winner yet: {state}.{reached}"
        found = json.loads(place.read_text())
        recipe = self.question.recipe(found["trial_id"])
        chosen = settings({name: getattr(recipe, name) for name in self.question.space})
        return (
            f"Winner: {found['trial_id']} ({chosen or 'as given'}). {headline(found)} "
            f"Report: {os.path.relpath(self.folder / 'report.html')}"
        )

    def say(self, text: str, *, always: bool = False) -> None:
        """Print a paragraph, unless --quiet."""
        if always or not self.question.quiet:
            print(cli.paragraph(text), flush=True)


def finalist_id(trial_id: str, seed: int) -> str:
    """The id of a finalist's training."""
    return f"{trial_id}-s{seed}"
