"""One trial: a config becomes a Recipe, which is fitted, with a report after every epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray.tune

from cifar_lab.recipe import Recipe


def run_trial(config: dict[str, Any]) -> None:
    """Fit `config["job"]`: a recipe in a folder, going on after its last checkpoint if it has one.

    Ray waits for the scheduler's decision in each report, so that a stopped trial trains no epoch in vain. The first
    report of a trial that goes on repeats its last epoch: the driver may have died before it heard of it.
    """
    from cifar_lab.fit import fit

    job = config["job"]
    fit(
        Recipe(**job["recipe"]),
        Path(job["folder"]),
        resume=True,
        on_epoch=lambda row: ray.tune.report(dict(row)),
    )
