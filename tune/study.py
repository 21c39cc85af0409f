"""Reproduce a published experiment; python -m tune.study NAME."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from cifar_lab import cli
from cifar_lab.files import read_json
from cifar_lab.recipe import FREE, MEASURED, InputError, Recipe, at_least, check_fields, nearest
from tune.grid_question import GridOptions, GridQuestion
from tune.kfold import combinations
from tune.published import shown
from tune.question import SWITCHES, Question, SearchOptions, SearchQuestion, read_question
from tune.resources import RunOptions
from tune.space import Choice, space_for

STUDIES = Path(__file__).with_name("studies")
UNSCALED = (*FREE, *MEASURED)  # may differ from the published study without being a change of scale


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A published figure: a metric, at which values of the varied fields, over which others; `value` may be absent."""

    metric: str
    value: float | None = None
    at: dict[str, Any] = field(default_factory=dict)
    over: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def label(self) -> str:
        """What published.csv calls it."""
        over = f" over {_words(self.over)}" if self.over else ""
        return f"{self.metric}{f' at {_words(self.at)}' if self.at else ''}{over}"


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


@dataclass(frozen=True, kw_only=True)
class Study:
    """One variant of a published experiment, as tune/studies declares it.

    Args:
        name: the study.
        variant: as_reported, faults included, or corrected.
        about: what it is, in a line.
        arch: architecture.
        published: its figures.
        wants: what it takes at full size.
        recipe: fields that it fixes.
        search: options of an ASHA search; a study without it is a grid.
        space: values of fields searched beside, or otherwise than, the architecture's own space.
        grid: values by field, of which all combinations are tried.
        settings: the settings themselves, where they are no grid.
        folds: K-fold cross-validation.
        carry: fields taken over from the best setting of other studies.
        gradients: whether gradient histograms are kept.
        every_epoch: whether each epoch's weights are, to be tested after the end.
        tta: test-time augmentation, reported beside the plain test figure.
        note: what it does otherwise than its report.
    """

    name: str
    variant: str
    about: str
    arch: str
    published: tuple[Figure, ...]
    wants: str
    recipe: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    space: dict[str, list[Any]] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    settings: list[dict[str, Any]] = field(default_factory=list)
    folds: int | None = None
    carry: list[dict[str, Any]] = field(default_factory=list)
    gradients: bool = False
    every_epoch: bool = False
    tta: str = "none"
    note: str = ""

    @property
    def headline(self) -> str:
        """Its first published figure, in words."""
        first = self.published[0]
        return f"{first.label} {shown(first.label, str(first.value))}" if first.value is not None else "in words only"

    def base(self) -> dict[str, Any]:
        """The recipe's fields as the study fixes them, before anything is carried or scaled."""
        folds = {} if self.folds is None else {"folds": self.folds}
        return {"arch": self.arch, **folds, **self.recipe}


@cache
def studies() -> dict[str, dict[str, Study]]:
    """All studies, by name and variant, in the order of the reports.

    Raises:
        InputError: a declaration has an unknown key.
    """
    import yaml

    found: dict[str, dict[str, Study]] = {}
    known = {f.name for f in fields(Study)}
    for file in sorted(STUDIES.glob("*.yaml")):
        for name, shared in yaml.safe_load(file.read_text()).items():
            variants = shared.pop("variants")
            for variant, own in variants.items():
                made = {**shared, **own, "recipe": {**shared.get("recipe", {}), **own.get("recipe", {})}}
                if unknown := set(made) - known:
                    raise InputError(f"{file.name}: {name} has the unknown keys {', '.join(sorted(unknown))}.")
                made["published"] = tuple(Figure(**figure) for figure in made["published"])
                found.setdefault(name, {})[variant] = Study(name=name, variant=variant, **made)
    return found


