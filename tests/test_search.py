"""A search, run as its users run it: what it leaves, how it goes on after a fault, what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

from cifar_lab.checkpoint import CURVE_COLUMNS, Row
from cifar_lab.evaluate import accuracy_interval, wilson
from cifar_lab.files import sha256
from tune import campaign
from tune.cluster import Job
from tune.experiment import Experiment, Status
from tune.question import ask
from tune.scheduler import Rungs
from tune.search import Search
from tune.simulate import Curve, policies, replay

ROOT = Path(__file__).parent.parent
CURVES = ["trial_id", "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_macro_f1", "lr", "seconds"]
METRICS = ["epochs", "val_acc", "val_loss", "val_macro_f1", "train_acc", "best_epoch", "seconds", "status", "reason"]
SEARCHED = ["augment", "batch_norm", "dropout", "init", "lr", "weight_decay"]
QUESTION = [
    "--arch",
    "classic_cnn",
    "--dataset",
    "digits",
    "--optimizer",
    "adam",
    "--limit_train",
    "200",
    "--num_samples",
    "5",
    "--max_epochs",
    "4",
    "--finalists",
    "2",
    "--finalist_seeds",
    "2",
]


def start(folder: Path, *words: str, columns: int = 80) -> subprocess.Popen[str]:
    environment = {**os.environ, "COLUMNS": str(columns)}
    command = [sys.executable, "-m", "tune.asha", "--results_dir", str(folder), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


def search(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    process = start(folder, *words)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def files(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv").drop(columns="seconds")


def boards_agree(folder: Path) -> None:
    """TensorBoard's curves of the trials are those of curves.csv; the finalists have theirs beside them."""
    curves, finalists = pd.read_csv(folder / "curves.csv"), pd.read_csv(folder / "finalists.csv")
    ids = {*curves.trial_id, *(f"{t}-s{s}" for t, s in zip(finalists.trial_id, finalists.seed, strict=True))}
    assert {place.name for place in (folder / "tensorboard").iterdir()} == ids
    for trial_id in ids:
        shown = EventAccumulator(str(folder / "tensorboard" / trial_id)).Reload()
        own = curves[curves.trial_id == trial_id]
        for name in CURVES[2:]:
            events = shown.Scalars(name)
            assert [event.step for event in events] == list(range(1, len(own) + 1 if len(own) else 5))
            if len(own):
                assert [event.value for event in events] == own[name].astype("float32").tolist()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def whole(results: Path, session_cache: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """An uninterrupted search, one trial at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(session_cache))
        done = search(results, "--name", "whole", "--max_concurrent", "1", *QUESTION)
    assert done.returncode == 0, done.stderr
    return results / "whole", done


def test_a_search_leaves_exactly_the_promised_files(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = whole
    left = {p.name for p in folder.iterdir()}
    promised = "best.json checkpoints confusion.csv curves.csv figures finalists.csv per_class.csv ray report.html"
    assert left == {*promised.split(), "tensorboard", "test_predictions.csv", "test_readings.jsonl", "trials.csv"}
    assert list(pd.read_csv(folder / "trials.csv")) == ["trial_id", *SEARCHED, *METRICS]
    assert list(pd.read_csv(folder / "curves.csv")) == CURVES
    assert list(pd.read_csv(folder / "finalists.csv")) == ["trial_id", "seed", "best_epoch", "val_acc", "seconds"]
    assert list(pd.read_csv(folder / "per_class.csv")) == ["class", "n", "correct", "accuracy", "low", "high"]
    assert list(pd.read_csv(folder / "test_predictions.csv"))[:4] == ["index", "label", "prediction", "p0"]
    assert set(json.loads((folder / "best.json").read_text())) == {
        *[
            "recipe",
            "trial_id",
            "epoch",
            "val_acc",
            "test_acc",
            "test_n",
            "test_low",
            "test_high",
            "test_acc_seeds",
            "checkpoint",
            "sha256",
            "edges",
        ],
        *["seed", "versions", "hardware", "command", "tta"],
    }


def test_trials_and_curves_tell_the_same_story_as_the_rungs(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = whole
    trials, curves = pd.read_csv(folder / "trials.csv"), pd.read_csv(folder / "curves.csv")
    rungs = Rungs(1, 4, 3)
    for trial in trials.to_dict("records"):
        own = curves[curves.trial_id == trial["trial_id"]]
        best = own.loc[own.val_acc.idxmax()]
        assert trial["epochs"] == len(own) and trial["best_epoch"] == best.epoch
        for name in ("val_acc", "val_loss", "val_macro_f1", "train_acc"):
            assert trial[name] == best[name]
        decisions = [rungs.decide(trial["trial_id"], int(r.epoch), r.val_acc) for r in own.itertuples()]
        assert [d.stop for d in decisions[:-1]] == [False] * (len(own) - 1)
        assert trial["status"] == ("stopped" if decisions[-1].stop else "completed")
        assert trial["reason"] == (str(decisions[-1]) if decisions[-1].stop else "all epochs")
    assert "stopped" in set(trials.status), "the test needs a stopped trial to mean anything"


def test_the_winner_has_the_highest_mean_val_acc_and_only_its_checkpoints_were_tested(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = whole
    best = json.loads((folder / "best.json").read_text())
    trials, finalists = pd.read_csv(folder / "trials.csv"), pd.read_csv(folder / "finalists.csv")
    leaders = trials.sort_values("val_acc", ascending=False, kind="stable").trial_id[:2]
    assert sorted(finalists.trial_id.unique()) == sorted(leaders)
    assert set(finalists.seed) == {1000, 2000}
    means = finalists.groupby("trial_id").val_acc.mean()
    assert means[best["trial_id"]] == means.max()
    own = finalists[finalists.trial_id == best["trial_id"]]
    assert best["val_acc"] == own.val_acc.max() and best["seed"] == own.seed[own.val_acc.idxmax()]
    assert best["epoch"] == own.best_epoch[own.val_acc.idxmax()]
    assert len(best["test_acc_seeds"]) == 2 and best["test_acc"] in best["test_acc_seeds"]
    assert best["recipe"]["seed"] == best["seed"]
    assert best["sha256"] == sha256(folder / best["checkpoint"])
    low, high = accuracy_interval(best["test_acc_seeds"])
    mean = sum(best["test_acc_seeds"]) / 2
    headline = f"Test accuracy {mean:.2%} ({low:.2%} to {high:.2%}, t 95%, 2 seeds, n = 360)."
    assert headline in " ".join(done.stdout.split()) and headline in (folder / "report.html").read_text()


def test_the_test_set_was_read_once_for_each_seed_of_the_winner(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = whole
    best = json.loads((folder / "best.json").read_text())
    readings = [json.loads(line) for line in (folder / "test_readings.jsonl").read_text().splitlines()]
    assert [r["checkpoint"] for r in readings] == [
        f"checkpoints/{best['trial_id']}-s{s}/best.ckpt" for s in (1000, 2000)
    ]
    assert [r["accuracy"] for r in readings] == best["test_acc_seeds"]
    assert [r["sha256"] for r in readings] == [sha256(folder / r["checkpoint"]) for r in readings]
    assert {(r["n"], r["tta"], r["corruption"]) for r in readings} == {(360, "none", None)}
    assert readings[0]["command"].startswith("python -m tune.asha --results_dir")
    assert "The test set was read 2 times for this run" in (folder / "report.html").read_text()


def test_the_test_files_agree_with_scikit_learn(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = whole
    best = json.loads((folder / "best.json").read_text())
    said = pd.read_csv(folder / "test_predictions.csv")
    assert len(said) == best["test_n"] == 360 and list(said["index"]) == list(range(360))
    assert best["test_acc"] == accuracy_score(said.label, said.prediction)
    probabilities = said[[f"p{i}" for i in range(10)]].to_numpy()
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5) and (probabilities.argmax(1) == said.prediction).all()
    counts = confusion_matrix(said.label, said.prediction)
    assert (pd.read_csv(folder / "confusion.csv").iloc[:, 1:].to_numpy() == counts).all()
    per_class = pd.read_csv(folder / "per_class.csv")
    assert (per_class.correct == counts.diagonal()).all() and (per_class.n == counts.sum(1)).all()
    assert [wilson(c, n) for c, n in zip(per_class.correct, per_class.n, strict=True)] == list(
        zip(per_class.low, per_class.high, strict=True)
    )


def test_tensorboard_shows_every_curve_and_what_the_trials_vary(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = whole
    boards_agree(folder)
    for trial in pd.read_csv(folder / "trials.csv").to_dict("records"):
        shown = EventAccumulator(str(folder / "tensorboard" / trial["trial_id"])).Reload()
        content = shown.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
        told = parse_session_start_info_plugin_data(content)
        assert told.group_name == f"whole/{trial['trial_id']}"
        assert {name: getattr(told.hparams[name], told.hparams[name].WhichOneof("kind")) for name in SEARCHED} == {
            name: trial[name] for name in SEARCHED
        }
        assert shown.Scalars("best_val_acc")[-1].value == np.float32(trial["val_acc"])


def test_only_the_best_checkpoints_are_kept_and_they_hold_no_code(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = whole
    finalists = pd.read_csv(folder / "finalists.csv")
    kept = {f"{t}-s{s}" for t, s in zip(finalists.trial_id, finalists.seed, strict=True)} | set(finalists.trial_id)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == kept
    for trial in (folder / "checkpoints").iterdir():
        assert {place.name for place in trial.iterdir()} == {"best.ckpt", "sha256.json"}
        assert "optimizer_states" not in torch.load(trial / "best.ckpt", weights_only=True)


def test_what_is_printed_fits_80_columns_and_is_no_log(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = whole
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert len(lines) < 40
    assert max(len(line) for line in lines if " | T0" not in line) <= 80
    assert re.search(r"Expected: about .* of disk at most", " ".join(lines))


def test_the_report_needs_no_network(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    page = (whole[0] / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*\"", page) and "@import" not in page


def test_resuming_a_finished_search_changes_nothing(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = whole
    before = files(folder)
    done = search(folder.parent, "--name", "whole", "--resume")
    assert done.returncode == 0 and "finished" in done.stdout
    assert files(folder) == before


def test_another_search_is_never_written_into(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = whole
    before = files(folder)
    for words in (["--name", "whole", *QUESTION], ["--name", "whole", "--resume", "--lr", "0.1"]):
        done = search(folder.parent, *words)
        assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "lr was 0.0001 .. 0.01 log-uniform, is now not searched" in " ".join(done.stderr.split())
    assert files(folder) == before


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGINT])
def test_a_search_cut_short_and_resumed_equals_the_uninterrupted_one(
    whole: tuple[Path, subprocess.CompletedProcess[str]], fault: signal.Signals
) -> None:
    folder, _ = whole
    name = fault.name.lower()
    asked = ["--json"] if fault is signal.SIGINT else []
    process = start(folder.parent, "--name", name, "--max_concurrent", "1", *QUESTION, *asked)
    curves = folder.parent / name / "curves.csv"
    until = time.monotonic() + 900
    while (len(curves.read_text().splitlines()) if curves.exists() else 0) < 4:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(fault)
    out, _ = process.communicate(timeout=400)
    reached = len(curves.read_text().splitlines()) - 1
    if fault is signal.SIGINT:
        assert process.returncode == 1
        told = json.loads(out)
        command = told["resume"]
        assert " -m tune.asha " in command and command.endswith("--resume")
        assert told["folder"] == str(folder.parent / name) and sum(told["status"].values()) == 5
        assert told["status"]["pending"] > 0
        words = command.split()[3:]
    else:
        words = ["--name", name, "--resume"]
    done = search(folder.parent, *words) if fault is signal.SIGKILL else search(folder.parent, *words[2:])
    assert done.returncode == 0, done.stderr
    assert reached < len(pd.read_csv(folder / "curves.csv")), "the fault came too late to test anything"
    boards_agree(folder.parent / name)
    if fault is signal.SIGINT:
        assert done.stderr == ""
        told = {"folder": str(folder.parent / name), "resume": None}
        told["status"] = pd.read_csv(folder / "trials.csv").status.value_counts().to_dict()
        assert json.loads(done.stdout) == json.loads((folder.parent / name / "best.json").read_text()) | told
    for file in ("curves", "trials", "finalists"):
        pd.testing.assert_frame_equal(table(folder, file), table(folder.parent / name, file), check_exact=True)


def test_a_finalist_that_is_damaged_before_it_is_tested_is_trained_again(
    whole: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, _ = whole
    shutil.copytree(folder, tmp_path / "whole")
    best = json.loads((folder / "best.json").read_text())
    damaged = tmp_path / "whole" / best["checkpoint"]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    (tmp_path / "whole" / "best.json").unlink()
    refused = search(tmp_path, "--name", "whole", "--resume")
    assert refused.returncode == 1 and "or it is damaged" in " ".join(refused.stderr.split())
    assert "With --resume it is trained again." in " ".join(refused.stderr.split())
    assert refused.stdout.rstrip().endswith("--resume")
    assert search(tmp_path, "--name", "whole", "--resume").returncode == 0
    assert {*map(tuple, table(folder, "finalists").to_numpy())} == {
        *map(tuple, table(tmp_path / "whole", "finalists").to_numpy())
    }
    again = json.loads((tmp_path / "whole" / "best.json").read_text())
    assert again["test_acc_seeds"] == best["test_acc_seeds"] and again["test_acc"] == best["test_acc"]


@pytest.mark.parametrize("trap", ["pickle"], indirect=True)
def test_a_malicious_checkpoint_is_refused_before_a_resumed_search_begins(
    whole: tuple[Path, subprocess.CompletedProcess[str]], trap: Path, tmp_path: Path
) -> None:
    folder, _ = whole
    shutil.copytree(folder, tmp_path / "whole")
    (tmp_path / "whole" / "best.json").unlink()
    place = tmp_path / "whole" / "checkpoints" / "T000"
    place.mkdir(exist_ok=True)
    shutil.copy(trap, place / "last.ckpt")
    (place / "sha256.json").unlink(missing_ok=True)  # an attacker's hand would mend it
    before = files(tmp_path / "whole")
    refused = search(tmp_path, "--name", "whole", "--resume")
    said = " ".join(refused.stderr.split())
    assert refused.returncode == 2 and refused.stdout == ""
    assert said.startswith("error: ") and "last.ckpt is no checkpoint of cifar_lab" in said and "remove" in said
    assert "Traceback" not in said and files(tmp_path / "whole") == before


def test_permuting_the_test_labels_changes_nothing_that_is_searched(
    tmp_path: Path, whole: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    noise = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 20)):
        for i, name in enumerate(("dark", "middle", "light")):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for j in range(count):
                pixels = noise.integers(60 * i, 60 * i + 110, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{j:02}.png")
    words = [
        "--arch",
        "classic_cnn",
        "--dataset",
        "folder",
        "--num_samples",
        "3",
        "--max_epochs",
        "2",
        "--finalists",
        "1",
        "--finalist_seeds",
        "1",
    ]
    common = [
        *words,
        "--optimizer",
        "adam",
        "--max_concurrent",
        "1",
        "--data_dir",
        os.path.relpath(tmp_path / "images", ROOT),
    ]
    assert search(tmp_path, "--name", "right", *common).returncode == 0
    test = tmp_path / "images" / "test"
    for before, after in (("dark", "swap"), ("middle", "dark"), ("light", "middle"), ("swap", "light")):
        (test / before).rename(test / after)
    assert search(tmp_path, "--name", "wrong", *common).returncode == 0
    for file in ("curves", "trials", "finalists"):
        pd.testing.assert_frame_equal(
            table(tmp_path / "right", file), table(tmp_path / "wrong", file), check_exact=True
        )
    right, wrong = (json.loads((tmp_path / name / "best.json").read_text()) for name in ("right", "wrong"))
    assert right["test_acc"] != wrong["test_acc"]


def test_a_larger_num_samples_goes_on_with_new_trials_and_the_rungs_of_the_old_ones(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = whole
    fewer = [*QUESTION, "--max_concurrent", "1", "--num_samples", "3"]
    assert search(folder.parent, "--name", "grown", *fewer).returncode == 0
    assert search(folder.parent, "--name", "grown", "--resume", "--num_samples", "5").returncode == 0
    grown = folder.parent / "grown"
    for file in ("curves", "trials"):
        pd.testing.assert_frame_equal(table(folder, file), table(grown, file), check_exact=True)
    assert table(folder, "trials").reason.str.contains("below the cutoff").iloc[3:].any(), "the rungs decided nothing"
    finalists = table(grown, "finalists").merge(table(folder, "finalists"))
    assert len(finalists) == len(table(folder, "finalists")), "all that decide are there, and equal"
    best, again = (json.loads((place / "best.json").read_text()) for place in (folder, grown))
    assert [best[name] for name in ("trial_id", "test_acc")] == [again[name] for name in ("trial_id", "test_acc")]
    kept = {f"{t}-s{s}" for t, s in zip(finalists.trial_id, finalists.seed, strict=True)} | set(finalists.trial_id)
    assert {p.name for p in (grown / "checkpoints").iterdir()} == kept, "none of those that the new ones displaced"


def test_where_every_trial_diverged_only_others_can_help(results: Path, session_cache: Path) -> None:
    words = "--name diverged --arch classic_cnn --dataset digits --limit_train 200 --max_epochs 2 --num_samples 2 "
    diverging = "--optimizer sgd --lr 1e6 --batch_norm false --finalists 1 --finalist_seeds 1"
    first = search(results, *(words + diverging).split())
    trials = pd.read_csv(results / "diverged" / "trials.csv")
    assert set(trials.status) == {"diverged"} and (trials.epochs == 1).all()
    assert trials.reason.str.contains("epoch 1: train_loss nan").all()
    assert first.returncode == 1 and "Traceback" not in first.stderr
    *_, said, command = first.stdout.splitlines()
    assert said == "Every trial diverged. Give a larger --num_samples, for others:" and command.endswith("--resume")


def row(epoch: int, val_acc: float) -> Row:
    """An epoch's row of curves.csv, with the gpu_share that a worker adds."""
    return dict.fromkeys((*CURVE_COLUMNS, "gpu_share"), 0.5) | {"epoch": epoch, "val_acc": val_acc}


def prepared(folder: Path) -> Search:
    """A search of four trials, before any has begun."""
    words = "--arch classic_cnn --dataset digits --num_samples 4 --max_epochs 1 --finalists 2 --finalist_seeds 2"
    search = Search(ask([*words.split(), "--quiet", "--gpus_per_trial", "0", "--results_dir", str(folder)]))
    search.prepare()
    search.open_record()
    return search


def test_what_the_end_wants_is_imported_while_trials_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wanted_afterwards.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Search, "AFTERWARDS", ("wanted_afterwards",))
    imported: list[bool] = []

    def run(jobs: Callable[[], Iterable[Job]], *, judge: Any, **rest: Any) -> None:
        assert list(jobs())
        imported.append("wanted_afterwards" in sys.modules)
        judge("T000", row(1, 0.5))
        patience = time.monotonic() + 60
        while "wanted_afterwards" not in sys.modules and time.monotonic() < patience:
            time.sleep(0.01)
        imported.append("wanted_afterwards" in sys.modules)

    monkeypatch.setattr(campaign, "run_jobs", run)
    prepared(tmp_path / "results").work()
    assert imported == [False, True]


