"""Cross-validate a grid of settings, or random ones; python -m tune.kfold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from cifar_lab import cli
from cifar_lab.recipe import InputError, Recipe
from tune.grid_question import GridOptions, GridQuestion
from tune.question import read_words
from tune.space import configuration, space_for

FOLDS = 3
LISTS = {"grid": "what to vary: FIELD=VALUE,VALUE,... for each field; all combinations are tried"}


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
    base = Recipe(**given)
    if asked.earlier is not None and grid is None and options.num_samples is None:
        settings: list[dict[str, Any]] = list(earlier["settings"].values())
    elif grid is not None:
        settings = combinations(parsed(grid))
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


def parsed(words: Sequence[str]) -> dict[str, list[Any]]:
    """FIELD=VALUE,VALUE words as values by field, numbers as numbers."""
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not (name and equals and values):
            raise InputError(f"grid: {word!r}. Legal: FIELD=VALUE,VALUE,... such as lr=0.001,0.01.")
        if name in grid:
            raise InputError(f"grid: {name} is named twice.")
        grid[name] = [_value(text) for text in values.split(",")]
    return grid


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def combinations(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values, the last field changing fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    question = ask(argv)
    # Ray and Lightning take seconds to import: not before the question is known to be a legal one.
    from tune.grid import Grid

    return Grid(question).run()


if __name__ == "__main__":
    cli.run(main)
