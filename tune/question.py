"""Question: what a run of many trainings was asked, kept with it so that it can only be resumed as itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from cifar_lab import cli
from cifar_lab.files import read_json
from cifar_lab.recipe import FREE, MEASURED, InputError, Recipe, at_least
from tune.resources import RunOptions
from tune.space import Domain, configuration, space_for

SWITCHES = {
    "resume": "go on where it was interrupted",
    "dashboard": "serve Ray's dashboard on 127.0.0.1 while the search runs",
    "quiet": "print nothing but errors and the last lines",
    "json": "print nothing but errors and, at the end, JSON: best.json with the folder, how many trials are in which "
    "status, and the command that goes on, or null",
}
RESUME = {
    "search": "go on with the search --name where it was interrupted, or with a larger --num_samples",
    "grid": "go on with the grid --name where it was interrupted",
}
# The options that decide a result; the others may differ when a search is resumed, but are as they were if not given.
DECISIVE = ("num_samples", "grace_period", "reduction_factor", "finalists", "finalist_seeds")
HOW = ("max_concurrent", "cpus_per_trial", "gpus_per_trial", "hang_timeout", "storage")


@dataclass(frozen=True, kw_only=True)
class SearchOptions(RunOptions):
    """How the search goes about it; below are the recipe's fields: one that is given is fixed, and not searched.

    Args:
        num_samples: configurations drawn.
        grace_period: epochs before a trial may be stopped.
        reduction_factor: a rung passes the best 1/reduction_factor and lies this many times later than the one before.
        finalists: best trials that are trained anew, at full length.
        finalist_seeds: new seeds for each of them.
    """

    num_samples: int = at_least(1, 30)
    grace_period: int = at_least(1, 1, " epoch")
    reduction_factor: int = at_least(2, 3)
    finalists: int = at_least(1, 3)
    finalist_seeds: int = at_least(1, 3)


@dataclass(frozen=True, kw_only=True)
class Question(ABC):
    """What many trainings are to answer; `base` is what they share, `given` what was said of it.

    `earlier` is the question of the run to go on with, if any, as `to_dict` wrote it.
    """

    options: RunOptions
    base: Recipe
    folder: Path
    command: str
    given: dict[str, Any]
    dashboard: bool = False
    quiet: bool = False
    json: bool = False
    earlier: dict[str, Any] | None = None

    @abstractmethod
    def configurations(self) -> dict[str, dict[str, Any]]:
        """The varied fields of each trial, by trial id."""

    def recipe(self, trial_id: str) -> Recipe:
        """The recipe of a trial."""
        return self.base.replace(**self.configurations()[trial_id])

    @abstractmethod
    def decisive(self) -> dict[str, dict[str, Any]]:
        """What decides the result beside the recipe: may not change when the run is resumed."""

    @property
    def resume_command(self) -> str:
        """What goes on with this run."""
        return cli.resume_line(self.command)

    def to_dict(self) -> dict[str, Any]:
        """What is kept beside the run, and compared when it is resumed."""
        return {
            "given": self.given,
            "command": self.command,
            "how": {name: getattr(self.options, name) for name in HOW},
            "recipe": self.base.to_dict(),
            **self.decisive(),
        }

    def checked(self) -> Self:
        """The question, once every recipe in it was made and, for a resumed run, compared with what was asked before.

        Raises:
            InputError: a recipe is impossible, or the question is another one.
        """
        if not self.base.validated:
            raise InputError("val_fraction: 0.0. Trainings are compared by val_acc; legal: more than 0, or folds.")
        for varied in self.configurations().values():
            self.base.replace(**varied)
        if self.earlier is not None:
            _refuse_another(self.earlier, self)
        return self


@dataclass(frozen=True, kw_only=True)
class SearchQuestion(Question):
    """What a search is asked: `space` is what its trials vary."""

    options: SearchOptions
    space: dict[str, Domain]

    def configurations(self) -> dict[str, dict[str, Any]]:
        return {f"T{i:03d}": configuration(self.space, self.base.seed, i) for i in range(self.options.num_samples)}

    def recipe(self, trial_id: str) -> Recipe:
        return self.base.replace(**configuration(self.space, self.base.seed, int(trial_id[1:])))

    def decisive(self) -> dict[str, dict[str, Any]]:
        return {
            "space": {name: str(domain) for name, domain in self.space.items()},
            "search": {name: getattr(self.options, name) for name in DECISIVE},
        }

    def checked(self) -> Self:
        grace, longest = self.options.grace_period, self.base.max_epochs
        if grace > longest:
            raise InputError(f"grace_period: {grace}. Legal: 1 to {longest}, which is max_epochs.")
        return super().checked()


def question_file(folder: Path) -> Path:
    """Where a run keeps its question."""
    return folder / "ray" / "search.json"


def unbegun(folder: Path) -> bool:
    """Whether a run was about to begin there and died before it had kept its question: nothing is lost."""
    return folder.is_dir() and [p.name for p in folder.iterdir()] == ["ray"] and not question_file(folder).exists()


def read_question(folder: Path) -> dict[str, Any]:
    """What the run in `folder` was asked.

    Raises:
        InputError: there is none in that folder, or its question is damaged.
    """
    try:
        kept = read_json(question_file(folder))
        if missing := {"given", "command", "recipe", "how"} - set(kept):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        # A field that is newer than the run has its default.
        return kept | {"recipe": Recipe(**kept["recipe"]).to_dict()}
    except FileNotFoundError:
        known = ", ".join(sorted(p.parent.parent.name for p in folder.parent.glob("*/ray/search.json")))
        raise InputError(
            f"name: there is nothing named {folder.name!r} to resume in {folder.parent}. There: {known or 'none'}."
        ) from None
    except (TypeError, ValueError, OSError) as error:
        raise InputError(f"--resume: {question_file(folder)} is damaged ({error}).") from error


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The words of a command, read: what was given for the recipe and for the options, where the run lies."""

    given: dict[str, Any]
    options: dict[str, Any]
    resume: bool
    quiet: bool
    json: bool
    dashboard: bool
    folder: Path
    earlier: dict[str, Any] | None
    command: str

    @property
    def common(self) -> dict[str, Any]:
        """What any Question takes of it."""
        names = ("given", "quiet", "json", "dashboard", "folder", "earlier", "command")
        return {name: getattr(self, name) for name in names}