def test_a_free_place_is_given_to_a_finalist_as_soon_as_no_trial_can_displace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = prepared(tmp_path)
    begun: list[list[str]] = []

    def run(jobs: Callable[[], Iterable[Job]], *, judge: Any, on_start: Any, on_end: Any, **rest: Any) -> None:
        assert [job.job_id for job in jobs()] == ["T000", "T001", "T002", "T003"]
        for trial_id, val_acc in (("T001", 0.5), ("T003", 0.7), ("T000", 0.6), ("T002", 0.1)):
            judge(trial_id, row(1, val_acc))
            on_end(trial_id, "")
            begun.append([job.job_id for job in jobs() if "-" in job.job_id])

    monkeypatch.setattr(campaign, "run_jobs", run)
    search.work()
    # With two trials under way either may overtake; with one, the better of those ended is sure, however it ends.
    assert begun == [[], [], ["T003-s1000", "T003-s2000"], ["T003-s1000", "T000-s1000", "T003-s2000", "T000-s2000"]]
    assert search.progress() == "4/4 trials, 0/4 finalists"


def test_a_trial_that_failed_displaces_no_finalist(tmp_path: Path) -> None:
    made = Experiment(tmp_path, {name: {} for name in ("T000", "T001", "T002")})
    states: dict[str, Status] = {"T000": "completed", "T001": "failed"}
    for name, status in states.items():
        made.record(name, row(1, 0.5))
        made.conclude(name, status)
    assert made.lineup(1, [7]) == [], "T002 is still to come"
    made.conclude("T002", "diverged")
    assert made.lineup(1, [7]) == [("T000", 7)] and not made.trained(1, [7])


