"""Replay a search's curves with any number of workers; python -m tune.simulate EXPERIMENT.

Whole curves, of trials that nothing stopped, tell what ASHA, median stopping or random search would have done on
`--workers` machines: who stops when, how long it takes, how good the best one found is. The trials are replayed in many
random orders; of a grid with folds each training is a trial. What is assumed:

- an epoch takes the seconds and reaches the val_acc that were measured: the workers are as fast as the one that
  trained it then, as busy as it was, and do not slow each other down;
- a trial begins when a worker is free, `--startup` seconds before its first epoch; nothing is lost between two epochs;
- the finalists that a search trains anew come on top of it;
- a diverged trial takes its epochs, is not judged by its last one, and cannot win;
- the intervals are of the orders alone: other configurations, or other seeds, would differ more.

The decisions of ASHA are those of the search itself, `tune.scheduler.Rungs`.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from cifar_lab import cli
from cifar_lab.files import read_json, write_csv
from cifar_lab.recipe import InputError, at_least, check_fields
from tune.question import SearchOptions, question_file

WORKERS = ("1", "8", "64", "512")
WITHIN = 0.005  # half a point: a search that comes so close to the best of all trials has reached it
ROUNDING = 1e-9  # so that a val_acc exactly half a point below the best has reached it
MINIMUM = 10  # whole trials, below which an experiment with others is not replayed
MEANS = ("epochs", "wall_seconds", "val_acc")
MEDIANS = ("epochs_to_target", "wall_seconds_to_target")
QUANTILES = (0.025, 0.5, 0.975)  # of the orders

Policy = Callable[[str, int, float], bool]  # gets trial_id, epoch, val_acc in the order of time; True stops the trial


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """How the curves are replayed.

    Args:
        orders: random orders of the trials.
        seed: seed of the orders.
        startup: seconds that a trial takes before its first epoch; the experiment does not tell.
        grace_period: epochs before ASHA or median stopping may stop a trial; unset: the experiment's.
        reduction_factor: ASHA's; unset: the experiment's.
    """

    orders: int = at_least(1, 200)
    seed: int = at_least(0, 0)
    startup: float = at_least(0, 0.0, " seconds")
    grace_period: int | None = at_least(1, None, " epoch, or unset")
    reduction_factor: int | None = at_least(2, None, ", or unset")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Curve:
    """A trial as it was measured: seconds and val_acc of each epoch, and whether it diverged in the last one."""

    trial_id: str
    seconds: Sequence[float]
    val_acc: Sequence[float]
    diverged: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a replay came to: epochs of each trial, time, the best val_acc, and when the target was reached.

    `epochs_to_target` are those that had ended by then, of all trials; both are infinite where it never was.
    """

    trained: dict[str, int]
    wall_seconds: float
    val_acc: float
    epochs_to_target: float
    wall_seconds_to_target: float

    @property
    def epochs(self) -> int:
        """Epochs of all trials together."""
        return sum(self.trained.values())


def replay(
    curves: Sequence[Curve], workers: int, stops: Policy, *, target: float = math.inf, startup: float = 0.0
) -> Outcome:
    """Run the trials again, in their order, as many at once as there are workers.

    Of two epochs that end at the same moment, that of the trial which began first is judged first.
    """
    trained: dict[str, int] = {}
    now, count, best, reached = 0.0, 0, -math.inf, (math.inf, math.inf)
    # The epoch under way of each running trial: when it ends, the trial's place in the order, the epoch.
    running = [(startup + curve.seconds[0], place, 1) for place, curve in enumerate(curves[:workers])]
    heapq.heapify(running)
    following = len(running)
    while running:
        now, place, epoch = running[0]
        curve = curves[place]
        count += 1
        last = epoch == len(curve.seconds)
        value = curve.val_acc[epoch - 1]
        if not curve.diverged:
            best = max(best, value)
            if value >= target - ROUNDING:
                reached = min(reached, (count, now))
        stopped = not (last and curve.diverged) and stops(curve.trial_id, epoch, value)
        if not (stopped or last):
            heapq.heapreplace(running, (now + curve.seconds[epoch], place, epoch + 1))
            continue
        trained[curve.trial_id] = epoch
        if following < len(curves):
            heapq.heapreplace(running, (now + startup + curves[following].seconds[0], following, 1))
            following += 1
        else:
            heapq.heappop(running)
    return Outcome(trained, now, best, *reached)


