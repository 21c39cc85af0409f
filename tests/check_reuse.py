"""Whether workers that are used again leak: a search of 100 trials; python tests/check_reuse.py, a minute or two.

The private memory of every process that trains is read as the search goes on, and must not grow with the trials. It is
no test of the suite because it takes too long for one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
TRIALS = 100
LOADED = 200e6  # bytes: with less a process has not imported torch, and trains nothing
GROWTH = 20e6  # bytes, over the second half of the trials: a leak would go on
SEARCH = f"tune.asha --arch classic_cnn --dataset digits --num_samples {TRIALS} --max_epochs 2 --max_concurrent 1"
FINALE = "--finalists 1 --finalist_seeds 1 --name reuse --quiet"


def ended(folder: Path) -> int:
    """The trials that have come to their end."""
    try:
        return sum(",pending," not in line for line in (folder / "trials.csv").read_text().splitlines()[1:])
    except OSError:
        return 0


def private(search: psutil.Process) -> dict[int, int]:
    """Bytes that each of Ray's processes at work has to itself, by its id."""
    found = {}
    for process in search.children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::") and "IDLE" not in process.cmdline()[0]:
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                found[process.pid] = int(re.search(r"Anonymous: +(\d+)", rollup)[1]) * 1024
        except (psutil.Error, IndexError, OSError):
            continue
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "runs", "reuse")
        words = [sys.executable, "-m", *SEARCH.split(), *FINALE.split(), "--results_dir", str(folder.parent)]
        began = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"XDG_CACHE_HOME": f"{place}/cache"})
        search = psutil.Process(began.pid)
        seen: dict[int, list[tuple[int, int]]] = {}
        while began.poll() is None:
            done = ended(folder)
            for pid, size in private(search).items():
                if size > LOADED:
                    seen.setdefault(pid, []).append((done, size))
            time.sleep(0.5)
        assert began.returncode == 0
        worker = max(seen.values(), key=len)
    at = {n: max(size for done, size in worker if done <= n) for n in (1, 20, TRIALS // 2, TRIALS)}
    print(f"{len(seen)} processes trained; private MB of the first at most, by the trials that had ended:")
    print(", ".join(f"{n}: {size / 1e6:.0f}" for n, size in at.items()))
    assert len(seen) == 1, "the finalist is trained where the trials were"
    assert at[TRIALS] - at[TRIALS // 2] < GROWTH


if __name__ == "__main__":
    main()
