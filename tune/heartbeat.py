"""Heartbeat: a training that stops making steps is killed, so that Ray tries it again."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback

from cifar_lab.files import HUNG

INTERVAL = 1.0  # seconds between two beats at least: a step may take two milliseconds

# A process of its own: it also kills what hangs in native code, or was stopped by a signal. It ends with its parent.
WATCH = """
import os, signal, sys, time
parent, beat, note, patience = int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
pause = min(1.0, patience / 4)
last, silent = None, 0.0  # counted in pauses: the clock may be set, the machine sleep
while os.getppid() == parent:
    time.sleep(pause)
    try:
        now = os.stat(beat).st_mtime_ns
    except FileNotFoundError:
        break
    silent = silent + pause if now == last else 0.0
    last = now
    if silent > patience:
        os.kill(parent, signal.SIGKILL)  # before the note: what hangs may be the disk
        open(note, "w").write(f"no step for {silent:.0f} s")
        break
"""


class Heartbeat(Callback):
    """Touches a file when a step, of training or of validation, was made; silent for too long, the process is killed.

    It begins with the first step: what comes before it may wait for another process that decodes the images.

    Args:
        folder: where the note, HUNG, is left for whoever asks why.
        patience: seconds.
    """

    def __init__(self, folder: Path, patience: float) -> None:
        self.note, self.patience = folder / HUNG, patience
        self.watch: subprocess.Popen[bytes] | None = None
        self.last = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.note.unlink(missing_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="heartbeat-")
        os.close(descriptor)
        self.file = Path(name)
        words = [sys.executable, "-S", "-c", WATCH, str(os.getpid()), name, str(self.note), str(self.patience)]
        self.watch = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)

    def beat(self) -> None:
        """Say that there is life."""
        if time.monotonic() > self.last + INTERVAL:
            self.last = time.monotonic()
            os.utime(self.file)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Beat while the block waits for another process, which may take its time."""
        if self.watch is None:
            yield
            return
        over = threading.Event()

        def beats() -> None:
            while not over.wait(INTERVAL):
                os.utime(self.file)

        thread = threading.Thread(target=beats, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            os.utime(self.file)

    def on_train_batch_end(self, *_: Any) -> None:
        self.beat()

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.beat()

    def end(self) -> None:
        """Watch no longer."""
        if self.watch is not None:
            self.file.unlink(missing_ok=True)
            self.watch.kill()
            self.watch.wait()
            self.watch = None


@contextlib.contextmanager
def watched(folder: Path, patience: float) -> Iterator[Heartbeat]:
    """A heartbeat that ends with the block, however that ends: the process may go on with another training."""
    heartbeat = Heartbeat(folder, patience)
    try:
        yield heartbeat
    finally:
        heartbeat.end()
