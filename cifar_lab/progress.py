"""Progress: a bar on the terminal while work takes long."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

INTERVAL = 0.25  # seconds between two drawings at least, and before the first
quiet = False  # whether the command of this process was told to be; cli.Parser sets it


def shown() -> bool:
    """Whether bars are drawn: on a terminal, unless the command is quiet."""
    return sys.stdout.isatty() and not quiet


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """No bars for a while."""
    global quiet
    before, quiet = quiet, True
    try:
        yield
    finally:
        quiet = before


class Bar:
    """A bar that disappears at its end, or nothing where none are shown.

    It draws when it is told how far the work is, if it is time to: no thread, and next to nothing a step.

    Args:
        what: what is done.
        total: how much of it.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.shown = shown()
        self.last = time.monotonic()
        self.progress: Progress | None = None

    def reached(self, done: int) -> None:
        """Say how much is done."""
        if not self.shown or time.monotonic() < self.last + INTERVAL:
            return
        if self.progress is None:
            from rich.progress import Progress

            self.progress = Progress(transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self.task = self.progress.add_task(self.what, total=self.total)
            self.progress.start()
        self.progress.update(self.task, completed=done, refresh=True)
        self.last = time.monotonic()

    def close(self) -> None:
        """Take it away."""
        if self.progress is not None:
            self.progress.stop()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
