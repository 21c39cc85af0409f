"""GridQuestion: what a grid of settings is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from cifar_lab.recipe import InputError, at_least, dial
from tune.question import Question
from tune.resources import RunOptions
from tune.space import Choice, Domain


@dataclass(frozen=True, kw_only=True)
class GridOptions(RunOptions):
    """How the settings are tried; below are the recipe's fields, which all settings share but for what --grid varies.

    Args:
        num_samples: try only this many of the settings, drawn at random; without --grid they are drawn from the
            architecture's search space. Unset: all of the grid.
        prune_after: after this many folds, the settings whose mean val_acc is poorest are given up; unset: none is.
        keep: fraction of the settings that go on then, rounded up.
    """

    num_samples: int | None = at_least(1, None, ", or unset")
    prune_after: int | None = at_least(1, None, " fold, or unset")
    keep: float = dial(0.5, "more than 0, up to 1", lambda v: 0 < v <= 1)


@dataclass(frozen=True, kw_only=True)
class GridQuestion(Question):
    """What a grid is asked: settings, each trained once on the 90:10 split, or once a fold where the base has folds.

    `gradients`: whether to keep gradient histograms; `every_epoch`: whether to keep each epoch's weights.
    """

    options: GridOptions
    settings: Sequence[dict[str, Any]]
    gradients: bool = False
    every_epoch: bool = False

    @property
    def by_id(self) -> dict[str, dict[str, Any]]:
        """The settings, by their ids."""
        return {f"G{i:02d}": setting for i, setting in enumerate(self.settings)}

    @property
    def space(self) -> dict[str, Domain]:
        """The values that the settings try, by field."""
        names = dict.fromkeys(name for setting in self.settings for name in setting)
        return {
            name: Choice(*dict.fromkeys(setting[name] for setting in self.settings if name in setting))
            for name in names
        }

    def configurations(self) -> dict[str, dict[str, Any]]:
        made = self.by_id
        if self.base.folds is None:
            return made
        # Fold by fold, so that after each all settings can be compared.
        folds = range(self.base.folds)
        return {f"{name}-f{fold}": {**setting, "fold": fold} for fold in folds for name, setting in made.items()}

    def decisive(self) -> dict[str, dict[str, Any]]:
        return {
            "settings": self.by_id,
            "grid": {name: getattr(self.options, name) for name in ("prune_after", "keep")},
        }

    def checked(self) -> Self:
        folds, after = self.base.folds, self.options.prune_after
        if after is not None and after >= (folds or 1):
            legal = f"1 to {folds - 1}, fewer than folds" if folds else "unset, while there are no folds"
            raise InputError(f"prune_after: {after}. Legal: {legal}.")
        if not self.settings:
            raise InputError("grid: no setting is left to try.")
        return super().checked()
