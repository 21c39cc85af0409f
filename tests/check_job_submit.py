"""A search by `ray job submit`, to its end, and one that is stopped; python tests/check_job_submit.py, a minute or two.

A head of its own with a dashboard on 127.0.0.1 runs both; what the jobs print is shown. It is no test of the suite
because it takes too long for one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
QUESTION = "--arch classic_cnn --width 3 --dataset digits --optimizer adam --finalists 1 --finalist_seeds 1"
SMALL, LONG = "--limit_train 100 --num_samples 2 --max_epochs 1", "--num_samples 4 --max_epochs 1000"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def ray(environment: dict[str, str], *words: str) -> str:
    """A command of Ray's, what it printed; tried again as long as the head has no agent yet that takes jobs."""
    for _ in range(10):
        done = subprocess.run([BIN / "ray", *words], capture_output=True, text=True, env=environment, cwd=ROOT)
        if "No available agent" not in done.stdout + done.stderr:
            break
        time.sleep(3)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="job-", dir="/tmp") as place:  # Ray's sockets want a short path
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "XDG_CACHE_HOME": f"{place}/cache",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        dashboard = free_port()
        ports = ["--port", str(free_port()), "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", "0"]
        here = ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--temp-dir", f"{place}/ray"]
        words = [BIN / "ray", "start", "--head", "--block", "--num-cpus", "2", "--include-dashboard", "true"]
        with Path(place, "head").open("w") as out:
            head = subprocess.Popen([*words, *ports, *here], stdout=out, stderr=out, env=environment)
        try:
            address = ["--address", f"http://127.0.0.1:{dashboard}"]
            until = time.monotonic() + 120
            while socket.socket().connect_ex(("127.0.0.1", dashboard)):
                assert head.poll() is None and time.monotonic() < until, Path(place, "head").read_text()
                time.sleep(0.5)
            asked = f"python -m tune.asha --address auto {QUESTION} --results_dir {place}/results".split()
            submit = ["job", "submit", *address, "--working-dir", "."]
            begun = time.monotonic()
            said = ray(environment, *submit, "--", *asked, "--name", "whole", *SMALL.split())
            print(said, f"\n{time.monotonic() - begun:.0f} s")
            best = json.loads(Path(place, "results", "whole", "best.json").read_text())
            assert "succeeded" in said and best["test_n"] == 360 and Path(place, "results/whole/report.html").exists()

            said = ray(environment, *submit, "--no-wait", "--", *asked, "--name", "stopped", *LONG.split())
            job = re.search(r"raysubmit_\w+", said)
            curves, until = Path(place, "results", "stopped", "curves.csv"), time.monotonic() + 120
            while not curves.exists():
                assert job and time.monotonic() < until, said
                time.sleep(0.5)
            ray(environment, "job", "stop", *address, job[0])
            said = ray(environment, "job", "logs", *address, job[0])
            print(said)
            assert said.rstrip().endswith("--resume"), "the command that goes on"
        finally:
            family = [head, *psutil.Process(head.pid).children(recursive=True)] if head.poll() is None else []
            for process in family:
                process.kill()
            head.wait()


if __name__ == "__main__":
    main()