def below_median(best: float, averages: Sequence[float]) -> bool:
    """Whether a trial's best value so far lies below the median of the others' running averages; ties survive."""
    return bool(averages) and best < statistics.median(averages)


class MedianStopping:
    """Stops a trial whose best val_acc so far is below the median of the others' mean val_acc up to that epoch.

    Source: Golovin et al. 2017, "Google Vizier: A Service for Black-Box Optimization". There the others are the
    completed trials; here they are all that were there before, or as many workers as trials would stop none.
    """

    def __init__(self, grace_period: int) -> None:
        self.grace_period = grace_period
        self.averages: dict[int, list[float]] = {}
        self.sums: dict[str, float] = {}
        self.best: dict[str, float] = {}

    def stops(self, trial_id: str, epoch: int, value: float) -> bool:
        """Judge a trial by its val_acc after an epoch; it must be told of all epochs, in order."""
        self.sums[trial_id] = self.sums.get(trial_id, 0.0) + value
        self.best[trial_id] = max(self.best.get(trial_id, value), value)
        others = self.averages.setdefault(epoch, [])
        stop = epoch >= self.grace_period and below_median(self.best[trial_id], others)
        others.append(self.sums[trial_id] / epoch)
        return stop


def policies(grace_period: int, max_epochs: int, reduction_factor: int) -> dict[str, Callable[[], Policy]]:
    """What makes each policy anew, by its name."""
    from tune.scheduler import Rungs

    def asha() -> Policy:
        rungs = Rungs(grace_period, max_epochs, reduction_factor)
        return lambda trial_id, epoch, value: rungs.decide(trial_id, epoch, value).stop

    return {
        "ASHA": asha,
        "median stopping": lambda: MedianStopping(grace_period).stops,
        "random search": lambda: lambda trial_id, epoch, value: False,
    }


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The share of the orders that reached the target; each measure's mean or median, and where 95% of the orders lie.

    Quantiles, the median among them, are those of observed orders, not interpolated: an order that never reaches the
    target counts as infinite.
    """
    found = {"reached": statistics.fmean(math.isfinite(outcome.epochs_to_target) for outcome in outcomes)}
    for name in (*MEANS, *MEDIANS):
        values = [float(getattr(outcome, name)) for outcome in outcomes]
        low, middle, high = map(float, np.quantile(values, QUANTILES, method="inverted_cdf"))
        if name in MEANS:
            middle = statistics.fmean(values)
        found |= {name: middle, f"{name}_low": low, f"{name}_high": high}
    return found


def simulate(
    curves: Sequence[Curve],
    by_name: dict[str, Callable[[], Policy]],
    workers: Sequence[int],
    *,
    orders: int,
    seed: int,
    target: float,
    startup: float,
) -> list[dict[str, Any]]:
    """Replay the curves in the same random orders with every number of workers under every policy: a row each."""
    random = np.random.default_rng(seed)
    shuffled = [[curves[i] for i in random.permutation(len(curves))] for _ in range(orders)]
    rows = []
    for count in workers:
        for name, policy in by_name.items():
            outcomes = [replay(order, count, policy(), target=target, startup=startup) for order in shuffled]
            rows.append({"workers": count, "policy": name, **summary(outcomes)})
    return rows


# What an experiment left


@dataclass(frozen=True)
class Whole:
    """The whole trials of an experiment, in their order, and the states of the others, counted."""

    curves: list[Curve]
    others: dict[str, int]

    @property
    def longest(self) -> int:
        """Epochs of the longest curve."""
        return max(len(curve.seconds) for curve in self.curves)

    @property
    def best(self) -> float:
        """The highest val_acc of all trials that did not diverge."""
        return max(max(curve.val_acc) for curve in self.curves if not curve.diverged)


def read_whole(folder: Path) -> Whole:
    """The trials in an experiment's trials.csv and curves.csv that came to their end by themselves.

    Raises:
        InputError: no experiment lies there, it is damaged, or too few of its trials are whole.
    """
    states = _read(folder / "trials.csv", {"trial_id": str, "status": str})
    rows = _read(folder / "curves.csv", {"trial_id": str, "epoch": int, "seconds": float, "val_acc": float})
    by_trial = {str(name): own for name, own in rows.groupby("trial_id")}
    curves, others = [], Counter[str]()
    for name, status in zip(states.trial_id, states.status, strict=True):
        if status not in ("completed", "diverged") or name not in by_trial:
            others[status] += 1
            continue
        own = by_trial[name]
        if own.epoch.tolist() != list(range(1, len(own) + 1)):
            raise InputError(f"{folder / 'curves.csv'} is damaged: the epochs of {name} are not 1, 2, 3, ...")
        curves.append(Curve(name, own.seconds.tolist(), own.val_acc.tolist(), status == "diverged"))
    if others and len(curves) < MINIMUM:
        told = ", ".join(f"{count} {status}" for status, count in others.items())
        raise InputError(
            f"Only {len(curves)} of the {len(states)} trials in {folder} are whole ({told}); {MINIMUM} are needed, for "
            "beyond its end a trial cannot be replayed. A search whose grace_period is max_epochs stops none: "
            f"{whole_command(folder)}"
        )
    if all(curve.diverged for curve in curves):
        raise InputError(f"None of the {len(states)} trials in {folder} came to its end with finite losses.")
    return Whole(curves, dict(others))


def _read(file: Path, types: dict[str, type]) -> pd.DataFrame:
    try:
        table = pd.read_csv(file, usecols=list(types), dtype=types)
        if table.isna().any(axis=None):
            raise ValueError("a cell is empty")
        return table
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file; a search or a grid leaves it.") from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file} is no table of {', '.join(types)} ({reason}).") from error


def asked_of(folder: Path) -> dict[str, Any]:
    """What the experiment says it was asked: recipe, command, and of a search its options; empty if it says nothing."""
    for place in (question_file(folder), folder / "best.json"):
        if place.exists():
            try:
                return read_json(place)
            except (OSError, ValueError) as error:
                raise InputError(f"{place} is damaged ({error}).") from error
    return {}


def whole_command(folder: Path) -> str:
    """The command that trains an experiment's configurations, and one finalist, without stopping any."""
    asked = asked_of(folder)
    recipe, command = asked.get("recipe", {}), asked.get("command", "")
    if not command.startswith("python -m tune.asha "):
        command = f"python -m tune.asha --arch {recipe.get('arch', 'NAME')}"
    longest = recipe.get("max_epochs", "MAX_EPOCHS")
    name = f"{folder.absolute().name}-whole"
    return f"{command} --grace_period {longest} --finalists 1 --finalist_seeds 1 --name {name}"


