"""Question: what a search was asked, kept with it so that it can only be resumed as itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_lab import cli
from cifar_lab.recipe import InputError, Recipe, at_least, check_fields
from tune.space import Domain, configuration, space_for

SWITCHES = {
    "resume": "go on with the search --name where it was interrupted, or with a larger --num_samples",
    "dashboard": "serve Ray's dashboard on 127.0.0.1 while the search runs",
    "quiet": "print nothing but errors and the last lines",
}
# The options that decide a result; the others may differ when a search is resumed, but are as they were if not given.
DECISIVE = ("num_samples", "grace_period", "reduction_factor", "finalists", "finalist_seeds")
HOW = ("max_concurrent", "cpus_per_trial", "gpus_per_trial")
PLACES = ("data_dir",)


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How the search goes about it; below are the recipe's fields: one that is given is fixed, and not searched.

    Args:
        num_samples: configurations drawn.
        grace_period: epochs before a trial may be stopped.
        reduction_factor: a rung passes the best 1/reduction_factor and lies this many times later than the one before.
        max_concurrent: trials at once; unset: as many as the processors hold.
        cpus_per_trial: CPU cores a trial.
        gpus_per_trial: GPUs a trial, fractions allowed; unset: 1 where there is one, else 0.
        finalists: best trials that are trained anew, at full length.
        finalist_seeds: new seeds for each of them.
        name: the search's name, a folder in results_dir; unset: ARCH-DATASET-YYYYmmdd-HHMMSS.
        results_dir: where searches lie.
        address: a running Ray cluster to join; unset: this machine alone.
    """

    num_samples: int = at_least(1, 30)
    grace_period: int = at_least(1, 1, " epoch")
    reduction_factor: int = at_least(2, 3)
    max_concurrent: int | None = at_least(1, None, ", or unset")
    cpus_per_trial: int = at_least(1, 1)
    gpus_per_trial: float | None = at_least(0, None, ", or unset")
    finalists: int = at_least(1, 3)
    finalist_seeds: int = at_least(1, 3)
    name: str | None = None
    results_dir: str = "results/runs"
    address: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        cli.check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is searched: `base` is what trials share, `space` what they vary; `earlier`, a search to go on with."""

    options: SearchOptions
    base: Recipe
    space: dict[str, Domain]
    folder: Path
    command: str
    given: dict[str, Any]
    dashboard: bool
    quiet: bool
    earlier: dict[str, Any] | None

    def configurations(self) -> dict[str, dict[str, Any]]:
        """The searched fields of each trial, by trial id."""
        return {f"T{i:03d}": configuration(self.space, self.base.seed, i) for i in range(self.options.num_samples)}

    def recipe(self, trial_id: str) -> Recipe:
        """The recipe of a trial."""
        return self.base.replace(**configuration(self.space, self.base.seed, int(trial_id[1:])))

    @property
    def resume_command(self) -> str:
        """What goes on with this search."""
        return cli.resume_line(self.command)

    def to_dict(self) -> dict[str, Any]:
        """What is kept in search.json, and compared when the search is resumed."""
        return {
            "given": self.given,
            "command": self.command,
            "recipe": self.base.to_dict(),
            "space": {name: str(domain) for name, domain in self.space.items()},
            "search": {name: getattr(self.options, name) for name in DECISIVE},
            "how": {name: getattr(self.options, name) for name in HOW},
        }


def question_file(folder: Path) -> Path:
    """Where a search keeps its question."""
    return folder / "ray" / "search.json"


def read_question(folder: Path) -> dict[str, Any]:
    """What the search in `folder` was asked.

    Raises:
        InputError: there is no search in that folder, or its question is damaged.
    """
    try:
        kept: dict[str, Any] = json.loads(question_file(folder).read_text())
        return {name: kept[name] for name in ("given", "command", "recipe", "space", "search", "how")}
    except FileNotFoundError:
        known = ", ".join(sorted(p.parent.parent.name for p in folder.parent.glob("*/ray/search.json")))
        raise InputError(
            f"name: there is no search {folder.name!r} to resume in {folder.parent}. There: {known or 'none'}."
        ) from None
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"--resume: {question_file(folder)} is damaged ({error}).") from error


def ask(argv: Sequence[str]) -> Question:
    """The question on a command line, checked: every configuration that will be tried is a legal recipe.

    Raises:
        InputError: something in it is impossible, or the folder belongs to another search.
    """
    given, own = cli.parse("python -m tune.asha", DESCRIPTION, argv, options=SearchOptions, switches=SWITCHES)
    switches = {name: bool(own.pop(name, False)) for name in SWITCHES}
    options = SearchOptions(**own)
    name = cli.settled_name(options.name, given, what="search", resume=switches["resume"])
    folder = Path(options.results_dir).absolute() / name
    earlier = None
    if switches["resume"]:
        earlier = read_question(folder)
        given = {**earlier["given"], **given}
        options = SearchOptions(**{**earlier["search"], **earlier["how"], **own})
    else:
        cli.check_new(folder)
    base, space = space_for(given.get("arch", "resnet"), given)
    if options.grace_period > base.max_epochs:
        raise InputError(f"grace_period: {options.grace_period}. Legal: 1 to {base.max_epochs}, which is max_epochs.")
    words = [*argv, *([] if options.name else ["--name", name])]
    question = Question(
        options=options,
        base=base,
        space=space,
        folder=folder,
        command=cli.command("tune.asha", words, earlier["command"] if earlier else ""),
        given=given,
        dashboard=switches["dashboard"],
        quiet=switches["quiet"],
        earlier=earlier,
    )
    for trial_id in question.configurations():
        question.recipe(trial_id)
    if earlier is not None:
        _refuse_another(earlier, question)
    return question


def _refuse_another(earlier: dict[str, Any], question: Question) -> None:
    """A search may only be resumed with the question it was asked; more samples are more of the same."""
    now = question.to_dict()
    changes = []
    for part in ("recipe", "space", "search"):
        was, asked = earlier[part], now[part]
        for name in {**was, **asked}:
            before, after = was.get(name, "not searched"), asked.get(name, "not searched")
            grown = name == "num_samples" and after > before
            measured = name == "precision" and after == "auto"
            if before != after and not grown and not measured and name not in PLACES:
                changes.append(f"{name} was {before}, is now {after}")
    if changes:
        raise InputError(
            f"--resume: the search in {question.folder} was asked something else: {'; '.join(changes)}. "
            "Leave these as they were (only num_samples may grow), or take another --name."
        )


DESCRIPTION = "Search an architecture's recipes with ASHA; then train the finalists anew, test the winner, report."
