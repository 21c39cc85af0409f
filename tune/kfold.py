"""Cross-validate a grid of settings, or random ones; python -m tune.kfold."""

from __future__ import annotations

import contextlib
import itertools
import types
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np

from cifar_lab import cli
from cifar_lab.recipe import InputError, Recipe, recipe_class
from tune.grid_question import GridOptions, GridQuestion
from tune.question import read_words
from tune.space import configuration, space_for

FOLDS = 3
LISTS = {
    "grid": "what to vary: FIELD=VALUE,VALUE,... for each field, with ; between the values of a field that is a text; "
    "all combinations are tried"
}
# What decides which images validate: settings that differ in it could not be compared.
SHARED = ("arch", "dataset", "data_dir", "limit_train", "val_fraction", "split_seed", "folds", "fold")


def ask(argv: Sequence[str]) -> GridQuestion:
    """The question on the command line, checked.

    Raises:
        InputError: something in it is impossible, or the folder belongs to another run.
    """
    asked = read_words(argv, "tune.kfold", "grid", __doc__ or "", GridOptions, LISTS)
    if "fold" in asked.given:
        raise InputError("fold: every fold is trained; legal: leave it away.")
    grid = asked.options.pop("grid", None)
    earlier = asked.earlier or {}
    options = GridOptions(**{**earlier.get("grid", {}), **asked.options})
    given = {"folds": FOLDS, **asked.given}
    base = Recipe(**{**earlier.get("recipe", {}), **given})
    if asked.earlier is not None and grid is None and options.num_samples is None:
        settings: list[dict[str, Any]] = list(earlier["settings"].values())
    elif grid is not None:
        settings = combinations(parsed(grid, base.arch))
        if options.num_samples is not None:
            drawn = np.random.default_rng(base.seed).permutation(len(settings))[: options.num_samples]
            settings = [settings[i] for i in sorted(drawn)]
    elif options.num_samples is not None:
        base, space = space_for(base.arch, given)
        settings = [configuration(space, base.seed, i) for i in range(options.num_samples)]
    else:
        raise InputError(
            "grid: nothing is varied. Legal: --grid FIELD=VALUE,VALUE,... (several), or --num_samples for settings "
            "drawn from the architecture's search space."
        )
    for name in sorted({name for setting in settings for name in setting} & set(asked.given)):
        raise InputError(f"grid: {name} is varied and given as --{name} {asked.given[name]} too; legal: one of them.")
    return GridQuestion(options=options, base=base, settings=settings, **{**asked.common, "given": given}).checked()


def parsed(words: Sequence[str], arch: str) -> dict[str, list[Any]]:
    """FIELD=VALUE,VALUE words as values by field, each of the field's own type where it can be read as one."""
    hints = typing.get_type_hints(recipe_class(arch))
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not (name and equals and values):
            raise InputError(f"grid: {word!r}. Legal: FIELD=VALUE,VALUE,... such as lr=0.001,0.01.")
        if name in SHARED:
            raise InputError(f"grid: {name} decides which images validate, or what is trained; give it as --{name}.")
        if name in grid:
            raise InputError(f"grid: {name} is named twice.")
        hint = hints.get(name)
        grid[name] = [_value(text, hint) for text in values.split(";" if hint is str else ",")]
        if twice := [value for i, value in enumerate(grid[name]) if value in grid[name][:i]]:
            raise InputError(f"grid: {name} has the value {twice[0]} twice.")
    return grid


def _value(text: str, hint: Any) -> Any:
    """The text as the field's type; what cannot be read so is left to the Recipe to refuse."""
    if typing.get_origin(hint) is typing.Literal:
        return next((choice for choice in typing.get_args(hint) if str(choice) == text), text)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if {int, float} & set(kinds):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
    return text


def combinations(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values, the last field changing fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    question = ask(argv)
    # Ray takes seconds to import: not before the question is known to be a legal one.
    from tune.grid import Grid

    grid = Grid(question)
    status = grid.run()
    if question.json:
        print(cli.as_json(grid.answer()))
    return status


if __name__ == "__main__":
    cli.run(main)