def asha_of(folder: Path, longest: int, options: ReplayOptions) -> tuple[int, int]:
    """ASHA's grace period and reduction factor: as given, else the experiment's, else those of a search.

    A grace period without rungs, which made the curves whole, is not taken over.

    Raises:
        InputError: the grace period given is longer than the longest curve.
    """
    asked = asked_of(folder).get("search", {})
    factor = options.reduction_factor or asked.get("reduction_factor", SearchOptions.reduction_factor)
    if options.grace_period is not None:
        if options.grace_period > longest:
            raise InputError(
                f"grace_period: {options.grace_period}. Legal: 1 to {longest}, the longest curve's epochs."
            )
        return options.grace_period, factor
    grace = asked.get("grace_period", SearchOptions.grace_period)
    return (grace if grace < longest else SearchOptions.grace_period), factor


# What is said


def time_unit(longest: float) -> tuple[str, float]:
    """The unit for times up to `longest` seconds, and its seconds."""
    units = {"days": 86400.0, "h": 3600.0, "min": 60.0}
    return next(((name, seconds) for name, seconds in units.items() if longest >= 2 * seconds), ("s", 1.0))


def shown(row: dict[str, Any], name: str, decimals: int, unit: float = 1.0) -> str:
    """A measure of a row with its interval, in units of `unit`; what is infinite never happens."""
    low, middle, high = (
        f"{row[key] / unit:.{decimals}f}" if math.isfinite(row[key]) else "never"
        for key in (f"{name}_low", name, f"{name}_high")
    )
    return "never" if low == "never" else f"{middle} ({low} to {high})"


def tables(rows: Sequence[dict[str, Any]], target: float) -> list[Table]:
    """The rows as two tables of 80 columns: all trials, and the way to the target."""
    longest = max(row["wall_seconds_high"] for row in rows)
    name, unit = time_unit(longest)
    decimals = 2 if longest < 9.995 * unit else 1
    whole, way = Table(title="All trials"), Table(title=f"Until val_acc {target:.2%}")
    for table, columns in (
        (whole, ("workers", "policy", "epochs", f"wall time, {name}", "best val_acc, %")),
        (way, ("workers", "policy", "reached", "epochs", f"wall time, {name}")),
    ):
        table.box, table.pad_edge, table.padding = None, False, (0, 2, 0, 0)
        table.title_justify, table.title_style = "left", "bold"
        for column in columns:
            table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for row in rows:
        first = str(row["workers"]), row["policy"]
        time, accuracy = shown(row, "wall_seconds", decimals, unit), shown(row, "val_acc", 2, 0.01)
        whole.add_row(*first, f"{row['epochs']:.0f}", time, accuracy)
        epochs, time = shown(row, "epochs_to_target", 0), shown(row, "wall_seconds_to_target", decimals, unit)
        way.add_row(*first, f"{row['reached']:.0%}", epochs, time)
    return [whole, way]


