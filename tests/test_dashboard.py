"""What a running search shows: Ray's dashboard in a browser, behind its token; metrics; nothing beyond this machine."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pandas as pd
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cifar_lab.data import CIFAR10DataModule
from cifar_lab.recipe import Recipe
from tune import metrics
from tune.metrics import AGAIN, DESCRIPTIONS, Gauges

ROOT = Path(__file__).parents[1]
GRAFANA = ROOT / "deploy" / "grafana.json"
CHROMIUM = shutil.which("chromium")
QUESTION = """--arch classic_cnn --dataset digits --optimizer adam --limit_train 200 --num_samples 3 --max_epochs 60
    --grace_period 60 --finalists 1 --finalist_seeds 1 --max_concurrent 2"""
Shown = dict[tuple[str, str], dict[str, float]]  # by search and trial: a value of each gauge


@dataclass
class Seen:
    """What was seen of a search while it ran, and what it left."""

    folder: Path
    out: str = ""
    samples: list[Shown] = field(default_factory=list)
    listening: set[tuple[str, int]] = field(default_factory=set)
    status: dict[str, int] = field(default_factory=dict)
    token: str = ""
    pages: list[str] = field(default_factory=list)


def answer(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Where a process and its descendants listen."""
    found: set[tuple[str, int]] = set()
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            found |= {c.laddr for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return {(address[0], address[1]) for address in found}


def scrape(targets: list[str]) -> Shown:
    shown: Shown = {}
    for target in targets:
        with contextlib.suppress(urllib.error.URLError, TimeoutError, ConnectionError):
            for family in text_string_to_metric_families(answer(f"http://{target}/metrics")[1]):
                for sample in family.samples:
                    if family.name.startswith("ray_cifar_lab"):
                        job = (sample.labels["search"], sample.labels["trial"])
                        shown.setdefault(job, {})[family.name.removeprefix("ray_")] = sample.value
    return shown


def targets(process: psutil.Process, port: int) -> list[str]:
    """What Prometheus reads of this Ray: the file beside its logs, which the dashboard's own command line names."""
    for one in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = " ".join(one.cmdline())
            if f"--port={port}" in words and (session := re.search(r"--session-dir=(\S+)", words)):
                with contextlib.suppress(FileNotFoundError):
                    file = Path(session[1]) / "prom_metrics_service_discovery.json"
                    return [str(target) for entry in json.loads(file.read_text()) for target in entry["targets"]]
    return []


async def visit(url: str, token: str) -> list[str]:
    """The page's text before the token is typed in, the actors after it, and the jobs, as a browser shows them."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        browser = subprocess.Popen(
            [*words, f"--user-data-dir={profile}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            note = Path(profile) / "DevToolsActivePort"
            while not note.exists() or not note.read_text().strip():
                await asyncio.sleep(0.1)
            port = note.read_text().split()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                    (page,) = [tab for tab in await reply.json() if tab["type"] == "page"]
                async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    count = 0

                    async def call(method: str, **parameters: Any) -> dict[str, Any]:
                        nonlocal count
                        count += 1
                        await socket.send_json({"id": count, "method": method, "params": parameters})
                        while True:
                            said = await socket.receive_json(timeout=100)
                            if said.get("id") == count:
                                return dict(said["result"])

                    async def text(*needed: str) -> str:
                        """The page's text, once it holds what is needed or half a minute has gone."""
                        for _ in range(60):
                            got = await call("Runtime.evaluate", expression="document.body.innerText")
                            if all(word in got["result"].get("value", "") for word in needed):
                                break
                            await asyncio.sleep(0.5)
                        return str(got["result"].get("value", ""))

                    await call("Page.navigate", url=f"{url}/#/actors")
                    before = await text("Authentication Token Required")
                    # The dialog shows before it listens.
                    box = "document.querySelector('input[type=password]')"
                    while "Authentication Token Required" in await text():
                        await call("Runtime.evaluate", expression=f"{box}?.focus(), {box}?.select()")
                        await call("Input.insertText", text=token)
                        for kind in ("keyDown", "keyUp"):
                            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
                            await call("Input.dispatchKeyEvent", type=kind, **key)
                        await asyncio.sleep(1)
                    actors = await text("T000", "ALIVE")
                    await call("Page.navigate", url=f"{url}/#/jobs")
                    return [before, actors, await text("RUNNING")]
        finally:
            browser.terminate()
            browser.wait(timeout=100)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Iterator[Seen]:
    """A search with --dashboard, watched from its first epoch to its end."""
    results = tmp_path_factory.mktemp("results")
    found = Seen(results / "shown")
    # Ray reports every second, not every ten, so that short trials are seen.
    own = {"XDG_CACHE_HOME": str(session_cache), "RAY_metrics_report_interval_ms": "1000", "COLUMNS": "200"}
    words = ["-m", "tune.asha", "--results_dir", str(results), "--name", "shown", "--dashboard", *QUESTION.split()]
    pool = ThreadPoolExecutor(1)
    with (results / "out").open("w") as out:
        search = subprocess.Popen(
            [sys.executable, *words], stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **own}, cwd=ROOT
        )
        try:
            url, until = None, time.monotonic() + 900
            while url is None:
                assert search.poll() is None and time.monotonic() < until, (results / "out").read_text()
                url = re.search(r"Dashboard: (http://127\.0\.0\.1:(\d+))", (results / "out").read_text())
                time.sleep(0.1)
            process, visit_of = psutil.Process(search.pid), None
            ray = Path(sys.executable).with_name("ray")
            found.token = subprocess.run([ray, "get-auth-token"], capture_output=True, text=True).stdout.strip()
            while search.poll() is None:
                assert time.monotonic() < until
                found.samples.append(scrape(targets(process, int(url[2]))))
                if not found.status:
                    found.status = {path: answer(url[1] + path)[0] for path in ("/", "/api/version")}
                if found.samples[-1] and not found.listening:
                    found.listening = listening(process)
                    if CHROMIUM is not None:
                        visit_of = pool.submit(asyncio.run, asyncio.wait_for(visit(url[1], found.token), 120))
                time.sleep(0.2)
            found.pages = visit_of.result() if visit_of else []
        finally:
            pool.shutdown()
            search.terminate()
            search.wait(timeout=200)
    found.out = (results / "out").read_text()
    assert search.returncode == 0, found.out
    yield found


