"""ASHA whose rungs survive a restart.

The decisions are a pure function of numbers, `Rungs.decide`; `ASHA` hands Ray's results to it. Rungs are rebuilt from
the curves of the trials, so that nothing of Ray's own state is needed to go on after a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.tune.schedulers

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial as RayTrial


def milestones(grace_period: int, max_epochs: int, reduction_factor: int) -> list[int]:
    """The epochs after which a trial is judged: grace_period times the powers of reduction_factor, below max_epochs."""
    found = []
    epoch = grace_period
    while epoch < max_epochs:
        found.append(epoch)
        epoch *= reduction_factor
    return found


@dataclass(frozen=True)
class Decision:
    """What was decided after an epoch: `rung` is None where none ends with it, `cutoff` None for the first arrival."""

    stop: bool
    rung: int | None = None
    cutoff: float | None = None
    judged: int = 0

    def __str__(self) -> str:
        if self.rung is None:
            return ""
        if self.cutoff is None:
            return f"rung {self.rung}: first to arrive"
        verb = "below" if self.stop else "at or above"
        return f"rung {self.rung}: {verb} the cutoff {self.cutoff:.4f} of the {self.judged} before it"


class Rungs:
    """ASHA's stopping rule: at a rung a trial stops when below the top 1/reduction_factor of those there before it.

    The first arrival passes; ties survive. A trial that stops stays in the rung, for it was measured there.

    Source: Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning"; the stopping variant with linear
    interpolation of the quantile, as in Ray Tune.
    """

    def __init__(self, grace_period: int, max_epochs: int, reduction_factor: int) -> None:
        self.reduction_factor = reduction_factor
        self.values: dict[int, dict[str, float]] = {
            epoch: {} for epoch in milestones(grace_period, max_epochs, reduction_factor)
        }
        self._decided: dict[tuple[str, int], Decision] = {}

    def enter(self, trial_id: str, curve: Iterable[tuple[int, float]], judged: int) -> None:
        """Put a trial's earlier (epoch, val_acc) into the rungs: what a restart begins with.

        Up to the epoch `judged` it has passed, and passes again, whoever came to that rung in the meantime.
        """
        for epoch, value in curve:
            if epoch in self.values:
                self.values[epoch][trial_id] = value
                if epoch <= judged:
                    self._decided[trial_id, epoch] = Decision(stop=False, rung=epoch)

    def decide(self, trial_id: str, epoch: int, value: float) -> Decision:
        """Judge a trial by its val_acc after an epoch; asked again, the answer is the same."""
        rung = self.values.get(epoch)
        if rung is None:
            return Decision(stop=False)
        if (trial_id, epoch) not in self._decided:
            others = [v for other, v in rung.items() if other != trial_id]
            cutoff = float(np.quantile(others, 1 - 1 / self.reduction_factor)) if others else None
            stop = cutoff is not None and value < cutoff
            rung[trial_id] = value
            self._decided[trial_id, epoch] = Decision(stop, epoch, cutoff, len(others))
        return self._decided[trial_id, epoch]


class ASHA(ray.tune.schedulers.FIFOScheduler):
    """Ray's side of it: trials start in order, `judge(trial_id, result)` says whether one stops.

    Args:
        judge: gets our trial's id and the reported result, records it, and returns True to stop the trial.
    """

    def __init__(self, judge: Callable[[str, dict[str, Any]], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.judge = judge

    def __getstate__(self) -> dict[str, Any]:
        # Ray pickles its scheduler into a snapshot which is never read: the record of the experiment is the truth.
        return {}

    def on_trial_result(self, tune_controller: TuneController, trial: RayTrial, result: dict[str, Any]) -> str:
        stop = self.judge(trial.config["job"]["job_id"], result)
        return self.STOP if stop else self.CONTINUE