def test_what_a_displaced_finalist_left_under_way_is_removed(tmp_path: Path) -> None:
    made = Experiment(tmp_path, {name: {} for name in ("T000", "T001")})
    for name, val_acc in (("T000", 0.5), ("T001", 0.9)):
        made.record(name, row(1, val_acc))
        made.conclude(name, "completed")
        (made.checkpoints(f"{name}-s1000")).mkdir(parents=True)
    made.tidy(1)
    assert [place.name for place in tmp_path.glob("checkpoints/*")] == ["T001-s1000"]


def test_a_decision_is_taken_once_whenever_the_driver_dies(tmp_path: Path) -> None:
    trials: dict[str, dict[str, Any]] = {name: {} for name in ("T000", "T001", "T002")}
    first = Experiment(tmp_path, trials)
    for name, val_acc in (("T000", 0.3), ("T001", 0.5), ("T002", 0.2)):
        first.record(name, row(1, val_acc))
        if name != "T002":  # which the driver did not live to judge
            first.save_trials()
    search = Search.__new__(Search)
    search.experiment, search.rungs = Experiment(tmp_path, trials), Rungs(1, 9, 3)
    search.take_up()
    kept = Experiment(tmp_path, trials).trials
    assert [kept[name].status for name in trials] == ["pending", "pending", "stopped"]
    assert kept["T002"].reason == "rung 1: below the cutoff 0.4333 of the 2 before it"
    assert not search.decide("T000", row(1, 0.3)), "it had passed as the first, and repeats that epoch"


def test_one_worker_replays_the_searchs_curves_to_the_decisions_that_it_took(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    trials, curves = (pd.read_csv(whole[0] / f"{name}.csv", dtype={"trial_id": str}) for name in ("trials", "curves"))
    by_trial = [(name, curves[curves.trial_id == name]) for name in trials.trial_id]
    measured = [Curve(name, own.seconds.tolist(), own.val_acc.tolist()) for name, own in by_trial]
    taken = set()

    def noting(trial_id: str, epoch: int, value: float) -> bool:
        stop = asha(trial_id, epoch, value)
        if stop:
            taken.add(trial_id)
        return stop

    asha = policies(1, 4, 3)["ASHA"]()
    assert replay(measured, 1, noting).trained == dict(zip(trials.trial_id, trials.epochs, strict=True))
    assert taken == set(trials.trial_id[trials.status == "stopped"])