def test_the_dashboard_asks_for_the_token_that_its_command_prints(seen: Seen) -> None:
    assert seen.status == {"/": 200, "/api/version": 401}
    assert re.fullmatch(r"[0-9a-f]{64}", seen.token)
    assert "get-auth-token" in seen.out


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_shows_the_trials_by_their_names_after_signing_in(seen: Seen) -> None:
    before, actors, jobs = seen.pages
    assert "Authentication Token Required" in before and "ALIVE" not in before
    assert "Training" in actors and "ALIVE" in actors
    assert {"T000", "T001"} <= set(re.findall(r"\bT\d{3}\b", actors))
    assert "RUNNING" in jobs and "tune.asha" in jobs.replace("tune/asha", "tune.asha")


def test_nothing_of_a_search_listens_beyond_this_machine(seen: Seen) -> None:
    assert len(seen.listening) > 5, "the test has not seen Ray"
    for address, _ in seen.listening:
        one = ipaddress.ip_address(address)
        assert (getattr(one, "ipv4_mapped", None) or one).is_loopback, seen.listening


def test_every_gauge_is_a_value_of_the_curves(seen: Seen) -> None:
    curves = pd.read_csv(seen.folder / "curves.csv")
    recipe = Recipe(**json.loads((seen.folder / "best.json").read_text())["recipe"])
    images = len(CIFAR10DataModule(recipe).train_indices)
    curves["cifar_lab_images_per_second"] = images / curves.seconds
    curves = curves.rename(columns={"epoch": "cifar_lab_epoch", "val_acc": "cifar_lab_val_acc"})
    whole: set[str] = set()
    for sample in seen.samples:
        for (search, trial), values in sample.items():
            assert search == "shown"
            if "-" in trial:  # a finalist's training, of which no curve is kept
                continue
            own = curves[curves.trial_id == trial]
            for name, value in values.items():
                assert value in [*own[name], *([0] if name == "cifar_lab_epoch" else [])]
            # Ray may send between two gauges being set: not every sample, but most, are of one epoch.
            row = own[own.cifar_lab_epoch == values.get("cifar_lab_epoch")]
            if set(values) == set(DESCRIPTIONS) and all((row[name] == values[name]).all() for name in DESCRIPTIONS):
                whole.add(trial)
    assert whole == set(curves.trial_id) == {"T000", "T001", "T002"}