def lead(found: Whole, settings: dict[str, Any], workers: Sequence[int]) -> str:
    """What is replayed, how, and what the figures are, in a paragraph."""
    trials, grace = settings["trials"], settings["grace_period"]
    text = f"{trials} whole trials of at most {found.longest} epochs, in {settings['orders']} random orders. "
    if found.others:
        left = ", ".join(f"{count} {status}" for status, count in found.others.items())
        text += (
            f"Left out: {left}. Where poor trials were stopped the whole ones are the better ones: reaching the best "
            "looks easier than it is. "
        )
    text += (
        f"ASHA's rungs: grace period {grace}, reduction factor {settings['reduction_factor']}; median stopping begins "
        f"after epoch {grace} too. A trial needs {settings['startup']:g} s (--startup) before its first epoch. Best "
        f"val_acc of all: {found.best:.2%}. Means for all trials, medians until half a point below that best; in "
        "parentheses, where 95% of the orders lie."
    )
    if max(workers) >= trials:
        text += (
            f" With {trials} workers or more all trials begin at once, whatever their order: that is one outcome, not "
            "an interval."
        )
    return text


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = cli.Parser(
        prog="python -m tune.simulate",
        description="Replay a search's curves with any number of workers: wall time, the best val_acc found.",
        allow_abbrev=False,
    )
    parser.options = (ReplayOptions,)
    parser.add_argument("experiment", help="what a search or a grid left: trials.csv, curves.csv")
    parser.add_argument("--workers", nargs="+", default=list(WORKERS), help="trials at once, one number or several")
    parser.add_class_arguments(ReplayOptions, None)
    parser.add_argument("--output", help="folder for simulation.csv and its figure; default: the experiment's")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    asked = vars(parser.parse_args(list(argv)))
    options = ReplayOptions(**{field.name: asked[field.name] for field in fields(ReplayOptions)})
    if impossible := [word for word in asked["workers"] if not word.isdecimal() or int(word) < 1]:
        raise InputError(f"workers: {impossible[0]!r}. Legal: whole numbers, 1 or more.")
    workers = list(dict.fromkeys(map(int, asked["workers"])))
    folder = Path(asked["experiment"])
    output = Path(asked["output"] or folder)
    found = read_whole(folder)
    grace_period, reduction_factor = asha_of(folder, found.longest, options)
    settings = {
        "trials": len(found.curves),
        **vars(options),
        "grace_period": grace_period,
        "reduction_factor": reduction_factor,
        "target": found.best - WITHIN,
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        rows = simulate(
            found.curves,
            policies(grace_period, found.longest, reduction_factor),
            workers,
            orders=options.orders,
            seed=options.seed,
            target=settings["target"],
            startup=options.startup,
        )
        write_csv(output / "simulation.csv", [*rows[0], *settings], [{**row, **settings} for row in rows])
        draw(output)
    except OSError as error:
        raise InputError(f"output: {str(output)!r} cannot be written ({error.strerror}).") from error
    if asked["json"]:
        told = [{k: None if v == math.inf else v for k, v in row.items()} for row in rows]
        print(json.dumps({"experiment": str(folder), **settings, "left_out": found.others, "rows": told}, indent=1))
        return cli.DONE
    print(cli.paragraph(lead(found, settings, workers)))
    console = Console(highlight=False)
    for table in tables(rows, settings["target"]):
        console.print("", table)
    print(f"\n{os.path.relpath(output)}/simulation.csv, figures/simulation.png")
    return cli.DONE


def draw(output: Path) -> None:
    """Draw the folder's simulation.csv."""
    from cifar_lab import plots  # which takes a second to import: not before there is something to draw

    plots.save(plots.simulation(pd.read_csv(output / "simulation.csv")), output / "figures" / "simulation.png")


if __name__ == "__main__":
    cli.run(main)