@dataclass(frozen=True, kw_only=True)
class StudyOptions(RunOptions):
    """How the study is run; below are the recipe's fields: one that is given replaces the study's.

    Args:
        variant: as_reported or corrected; unset: all that the study has, one after the other.
        published_dir: where published.csv, README.md and a folder for each study lie.
        num_samples: trials of a search; unset: as the study has it.
        finalists: best trials of a search that are trained anew; unset: as the study has it.
        finalist_seeds: new seeds for each of them; unset: as the study has it.
        prune_after: after this many folds the poorer half of the settings is given up; unset: none is.
    """

    variant: str | None = None
    published_dir: str = "results"
    num_samples: int | None = at_least(1, None, ", or unset")
    finalists: int | None = at_least(1, None, ", or unset")
    finalist_seeds: int | None = at_least(1, None, ", or unset")
    prune_after: int | None = at_least(1, None, " fold, or unset")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.name is not None:
            raise InputError(f"name: {self.name!r}. A study's folder is named STUDY-VARIANT; legal: leave it away.")


def chosen(name: str, variant: str | None) -> list[Study]:
    """The variants of a study, or the one asked for.

    Raises:
        InputError: no such study or variant.
    """
    if name not in studies():
        raise InputError(f"study: {name!r}{nearest(name, studies())} Legal: {', '.join(studies())}.")
    variants = studies()[name]
    if variant is None:
        return list(variants.values())
    if variant not in variants:
        raise InputError(f"variant: {variant!r}. Legal for {name}: {', '.join(variants)}.")
    return [variants[variant]]


def carried(study: Study, published_dir: Path) -> dict[str, Any]:
    """The fields that the study takes over from the best setting of earlier ones.

    Raises:
        InputError: an earlier one has not been run.
    """
    found: dict[str, Any] = {}
    for entry in study.carry:
        place = published_dir / entry["study"] / "corrected" / "best.json"
        try:
            recipe = read_json(place)["recipe"]
        except (OSError, ValueError, KeyError):
            raise InputError(
                f"study: {study.name} carries {', '.join(entry['fields'])} forward from {entry['study']}, which was "
                f"not run: {place} is needed. First: python -m tune.study {entry['study']} --variant corrected"
            ) from None
        found |= {name: recipe[name] for name in entry["fields"]}
    return found


def question_of(
    study: Study,
    given: dict[str, Any],
    own: dict[str, Any],
    *,
    resume: bool,
    quiet: bool,
    dashboard: bool,
    words: str,
    json: bool = False,
) -> Question:
    """What the study asks, scaled by what was given for the recipe, and for the command as its `own` options.

    Raises:
        InputError: an impossible field, a study that has to be run first, or a folder that exists.
    """
    folder = study_folder(study, own.get("results_dir", StudyOptions.results_dir))
    if not resume and folder.exists():
        raise InputError(
            f"study: {study.name}, {study.variant} lies in {folder} already. Go on with it by --resume, or name "
            "another --results_dir."
        )
    earlier = read_question(folder) if resume and folder.exists() else None
    options = StudyOptions(**{**(earlier["how"] if earlier else {}), **own})
    foreign = ("prune_after",) if study.search is not None else ("num_samples", "finalists", "finalist_seeds")
    for name in foreign:
        if own.get(name) is not None:
            kind = "search" if study.search is not None else "grid"
            raise InputError(f"{name}: {own[name]}. {study.name} is a {kind}, which has no such option.")
    if "fold" in given or ("folds" in given and study.folds is None):
        raise InputError(
            f"{'fold' if 'fold' in given else 'folds'}: {study.name} says how it validates; leave it away."
        )
    given = {**(earlier["given"] if earlier else {}), **given}
    command = words if earlier is None else earlier["command"]
    fixed = {**study.base(), **carried(study, Path(options.published_dir)), **given}
    shared: dict[str, Any] = {
        "folder": folder, "command": command, "given": given, "dashboard": dashboard, "quiet": quiet,
        "json": json, "earlier": earlier,
    }  # fmt: skip
    common = {f.name: getattr(options, f.name) for f in fields(RunOptions)}
    asked = {name: getattr(options, name) for name in ("num_samples", "finalists", "finalist_seeds", "prune_after")}
    asked = {name: value for name, value in asked.items() if value is not None}
    was = earlier or {}
    if study.search is not None:
        base, space = space_for(study.arch, fixed)
        more = {name: Choice(*values) for name, values in study.space.items() if name not in given}
        search = SearchOptions(**{**common, **study.search, **was.get("search", {}), **asked})
        return SearchQuestion(
            options=search, base=base, space=dict(sorted({**space, **more}.items())), **shared
        ).checked()
    grid = GridOptions(**{**common, **was.get("grid", {}), **asked})
    return GridQuestion(
        options=grid, base=Recipe(**fixed), settings=settings_of(study, given), gradients=study.gradients,
        every_epoch=study.every_epoch, **shared,
    ).checked()  # fmt: skip


