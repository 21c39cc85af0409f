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

    Source: Breiman 2001, "Random Forests", on each fold's held-out trials. As scikit-learn's permutation_importance,
    which asks the forest once a shuffle, 25 milliseconds each: here it is asked once a fold.
    """
    from sklearn.ensemble import RandomForestRegressor
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
    rng = np.random.default_rng(0)
    for seen, held_out in KFold(FOLDS, shuffle=True, random_state=0).split(x):
        forest = RandomForestRegressor(TREES, random_state=0).fit(x[seen], y[seen])
        # The trials as they are, then with a field shuffled: REPEATS times the first, REPEATS times the second, ...
        asked = np.repeat(x[None, held_out], 1 + len(fields) * REPEATS, axis=0)
        for field, copies in enumerate(np.split(asked[1:], len(fields))):
            copies[..., field] = rng.permuted(copies[..., field], axis=1)
        predicted = forest.predict(asked.reshape(-1, len(fields))).reshape(asked.shape[:2])
        wrong = np.abs(predicted - y[held_out])
        errors[held_out] = wrong[0]
        guesses[held_out] = np.abs(y[seen].mean() - y[held_out])
        added.append((wrong[1:].mean(1) - wrong[0].mean()).reshape(len(fields), REPEATS))
    shuffles = np.concatenate(added, axis=1)
    table = pd.DataFrame({"field": list(fields), "mean": shuffles.mean(1), "std": shuffles.std(1)})
    table = table.sort_values("mean", ascending=False, ignore_index=True)
    return Importance(table, len(y), float(errors.mean()), float(guesses.mean()))