def read_words(
    argv: Sequence[str],
    module: str,
    what: Literal["search", "grid"],
    description: str,
    options: type[RunOptions],
    lists: dict[str, str] | None = None,
) -> Asked:
    """Read a command line; a resumed run is as it was wherever nothing else is given.

    Raises:
        InputError: an unknown flag, an impossible option, a folder that exists or one that does not.
    """
    told = {**SWITCHES, "resume": RESUME[what]}
    given, own = cli.parse(f"python -m {module}", description, argv, options=options, switches=told, lists=lists)
    switches = cli.switched(SWITCHES, own)
    name = cli.settled_name(own.get("name"), given, what=what, resume=switches["resume"])
    folder = Path(own.get("results_dir", RunOptions.results_dir)).absolute() / name
    earlier = None
    if switches["resume"]:
        earlier = read_question(folder)
        if what not in earlier:
            raise InputError(f"name: {name!r} is no {what}; it was begun by: {earlier['command']}")
        given = {**earlier["given"], **given}
        own = {**earlier["how"], **own}
    elif not unbegun(folder):
        cli.check_new(folder)
    words = [*argv, *([] if own.get("name") else ["--name", name])]
    command = cli.command(module, words, earlier["command"] if earlier else "")
    return Asked(given=given, options=own, **switches, folder=folder, earlier=earlier, command=command)


def ask(argv: Sequence[str]) -> SearchQuestion:
    """The question on tune.asha's command line, checked: every configuration that will be tried is a legal recipe.

    Raises:
        InputError: something in it is impossible, or the folder belongs to another search.
    """
    asked = read_words(argv, "tune.asha", "search", DESCRIPTION, SearchOptions)
    earlier = (asked.earlier or {}).get("search", {})
    base, space = space_for(asked.given.get("arch", "resnet"), asked.given)
    options = SearchOptions(**{**earlier, **asked.options})
    return SearchQuestion(options=options, base=base, space=space, **asked.common).checked()


def _refuse_another(earlier: dict[str, Any], question: Question) -> None:
    """A run may only be resumed with the question it was asked; more samples are more of the same."""
    changes = []
    for part, now in {"recipe": question.base.to_dict(), **question.decisive()}.items():
        was = earlier.get(part, {})
        for name in {**was, **now}:
            before, after = was.get(name, "not searched"), now.get(name, "not searched")
            grown = name == "num_samples" and isinstance(before, int) and after > before
            measured = name in MEASURED and after == "auto"
            if before != after and not grown and not measured and name not in FREE:
                changes.append(f"{name} was {before}, is now {after}")
    if changes:
        raise InputError(
            f"--resume: what lies in {question.folder} was asked something else: {'; '.join(changes)}. "
            "Leave these as they were (num_samples of a search may grow), or take another name."
        )


DESCRIPTION = "Search an architecture's recipes with ASHA; then train the finalists anew, test the winner, report."