def test_the_gauges_of_an_ended_trial_disappear_while_others_go_on(seen: Seen) -> None:
    shown = [{trial for _, trial in sample} for sample in seen.samples]
    assert any({"T000", "T001"} <= trials for trials in shown)
    last = max(i for i, trials in enumerate(shown) if "T002" in trials)
    assert not {"T000", "T001"} & shown[last]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """The gauges that are set, from now on, in place of Ray's."""
    said: list[tuple[str, float]] = []
    made = lambda name: SimpleNamespace(set=lambda value, tags: said.append((name, value)))  # noqa: E731
    monkeypatch.setattr(metrics, "_gauge", made)
    return said


def test_a_long_epoch_is_shown_again_and_again_and_a_short_one_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said, clock = recorded(monkeypatch), [1000.0]
    monkeypatch.setattr("tune.metrics.time.monotonic", lambda: clock[0])
    gauges = Gauges("T000", "search")
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(train_indices=range(180)))
    gauges.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert said == [("cifar_lab_epoch", 0)]
    gauges.heard({"epoch": 1, "val_acc": 0.5, "seconds": 2.0})
    assert said[1:] == [("cifar_lab_epoch", 1), ("cifar_lab_val_acc", 0.5), ("cifar_lab_images_per_second", 90)]
    gauges.on_train_batch_end()
    assert len(said) == 4
    clock[0] += AGAIN + 1
    gauges.on_train_batch_end()
    gauges.on_validation_batch_end()
    assert said[4:] == said[1:4]


def test_an_epoch_from_before_a_resume_has_no_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    said = recorded(monkeypatch)
    Gauges("T000", "search").heard({"epoch": 7, "val_acc": 0.5, "seconds": 2.0})
    assert dict(said) == {"cifar_lab_epoch": 7, "cifar_lab_val_acc": 0.5}


def test_gauges_need_no_ray_and_cost_nothing() -> None:
    code = """
import time
from tune.metrics import Gauges
gauges, row = Gauges("T000", "search"), {"epoch": 1, "val_acc": 0.5, "seconds": 2.0}
gauges.heard(row)
begin = time.process_time()
for _ in range(1000):
    gauges.heard(row)
    for _ in range(100):
        gauges.on_train_batch_end()
print(time.process_time() - begin)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1, "a millisecond for an epoch of 100 batches"


def test_grafana_asks_only_for_metrics_and_labels_that_exist() -> None:
    board = json.loads(GRAFANA.read_text())
    titles = [panel["title"] for panel in board["panels"]]
    assert titles == ["val_acc by trial", "epoch by trial", "images/s by trial", "running trials"]
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    asked.append(variables["search"]["query"]["query"])
    assert all(board_word in variables for text in asked for board_word in re.findall(r"\$(\w+)", text))
    named = {name for text in asked for name in re.findall(r"\bray_\w+", text)}
    assert named == {f"ray_{name}" for name in DESCRIPTIONS}
    words = {word for text in asked for word in re.findall(r"\w+", text)} - named
    assert words == {"max", "count", "by", "label_values", "search", "trial"}
