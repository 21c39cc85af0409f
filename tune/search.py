"""A search under way: trials, finalists, test, report."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from cifar_lab.checkpoint import CheckpointError, Row, best_record, ended_run, finite
from cifar_lab.evaluate import evaluate, record_of_test
from cifar_lab.files import read_json, size, write_json
from cifar_lab.recipe import Recipe
from tune.campaign import Campaign, Task
from tune.experiment import finalist_id
from tune.plan import expected_epochs, sizes
from tune.question import SearchQuestion
from tune.scheduler import Rungs
from tune.space import edges
from tune.view import duration, settings

SEED_STEP = 1000  # a finalist's seeds are the search's seed plus multiples of this: new ones


class Search(Campaign[SearchQuestion]):
    """A search under way."""

    WHAT = "search"
    AFTERWARDS = ("cifar_lab.fit", "sklearn.ensemble", "tune.report")

    def __init__(self, question: SearchQuestion) -> None:
        super().__init__(question)
        self.options = question.options
        self.rungs = Rungs(self.options.grace_period, question.base.max_epochs, self.options.reduction_factor)
        self.finalist_epochs: dict[str, int] = {}

    def seeds(self) -> list[int]:
        """The finalists' seeds."""
        return [(self.question.base.seed + SEED_STEP * (i + 1)) % 2**32 for i in range(self.options.finalist_seeds)]

    # What it will take

    def recipes(self) -> list[Recipe]:
        return sizes(self.question.base, self.question.space)

    def checkpoints_kept(self) -> int:
        return self.options.finalists * (1 + self.options.finalist_seeds)

    def plan(self) -> str:
        question, options, base = self.question, self.options, self.question.base
        varied = (
            ", ".join(f"{name} ({domain})" for name, domain in question.space.items())
            or "nothing: all fields are fixed"
        )
        images = len(self.data.train_indices)
        rungs = ", ".join(map(str, self.rungs.values)) or "none"
        return (
            f"{base.arch} on {base.dataset}, {images:,} training images: {options.num_samples} trials of at most "
            f"{base.max_epochs} epochs, ASHA's rungs after epoch {rungs}; then the best {options.finalists} anew with "
            f"{options.finalist_seeds} seeds each. Searched: {varied}. {self.concurrent} at once, "
            f"{self.takes['CPU']:g} CPU and {self.takes['GPU']:g} GPU each. "
            f"Expected: about {duration(self.seconds_left())}, {size(self.bytes_needed())} of disk at most. "
            f"Results: {self.place()}."
        )

    def seconds_left(self) -> float:
        trials = list(self.experiment.trials.values())
        longest = self.question.base.max_epochs
        mean = expected_epochs(longest, self.options.grace_period, self.options.reduction_factor, len(trials))
        epochs = sum(max(1.0, mean - len(t.rows)) for t in trials if t.status == "pending")
        seeds = len(self.seeds())
        epochs += (self.options.finalists * seeds - len(self.experiment.finalists)) * longest - sum(
            self.finalist_epochs.values()
        )
        return max(0.0, epochs) * self.epoch_seconds() / self.concurrent

    # What it does

    def trained(self) -> bool:
        return self.experiment.trained(self.options.finalists, self.seeds())

    def finished(self) -> bool:
        return self.experiment.finished(self.options.finalists, self.seeds())

    def take_up(self) -> None:
        trials = self.experiment.trials.values()
        for trial in trials:
            curve = [(int(row["epoch"]), row["val_acc"]) for row in trial.rows if finite(row)]
            self.rungs.enter(trial.trial_id, curve, trial.judged)
        for trial in trials:
            undecided = trial.status == "pending" and len(trial.rows) > trial.judged and finite(trial.rows[-1])
            if undecided and (reason := self.decide(trial.trial_id, trial.rows[-1])):
                self.experiment.conclude(trial.trial_id, "stopped", reason)

    def decide(self, trial_id: str, row: Row) -> str:
        """Why a trial is to stop after an epoch; empty if it is to go on."""
        decision = self.rungs.decide(trial_id, int(row["epoch"]), row["val_acc"])
        return str(decision) if decision.stop else ""

    def work(self) -> None:
        """Train trials, and finalists as soon as they are sure, so that none waits for the last trial to end."""
        experiment, count = self.experiment, self.options.finalists
        trials = self.trial_tasks(experiment.pending(), self.decide, lambda: experiment.tidy(count))
        finalist = functools.cache(self.finalist_task)

        def tasks() -> Iterator[Task]:
            yield from trials
            for key in experiment.lineup(count, self.seeds()):
                if key not in experiment.finalists:
                    yield finalist(*key)

        self.run_tasks(tasks, self.view(self.progress, list(self.rungs.values)))

    def progress(self) -> str:
        """How many have ended."""
        trials, finalists = self.experiment.trials, self.experiment.finalists
        said = f"{len(trials) - len(self.experiment.pending())}/{len(trials)} trials"
        sure = self.experiment.lineup(self.options.finalists, self.seeds())
        return f"{said}, {sum(key in finalists for key in sure)}/{len(sure)} finalists" if sure else said

    def finalist_task(self, trial_id: str, seed: int) -> Task:
        """One of the best trials anew, from scratch, with a new seed, not to be stopped."""
        job_id = finalist_id(trial_id, seed)
        job = self.job(job_id, self.question.recipe(trial_id).replace(seed=seed))

        def judge(row: Row) -> bool:
            self.finalist_epochs[job_id] = int(row["epoch"])
            return False

        def on_end(error: str) -> str:
            self.finalist_epochs.pop(job_id, None)
            job.fetch()
            run = ended_run(job.folder)
            if run is not None and not error:
                self.experiment.add_finalist(trial_id, run)
                job.forget()
            if error:
                self.faults.append(f"{job_id} failed: {self.explained(job_id, error)}")
            return error or (f"val_acc {run.best['val_acc']:.4f}" if run else "interrupted")

        return Task(job, judge, on_end)

    def settle(self) -> None:
        """Choose the winner by mean val_acc over the seeds; only its checkpoints are then read on test, once each."""
        winner = self.experiment.winner(self.options.finalists, self.seeds())
        answers = {}
        for finalist in winner:
            checkpoint = self.experiment.checkpoints(finalist_id(finalist.trial_id, finalist.seed)) / "best.ckpt"
            if not finalist.val_acc and not checkpoint.exists():
                continue  # it diverged in its first epoch
            try:
                answers[finalist] = evaluate(checkpoint, data_dir=self.question.base.data_dir)
            except CheckpointError as error:
                self.experiment.forget_finalist(finalist)
                self.faults.append(f"{error} With --resume it is trained again.")
                return
        if not answers:
            if winner:
                self.faults.append("each training of every finalist diverged")
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
        made["edges"] = edges(self.question.space, recipe.to_dict())
        write_json(self.folder / "best.json", made | tested)

    # What it says

    def outlook(self) -> str:
        if all(trial.status == "diverged" for trial in self.experiment.trials.values()):
            return "Every trial diverged. Give a larger --num_samples, for others:"
        return super().outlook()

    def report(self) -> None:
        from tune.report import write_report

        write_report(self.folder)

    def result(self) -> str:
        place = self.folder / "best.json"
        if not place.exists():
            return self.state()
        from cifar_lab.report import headline

        found = read_json(place)
        recipe = self.question.recipe(found["trial_id"])
        chosen = settings({name: getattr(recipe, name) for name in self.question.space})
        return (
            f"Winner: {found['trial_id']} ({chosen or 'as given'}). {headline(found)} "
            f"Report: {self.place()}/report.html"
        )