def settings_of(study: Study, given: Collection[str]) -> list[dict[str, Any]]:
    """The settings of a grid, the fields that were given taken out of them."""
    settings = study.settings or combinations(study.grid)
    kept = [{name: value for name, value in setting.items() if name not in given} for setting in settings]
    return [setting for i, setting in enumerate(kept) if setting not in kept[:i]]


def study_folder(study: Study, results_dir: str) -> Path:
    """Where a study runs."""
    return Path(results_dir).absolute() / f"{study.name}-{study.variant}"


def listing() -> str:
    """A line a study and variant: name, architecture, variant, published figure."""
    rows = [(s.name, s.arch, s.variant, s.headline) for variants in studies().values() for s in variants.values()]
    widths = [*(max(len(row[i]) for row in rows) for i in range(3)), 0]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def catalogue() -> list[dict[str, Any]]:
    """The same for scripts: study, variant, arch, about, and all published figures by their metric."""
    return [
        {
            "study": study.name,
            "variant": study.variant,
            "arch": study.arch,
            "about": study.about,
            "published": {figure.label: figure.value for figure in study.published},
        }
        for variants in studies().values()
        for study in variants.values()
    ]


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    name, words = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    if not name and not {"-h", "--help", "--list", "--render"} & set(argv):
        raise InputError("study: none is named. Legal: python -m tune.study NAME, or --list for the names.")
    variants = chosen(name, None) if name else []
    given, own = cli.parse(
        "python -m tune.study NAME | --list",
        f"{__doc__} It leaves STUDY-VARIANT in --results_dir, its small files in --published_dir.",
        words,
        options=StudyOptions,
        switches={
            **SWITCHES,
            "resume": "go on with the study where it was interrupted; with a search also to a larger --num_samples",
            "render": "write the table of --published_dir anew after a declaration has changed; nothing is run",
            "list": "a line a study and variant: name, architecture, published figure; nothing is run",
        },
        default_arch=variants[0].arch if variants else "resnet",
    )
    listed, rendered, switches = own.pop("list", False), own.pop("render", False), cli.switched(SWITCHES, own)
    if rendered:
        if name or listed or any(switches.values()) or given or set(own) - {"published_dir"}:
            raise InputError("--render: nothing but --published_dir goes with it.")
        from tune.reproduce import refresh

        refresh(Path(StudyOptions(**own).published_dir))
        return cli.DONE
    if listed:
        if name or given or own:
            raise InputError("--list: nothing but --json goes with it.")
        print(cli.as_json(catalogue()) if switches["json"] else listing())
        return cli.DONE
    options = StudyOptions(**own)
    if "arch" in given:
        raise InputError(f"arch: {given['arch']}. {name} is a study of {variants[0].arch}; legal: leave it away.")
    asked = chosen(name, options.variant)
    if switches["resume"] and not any(study_folder(study, options.results_dir).exists() for study in asked):
        raise InputError(f"--resume: {name} was not begun in {options.results_dir}; legal: the same without --resume.")
    questions = []
    for study in asked:  # all of them before any training
        line = [word for word in words if word != "--resume"]
        if options.variant is None:
            line += ["--variant", study.variant]
        line = ["python", "-m", "tune.study", name, *line]
        questions.append(question_of(study, given, own, **switches, words=shlex.join(line)))
    # Ray takes seconds to import: not before the questions are known to be legal ones.
    from tune.reproduce import reproduce

    status, answers = cli.DONE, list[dict[str, Any]]()
    for study, question in zip(asked, questions, strict=True):
        status = reproduce(study, question, Path(options.published_dir), answers)
        if status != cli.DONE:
            break
    if switches["json"]:
        print(cli.as_json(answers))
    return status


if __name__ == "__main__":
    cli.run(main)
