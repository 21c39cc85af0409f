"""Board: a training as TensorBoard shows it.

`tensorboard --logdir results/runs` shows them all: the scalars are the columns of curves.csv, their step is the epoch;
HPARAMS has a row a training, whose fields are the recipe's, and whose `best_val_acc` is the highest val_acc so far.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from cifar_lab.checkpoint import CURVE_COLUMNS, Row, finite
from cifar_lab.recipe import Recipe

BEST = "best_val_acc"
PREFIX = "events.out.tfevents."  # by which TensorBoard knows its files


class Board:
    """The event files of one training, written after each epoch.

    They are written here and now, not in a thread as torch's SummaryWriter does: an error is the caller's.

    Args:
        folder: where they lie; made with the first epoch.
        recipe: what is trained.
        name: what HPARAMS calls it.
    """

    def __init__(self, folder: Path, recipe: Recipe, name: str) -> None:
        self.folder, self.recipe, self.name = folder, recipe, name
        self.last = 0  # the epoch of the last row written

    def add(self, row: Row) -> None:
        """Write an epoch's row; one that was written here already changes nothing.

        With its first row a resumed training takes the place of what was written of that epoch, and of later ones,
        before.

        Raises:
            OSError: the file cannot be written.
        """
        epoch = int(row["epoch"])
        if epoch <= self.last:
            return
        events = []
        if not self.last:
            earlier = sorted(self.folder.glob(f"{PREFIX}*"))
            self.best = best_of(earlier, epoch)
            self.folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads them in the order of their names, in which a clock may be wrong.
            began = max([int(time.time()), *(1 + int(file.name.split(".")[3]) for file in earlier)])
            self.file = self.folder / f"{PREFIX}{began:010d}.{socket.gethostname()}.{os.getpid()}"
            fields = {name: "unset" if value is None else value for name, value in self.recipe.to_dict().items()}
            events = [
                Event(file_version="brain.Event:2"),
                Event(step=epoch, session_log=SessionLog(status=SessionLog.START)),
                Event(summary=hparams_pb(fields, trial_id=self.name)),
            ]
        values = {name: row[name] for name in CURVE_COLUMNS if name in row and name != "epoch"}
        if finite(row) and "val_acc" in row:
            self.best = max(self.best, row["val_acc"])
            values[BEST] = self.best
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        with self.file.open("ab") as file:
            for event in [*events, Event(step=epoch, summary=Summary(value=scalars))]:
                event.wall_time = time.time()
                RecordWriter(file).write(event.SerializeToString())
        self.last = epoch


def best_of(files: Sequence[Path], epoch: int) -> float:
    """The best val_acc before an epoch, as event files have it; 0 where they know of none."""
    known: dict[int, float] = {}
    for file in files:  # later ones replace what earlier ones say
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == BEST:
                    known[event.step] = value.simple_value
    return max((best for step, best in known.items() if step < epoch), default=0.0)
