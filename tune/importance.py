"""How much each searched field matters to val_acc, asked of a random forest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

FEWEST = 10  # trials from which a forest can be asked anything
FOLDS, REPEATS, TREES = 5, 5, 50


@dataclass(frozen=True)
class Importance:
    """What a forest that predicts val_acc from the fields makes of trials that it has not seen.

    Attributes:
        table: a row a field: field, and the mean and std (ddof 0) over folds and shuffles of the error that shuffling
            the field adds to the forest's mean absolute error, fractions of accuracy.
        n: trials.
        error: the forest's mean absolute error on the trials held out.
        guess: that of guessing the other trials' mean.
    """

    table: pd.DataFrame
    n: int
    error: float
    guess: float


def importance(trials: pd.DataFrame, fields: Sequence[str]) -> Importance | None:
    """Permutation importance of the fields, cross-validated over the trials that have a val_acc; None below FEWEST.

    Source: Breiman 2001, "Random Forests"; scikit-learn's permutation_importance on each fold's held-out trials.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import KFold

    measured = trials[trials.val_acc.notna()]
    if len(measured) < FEWEST:
        return None
    columns = [measured[name] for name in fields]
    x = np.column_stack(
        [c if pd.api.types.is_numeric_dtype(c) else c.astype("category").cat.codes for c in columns]
    ).astype(float)
    y = measured.val_acc.to_numpy()
    added, errors, guesses = [], np.zeros(len(y)), np.zeros(len(y))
    for seen, held_out in KFold(FOLDS, shuffle=True, random_state=0).split(x):
        forest = RandomForestRegressor(TREES, random_state=0).fit(x[seen], y[seen])
        errors[held_out] = np.abs(forest.predict(x[held_out]) - y[held_out])
        guesses[held_out] = np.abs(y[seen].mean() - y[held_out])
        asked = permutation_importance(
            forest, x[held_out], y[held_out], scoring="neg_mean_absolute_error", n_repeats=REPEATS, random_state=0
        )
        added.append(asked.importances)
    shuffles = np.concatenate(added, axis=1)
    table = pd.DataFrame({"field": list(fields), "mean": shuffles.mean(1), "std": shuffles.std(1)})
    table = table.sort_values("mean", ascending=False, ignore_index=True)
    return Importance(table, len(y), float(errors.mean()), float(guesses.mean()))
