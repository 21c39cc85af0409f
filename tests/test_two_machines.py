"""Two machines that share neither disk nor address: a search on both, killed and resumed.

They are network and mount namespaces of this machine, with an FTP server as the storage that both reach.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUESTION = (
    "--arch classic_cnn --width 3 --dataset folder --optimizer adam --num_samples 4 --max_epochs 6 --grace_period 6 "
    "--finalists 1 --finalist_seeds 2"
)


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
RAY = str(Path(sys.executable).with_name("ray"))
IMAGES = """
import numpy as np
from pathlib import Path
from PIL import Image
noise = np.random.default_rng(0)
for part in ("train", "test"):
    for name in ("apple", "pear"):
        folder = Path("{}") / part / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(20):
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{{i}}.png")
"""
SERVER = """
import logging
from pathlib import Path
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer
logging.disable()  # nobody reads it
Path("{1}").mkdir()
authorizer = DummyAuthorizer()
authorizer.add_user("lab", "secret", "{1}", perm="elradfmwMT")
FTPHandler.authorizer = authorizer
FTPServer(("{0}", 2121), FTPHandler).serve_forever()
"""


class Machine:
    """A host of its own: an address, and a disk which no other machine sees, at the same place on each."""

    def __init__(self, name: str, address: str, disk: Path) -> None:
        self.name, self.address, self.disk = name, address, disk
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
        holder = f"mount -t tmpfs tmpfs {disk} && echo ready && exec sleep infinity"
        words = ["ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c", holder]
        self.holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "ready\n"

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        inside = ["nsenter", "--target", str(self.holder.pid), "--mount", "--net", *words]
        # What was said to Ray on this machine, by a variable or another test, is not said there.
        given = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {"XDG_CACHE_HOME": f"{self.disk}/cache", "EPOCHS_TRAINED": f"{self.disk}/epochs", **TOKEN, **environment}
        return subprocess.Popen(
            inside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**given, **own}, cwd=ROOT
        )

    def run(self, *words: str, **environment: str) -> str:
        process = self.start(*words, **environment)
        out, _ = process.communicate(timeout=900)
        assert process.returncode == 0, out
        return out

    def end(self) -> None:
        """End all that runs here, and the machine."""
        here = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        subprocess.run(["kill", "-9", *here], capture_output=True)
        self.holder.wait()
        assert self.holder.stdout is not None
        self.holder.stdout.close()
        ip("netns", "delete", self.name)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    """Two machines, joined by a cable, with Ray on both and images on the first only."""
    disk = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))  # Ray's sockets want a short path
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, disk)
        made: list[Machine] = []
        try:
            for number in (1, 2):
                made.append(Machine(f"lab{os.getpid()}-{number}", f"10.77.0.{number}", disk))
                stack.callback(made[-1].end)
            cable = [f"v{os.getpid()}-{number}" for number in (1, 2)]
            ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
            for machine, end in zip(made, cable, strict=True):
                ip("link", "set", end, "netns", machine.name)
                ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", end)
                ip("-n", machine.name, "link", "set", end, "up")
        except (OSError, subprocess.CalledProcessError, AssertionError) as error:
            pytest.skip(f"no namespaces can be made here: {error}")
        yield made


@pytest.fixture(scope="module")
def cluster(machines: list[Machine], counter_site: Path) -> list[Machine]:
    """Ray on both machines, each with one core."""
    head, worker = machines
    own = {"PYTHONPATH": f"{counter_site}:{ROOT}", "RAY_worker_niceness": "0"}
    common = ["--num-cpus", "1", "--disable-usage-stats"]
    first = ["--head", "--include-dashboard", "false", "--temp-dir", f"{head.disk}/ray"]
    head.run(RAY, "start", *first, "--node-ip-address", head.address, *common, **own)
    worker.run(RAY, "start", "--address", f"{head.address}:6379", "--node-ip-address", worker.address, *common, **own)
    return machines


def search(head: Machine, *words: str) -> subprocess.Popen[str]:
    asked = ["-m", "tune.asha", "--results_dir", f"{head.disk}/results", "--name", "both", *words]
    return head.start(sys.executable, *asked, COLUMNS="200")


def read(machine: Machine, place: str) -> str:
    return machine.run("sh", "-c", f"cat {machine.disk}/{place} 2>/dev/null || true")


def test_a_disk_that_one_machine_lacks_is_refused_and_the_way_out_named(cluster: list[Machine]) -> None:
    head, worker = cluster
    head.run(sys.executable, "-c", IMAGES.format(f"{head.disk}/images"))
    process = search(head, "--address", f"{head.address}:6379", "--data_dir", f"{head.disk}/images", *QUESTION.split())
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 2, out
    assert f"results_dir: '{head.disk}/results/both' is not seen from {worker.address}." in " ".join(out.split())
    assert "--storage" in out and "Traceback" not in out


def test_a_search_on_both_killed_and_resumed_loses_nothing(cluster: list[Machine]) -> None:
    head, worker = cluster
    head.run(sys.executable, "-c", IMAGES.format(f"{head.disk}/images"))
    server = head.start(sys.executable, "-c", SERVER.format(head.address, f"{head.disk}/storage"))
    where = ["--address", f"{head.address}:6379", "--data_dir", f"{head.disk}/images"]
    where += ["--storage", f"ftp://lab:secret@{head.address}:2121/checkpoints"]
    process = search(head, *where, *QUESTION.split())
    until = time.monotonic() + 900
    while len(read(head, "results/both/curves.csv").splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
    process.kill()
    process.communicate()
    begun = len(read(head, "results/both/curves.csv").splitlines()) - 1
    resumed = search(head, "--resume", *where[:2])
    out, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, out
    trials = [line.split(",") for line in read(head, "results/both/trials.csv").splitlines()]
    assert [row[trials[0].index("status")] for row in trials[1:]] == ["completed"] * 4
    best = json.loads(read(head, "results/both/best.json"))
    assert best["test_n"] == 40 and len(best["test_acc_seeds"]) == 2
    head.run("test", "-s", f"{head.disk}/results/both/{best['checkpoint']}")
    trained = [Counter(read(machine, "epochs").splitlines()) for machine in cluster]
    assert all(trained), "both machines trained"
    once_more = sum((trained[0] + trained[1]).values()) - (4 * 6 + 2 * 6)
    assert begun >= 3 and once_more <= 2, "the kill cost at most the epoch that was under way, a trial"
    assert "images.npy" in worker.run("sh", "-c", f"ls {worker.disk}/cache/cifar_lab/folder-train-*"), "it had none"
    assert "images" not in worker.run("ls", str(worker.disk)).split()
    assert "ckpt" not in head.run("find", f"{head.disk}/storage"), "what was kept is in the results"
    server.kill()
    server.communicate()
