"""The live view of a search: a table that updates on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cifar_lab.checkpoint import Row
    from tune.experiment import Experiment, Trial

SHOWN = 12  # rows of the table
HEARTBEAT = 60  # seconds after which plain output says how far it is, though no trial ended
COLUMNS: tuple[tuple[str, int, Literal["left", "right"]], ...] = (
    ("trial", 5, "left"),
    ("epoch", 5, "right"),
    ("rung", 4, "right"),
    ("val_acc", 7, "right"),
    ("best", 6, "right"),
    ("state", 9, "left"),
)
STYLES = {"completed": "green", "diverged": "red", "failed": "red", "stopped": "dim", "pending": ""}


def duration(seconds: float) -> str:
    """Seconds as 45 s, 12 min or 3 h 07 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass
class View:
    """Shows an experiment while `with` holds: a table, redrawn, or a line an ended trial where no terminal listens."""

    experiment: Experiment
    progress: Callable[[], str]
    seconds_left: Callable[[], float]
    milestones: Sequence[int]
    max_epochs: int
    quiet: bool = False
    running: list[str] = field(default_factory=list)
    latest: dict[str, Row] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.spoken = self.start
        self.console = Console(quiet=self.quiet, highlight=False, markup=False)
        self.live: Live | None = None

    def __enter__(self) -> View:
        if self.console.file.isatty() and not self.quiet:  # not where FORCE_COLOR alone makes it a terminal for rich
            self.live = Live(get_renderable=self.render, console=self.console, refresh_per_second=2, transient=True)
            self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.__exit__(kind, error, trace)
            self.console.print(self.render())

    def started(self, job: str) -> None:
        """A job has started, or started again."""
        if job not in self.running:
            self.running.append(job)

    def heard(self, job: str, row: Row) -> None:
        """A running job has ended an epoch."""
        self.latest[job] = row
        if self.live is None and time.monotonic() > self.spoken + HEARTBEAT:
            self._line()

    def _line(self, news: str = "") -> None:
        self.spoken = time.monotonic()
        self.console.print(self.summary() + news, soft_wrap=True)

    def ended(self, job: str, text: str) -> None:
        """A job has ended, for the reason in the text."""
        if job in self.running:
            self.running.remove(job)
        if self.live is None:
            self._line(f" | {job} {text}")

    def summary(self) -> str:
        """The state in one line: how far it is, best so far, time gone and left."""
        parts = [self.progress()]
        if leaders := self.experiment.leaders(1):
            best = leaders[0].best or {}
            parts.append(f"best val_acc {best['val_acc']:.4f} ({leaders[0].trial_id}, epoch {best['epoch']:.0f})")
        parts.append(f"{duration(time.monotonic() - self.start)}, about {duration(self.seconds_left())} left")
        return ", ".join(parts)

    def render(self) -> Group:
        """The summary above the table: running jobs first, then the best of those ended."""
        table = Table(box=None, pad_edge=False, expand=True, padding=(0, 2, 0, 0))
        widest = max(len(job) for job in [*self.running, *self.experiment.trials])
        for name, width, justify in COLUMNS:
            table.add_column(
                name, min_width=max(width, widest if name == "trial" else 0), justify=justify, no_wrap=True
            )
        table.add_column("settings", ratio=1, overflow="ellipsis", no_wrap=True)
        for job in sorted(self.running):
            trial = self.experiment.trials.get(job)
            table.add_row(*self._cells(job, trial, self.latest.get(job)), style="bold")
        ranked = self.experiment.leaders(SHOWN)
        others = [t for t in self.experiment.trials.values() if t.status in ("diverged", "failed")]
        for trial in (ranked + others)[: max(0, SHOWN - len(self.running))]:
            if trial.trial_id not in self.running:
                table.add_row(
                    *self._cells(trial.trial_id, trial, trial.rows[-1] if trial.rows else None),
                    style=STYLES[trial.status],
                )
        return Group(Text(self.summary()), table)

    def _cells(self, job: str, trial: Trial | None, row: Row | None) -> list[str]:
        epoch = int(row["epoch"]) if row else 0
        rung = next((m for m in self.milestones if m > epoch), None) if trial else None  # a finalist has none
        best = trial.best if trial else None
        running = job in self.running
        return [
            job,
            f"{epoch}/{self.max_epochs}",
            (str(rung) if rung else "end") if running else "",
            f"{row['val_acc']:.4f}" if row else "",
            f"{best['val_acc']:.4f}" if best else "",
            "running" if running else trial.status if trial else "",
            settings((trial or self.experiment.trials[job.partition("-")[0]]).searched),
        ]


def settings(searched: dict[str, Any]) -> str:
    """A configuration in few characters: 'lr=0.0039 optimizer=sgd ...', the lr first."""
    ordered = sorted(searched.items(), key=lambda item: (item[0] != "lr", item[0]))
    return " ".join(f"{name}={value}" for name, value in ordered)
