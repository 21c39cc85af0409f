"""A grid under way: how its settings are compared and given up, what it leaves, how it goes on after a fault."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from cifar_lab.evaluate import wilson
from cifar_lab.fit import fit
from cifar_lab.recipe import InputError, Recipe
from tune.experiment import Status, Trial
from tune.grid import METRICS, Grid, Setting, best_setting, survivors
from tune.grid_question import GridOptions, GridQuestion
from tune.kfold import ask, main
from tune.space import Choice

ROOT = Path(__file__).parent.parent
EPOCHS, FOLDS = 6, 3
LRS = (0.00001, 0.001, 0.003)
QUESTION = (
    "--arch classic_cnn --dataset digits --optimizer adam --augment false --limit_train 240 "
    f"--max_epochs {EPOCHS} --folds {FOLDS} --prune_after 1 --keep 0.5 --grid lr={','.join(map(str, LRS))}"
).split()
# Every training of a grid appends a line to this file when it has saved an epoch's checkpoint.
COUNTED = """
import os
_replace = os.replace
def replace(source, target, **how):
    _replace(source, target, **how)
    if str(target).endswith("last.ckpt"):
        with open(os.environ["EPOCHS_SAVED"], "a") as file:
            file.write(f"{target}\\n")
os.replace = replace
"""


def curve(accuracies: list[float], **more: float) -> list[dict[str, float]]:
    """The rows of a training with these val_acc; the other metrics are functions of it, each another one."""
    return [
        {
            "epoch": i, "val_acc": a, "val_loss": 3 - a, "val_macro_f1": a / 2, "train_acc": a / 3, "train_loss": 4 - a,
            "lr": 0.1, "seconds": i / 8, **more,
        }
        for i, a in enumerate(accuracies, start=1)
    ]  # fmt: skip


def setting(*curves: list[float], states: tuple[Status, ...] = (), name: str = "G00") -> Setting:
    kept = states or ("completed",) * len(curves)
    trainings = [
        Trial(f"{name}-f{i}", {}, curve(values), state, f"why {state}")
        for i, (values, state) in enumerate(zip(curves, kept, strict=True))
    ]
    return Setting(name, {"lr": 0.1}, trainings)


# How settings are compared


def test_the_epoch_is_that_of_the_best_mean_not_the_mean_of_the_best_epochs() -> None:
    # Each fold has its best epoch elsewhere; together the third is best.
    found = setting([0.9, 0.1, 0.6], [0.1, 0.9, 0.8], [0.2, 0.3, 0.7]).at_best()
    assert found["best_epoch"] == 3 and found["folds"] == 3
    assert found["val_acc"] == pytest.approx(0.7) != pytest.approx((0.9 + 0.9 + 0.7) / 3)
    assert found["val_loss"] == pytest.approx(3 - 0.7) and found["train_loss"] == pytest.approx(4 - 0.7)
    assert found["val_macro_f1"] == pytest.approx(0.35) and found["train_acc"] == pytest.approx(0.7 / 3)
    assert found["seconds"] == pytest.approx(3 * (1 + 2 + 3) / 8)


fractions = st.integers(0, 1000).map(lambda i: i / 1000)


@given(st.integers(2, 5).flatmap(lambda n: st.lists(st.lists(fractions, min_size=n, max_size=n), min_size=2)))
def test_spread_and_interval_are_scipys(curves: list[list[float]]) -> None:
    found = setting(*curves).at_best()
    means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    assert found["best_epoch"] == means.index(max(means)) + 1, "the first of equals"
    at = [values[found["best_epoch"] - 1] for values in curves]
    assert found["val_acc"] == pytest.approx(max(means)) and found["val_acc_std"] == pytest.approx(statistics.stdev(at))
    if len(set(at)) > 1:
        low, high = scipy.stats.t.interval(0.95, len(at) - 1, loc=statistics.fmean(at), scale=scipy.stats.sem(at))
        low, high = max(low, 0.0), min(high, 1.0)
        assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_one_training_has_neither_spread_nor_interval_and_none_has_nothing() -> None:
    found = setting([0.1, 0.4, 0.4]).at_best()
    assert found["best_epoch"] == 2 and found["val_acc"] == 0.4
    assert found["val_acc_std"] is found["low"] is found["high"] is None
    assert setting([], []).at_best() == {}


def test_the_first_folds_alone_can_be_compared_and_an_unbegun_fold_counts_not() -> None:
    made = setting([0.9, 0.1], [0.1, 0.8], [])
    assert made.at_best(1)["best_epoch"] == 1 and made.at_best(1)["val_acc"] == 0.9
    assert made.at_best()["best_epoch"] == 1 or made.at_best()["folds"] == 2
    assert made.at_best()["val_acc"] == pytest.approx(0.5) and made.at_best()["folds"] == 2


def test_folds_of_unequal_length_are_compared_over_the_epochs_that_all_have() -> None:
    found = setting([0.1, 0.2, 0.9], [0.1, 0.4]).at_best()
    assert found["best_epoch"] == 2 and found["val_acc"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("states", "whole"),
    [
        (("completed", "completed"), "completed"),
        (("completed", "stopped"), "stopped"),
        (("completed", "pending"), "pending"),
        (("diverged", "stopped"), "diverged"),
        (("diverged", "failed"), "failed"),
        (("pending", "failed"), "failed"),
    ],
)
def test_a_settings_status_is_its_folds_worst(states: tuple[Status, ...], whole: str) -> None:
    made = setting([0.1], [0.2], states=states)
    assert made.status == whole and made.row()["reason"] == f"why {whole}"


def test_the_best_setting_came_to_its_end_in_every_fold() -> None:
    sound = setting([0.3], [0.5], name="G00")
    others = [
        setting([0.9], [0.9], states=("completed", state), name=f"G{i:02d}")
        for i, state in enumerate(("stopped", "diverged", "failed", "pending"), start=1)
    ]
    twin = setting([0.5], [0.3], name="G09")
    assert best_setting([*others, sound, twin]) is sound, "the earlier of two equals"
    assert best_setting(others) is None and best_setting([]) is None


keeps = st.fractions(Fraction(1, 50), 1, max_denominator=50)


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, -1.0]), min_size=1, max_size=24), keeps)
def test_survivors_are_those_of_a_brute_force_model(values: list[float], keep: Fraction) -> None:
    means = {f"G{i:02d}": value for i, value in enumerate(values)}
    count = ceil(keep * len(values))
    expected = [name for name, mean in means.items() if sum(other > mean for other in values) < count]
    assert survivors(means, float(keep)) == expected
    assert len(expected) >= count and (keep < 1 or len(expected) == len(values))


def test_survivors_are_rounded_up_and_ties_survive_together() -> None:
    means = {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.2, "e": 0.4}
    assert survivors(means, 0.4) == ["b", "e"] and survivors(means, 0.2) == ["e"]
    assert survivors(means, 0.41) == survivors(means, 0.6) == ["b", "c", "d", "e"]
    assert survivors(means, 1.0) == list(means)
    assert len(survivors({str(i): i for i in range(100)}, 0.07)) == 7, "0.07 * 100 is more than 7 to a computer"


def opened(folder: Path, first: dict[str, tuple[list[float], Status]]) -> Grid:
    """A grid of which the first of two folds is trained."""
    settings = [{"lr": 0.1 * (i + 1)} for i in range(len(first))]
    base = Recipe(**{"arch": "classic_cnn", "dataset": "digits", "folds": 2, "max_epochs": 2})
    question = GridQuestion(
        options=GridOptions(prune_after=1), base=base, settings=settings, folder=folder, command="", given={}
    )
    grid = Grid(question.checked())
    grid.open_record()
    for name, (values, state) in first.items():
        trial = grid.experiment.trials[f"{name}-f0"]
        trial.rows, trial.status = curve(values), state
    return grid


def test_pruning_gives_up_the_folds_to_come_of_the_poorest(tmp_path: Path) -> None:
    grid = opened(tmp_path, {f"G{i:02d}": ([0.1, a], "completed") for i, a in enumerate((0.5, 0.2, 0.4, 0.7))})
    for _ in range(2):  # a resumed grid prunes again, and comes to the same
        grid.prune(1)
        states = {name: (t.status, t.reason) for name, t in grid.experiment.trials.items() if name.endswith("-f1")}
        assert states == {
            "G00-f1": ("pending", ""),
            "G01-f1": ("stopped", "pruned: mean val_acc 0.2000 after 1 folds, below 0.5000"),
            "G02-f1": ("stopped", "pruned: mean val_acc 0.4000 after 1 folds, below 0.5000"),
            "G03-f1": ("pending", ""),
        }
        assert all(grid.experiment.trials[f"G0{i}-f0"].status == "completed" for i in range(4))


def test_with_json_the_last_words_are_json_whenever_they_are_asked_for(tmp_path: Path) -> None:
    grid = opened(tmp_path, {"G00": ([0.1], "completed"), "G01": ([0.2], "diverged")})
    assert grid.last_words().endswith(" --resume")
    grid.question = dataclasses.replace(grid.question, command="python -m tune.kfold --json", json=True)
    told = json.loads(grid.last_words())
    assert told["status"] == {"completed": 1, "diverged": 1, "pending": 2} and told["folder"] == str(tmp_path)
    assert told["resume"].endswith(" -m tune.kfold --json --resume")
    grid.before = [{"resume": None}]  # of a study's first variant
    assert json.loads(grid.last_words()) == [{"resume": None}, told]


def test_a_diverged_setting_takes_no_sound_ones_place(tmp_path: Path) -> None:
    grid = opened(tmp_path, {"G00": ([0.9], "diverged"), "G01": ([0.2, 0.3], "completed")})
    grid.prune(1)
    assert grid.experiment.trials["G01-f1"].status == "pending", "else no setting can win"


# A grid as its users run it: killed in the middle, gone on with


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    hooks = folder / "hooks"
    hooks.mkdir(parents=True, exist_ok=True)
    (hooks / "sitecustomize.py").write_text(COUNTED)
    environment = {
        **os.environ, "COLUMNS": "80", "RAY_worker_niceness": "0", "PYTHONPATH": str(hooks),
        "EPOCHS_SAVED": str(folder / "epochs"),
    }  # fmt: skip
    command = [sys.executable, "-m", "tune.kfold", "--results_dir", str(folder), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


def files(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def lengths(place: Path) -> Counter[str]:
    """Epochs recorded in a curves.csv, a training."""
    return (
        Counter(line.partition(",")[0] for line in place.read_text().splitlines()[1:]) if place.exists() else Counter()
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> dict[str, Any]:
    """A grid whose driver was killed while a training was under way, and which then went on."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(session_cache))
        patch.delenv("CIFAR_LAB_DATA", raising=False)
        process = start(folder, "--name", "grid", *QUESTION)
        curves, until = folder / "grid" / "curves.csv", time.monotonic() + 900
        while not any(2 <= n < 4 for n in lengths(curves).values()):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=400)
        reached = lengths(curves)
        done = start(folder, "--name", "grid", "--resume")
        out, err = done.communicate(timeout=900)
    assert done.returncode == 0, err
    saved = (folder / "epochs").read_text().splitlines()
    return {
        "folder": folder / "grid",
        "reached": reached,
        "out": out,
        "err": err,
        "saved": Counter(Path(line).parent.name for line in saved),
    }


def curves_of(run: dict[str, Any]) -> pd.DataFrame:
    return pd.read_csv(run["folder"] / "curves.csv")


def test_a_grid_leaves_the_promised_files_and_no_checkpoint(run: dict[str, Any]) -> None:
    folder = run["folder"]
    promised = "best.json checkpoints curves.csv figures ray report.html settings.csv tensorboard trials.csv"
    assert {p.name for p in folder.iterdir()} == set(promised.split())
    assert not list((folder / "checkpoints").iterdir()), "folds are compared; their weights are of no use"
    measured = ["folds", "best_epoch", *METRICS, "val_acc_std", "low", "high", "seconds", "status", "reason"]
    made = pd.read_csv(folder / "settings.csv")
    assert list(made)[:2] == ["setting_id", "lr"] and sorted(list(made)[2:]) == sorted(measured)
    assert list(made)[-2:] == ["status", "reason"]
    trials = pd.read_csv(folder / "trials.csv")
    assert list(trials)[:4] == ["trial_id", "lr", "fold", "epochs"] and len(trials) == FOLDS * len(LRS)
    assert list(trials.trial_id) == [f"G{i:02d}-f{f}" for f in range(FOLDS) for i in range(len(LRS))]


def test_a_killed_grid_goes_on_where_it_was(run: dict[str, Any]) -> None:
    ended, saved = lengths(run["folder"] / "curves.csv"), run["saved"]
    assert 0 < run["reached"].total() < ended.total(), "the fault came too late to test anything"
    assert any(0 < n < EPOCHS for n in run["reached"].values()), "no training was under way"
    assert set(saved) == set(ended) and set(ended.values()) == {EPOCHS}
    assert all(EPOCHS <= n <= EPOCHS + 1 for n in saved.values()), "no training repeats more than an epoch"


def test_a_killed_grids_curves_are_those_of_uninterrupted_trainings(run: dict[str, Any], tmp_path: Path) -> None:
    question = ask(["--results_dir", str(tmp_path), *QUESTION])
    measured = json.loads((run["folder"] / "best.json").read_text())["recipe"]
    for trial_id, own in curves_of(run).groupby("trial_id"):
        whole = fit(question.recipe(str(trial_id)).measured_as(measured), tmp_path / str(trial_id))
        found = own.drop(columns=["trial_id", "seconds"]).reset_index(drop=True)
        expected = pd.DataFrame(whole.history).drop(columns="seconds")
        pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_settings_agree_with_the_curves(run: dict[str, Any]) -> None:
    curves = curves_of(run)
    curves["setting_id"] = curves.trial_id.str[:3]
    made = pd.read_csv(run["folder"] / "settings.csv").set_index("setting_id")
    assert list(made.lr) == list(LRS)
    for name, own in curves.groupby("setting_id"):
        means = own.groupby("epoch")[list(METRICS)].mean()
        best, row = means.val_acc.idxmax(), made.loc[name]
        at = own[own.epoch == best].val_acc
        assert row.best_epoch == best and row.folds == own.trial_id.nunique() == len(at)
        assert row[list(METRICS)].to_dict() == pytest.approx(means.loc[best].to_dict())
        assert row.seconds == pytest.approx(own.seconds.sum())
        if len(at) > 1:
            low, high = scipy.stats.t.interval(0.95, len(at) - 1, loc=at.mean(), scale=scipy.stats.sem(at))
            low, high = max(low, 0.0), min(high, 1.0)
            assert (row.val_acc_std, row.low, row.high) == pytest.approx((at.std(ddof=1), low, high))
        else:
            assert pd.isna([row.val_acc_std, row.low, row.high]).all()


def test_the_poorest_settings_were_given_up_after_the_first_fold(run: dict[str, Any]) -> None:
    trials = pd.read_csv(run["folder"] / "trials.csv")
    first = trials[trials.fold == 0].set_index("lr").val_acc
    kept = survivors({str(lr): value for lr, value in first.items()}, 0.5)
    assert 0 < len(kept) < len(LRS), "the test needs a pruned setting to mean anything"
    cutoff = min(first[float(lr)] for lr in kept)
    for lr, own in trials.groupby("lr"):
        later = own[own.fold > 0]
        if str(lr) in kept:
            assert set(own.status) == {"completed"} and set(own.reason) == {"all epochs"}
            continue
        assert set(later.status) == {"stopped"} and set(later.epochs) == {0}
        reason = f"pruned: mean val_acc {first[lr]:.4f} after 1 folds, below {cutoff:.4f}"
        assert set(later.reason) == {reason}
        made = pd.read_csv(run["folder"] / "settings.csv").set_index("lr").loc[lr]
        assert made.status == "stopped" and made.reason == reason and made.folds == 1


def test_the_best_setting_is_the_one_with_the_highest_mean_and_is_not_tested(run: dict[str, Any]) -> None:
    best = json.loads((run["folder"] / "best.json").read_text())
    made = pd.read_csv(run["folder"] / "settings.csv")
    row = made[made.status == "completed"].sort_values("val_acc").iloc[-1]
    assert (best["trial_id"], best["epoch"], best["recipe"]["lr"]) == (row.setting_id, row.best_epoch, row.lr)
    assert (best["val_acc"], best["val_low"], best["val_high"]) == (row.val_acc, row.low, row.high)
    assert best["val_n"] == 240 / FOLDS and best["checkpoint"] is best["sha256"] is None
    side = Choice(*LRS).at_edge(row.lr)
    assert [text.split(" of its range")[0] for text in best["edges"]] == (
        [f"lr {row.lr:g} sits on the {side} edge"] if side else []
    )
    assert not [name for name in best if name.startswith("test")]
    assert best["command"].startswith("python -m tune.kfold ") and "--resume" not in best["command"]
    assert all(word in best["command"].split() for word in QUESTION)
    said = " ".join(run["out"].split())
    assert f"Best: {row.setting_id} (lr={row.lr}), val_acc {row.val_acc:.4f}" in said and "Not tested." in said


def test_the_page_needs_no_network_and_names_every_setting(run: dict[str, Any]) -> None:
    page = (run["folder"] / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*\"", page) and "@import" not in page
    for row in pd.read_csv(run["folder"] / "settings.csv").to_dict("records"):
        assert f'<td class="text">{row["setting_id"]}</td>' in page and f"{row['val_acc']:.2%}" in page
        assert row["reason"] in page


def test_what_is_printed_fits_80_columns_and_is_no_log(run: dict[str, Any]) -> None:
    lines = run["out"].splitlines()
    assert run["err"] == "" and len(lines) < 20
    assert max(len(line) for line in lines if " | G" not in line) <= 80


def test_going_on_with_a_finished_grid_changes_nothing(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = files(run["folder"])
    assert main(["--results_dir", str(run["folder"].parent), "--name", "grid", "--resume"]) == 0
    assert "This grid is finished; nothing was changed. Best: " in " ".join(capsys.readouterr().out.split())
    assert main(["--results_dir", str(run["folder"].parent), "--name", "grid", "--resume", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    counts = pd.read_csv(run["folder"] / "trials.csv").status.value_counts().to_dict()
    assert told == json.loads((run["folder"] / "best.json").read_text()) | {
        "folder": str(run["folder"]), "status": counts, "resume": None,
    }  # fmt: skip
    assert files(run["folder"]) == before


def test_a_finished_grid_is_not_gone_on_with_as_another(run: dict[str, Any]) -> None:
    before, common = files(run["folder"]), ["--results_dir", str(run["folder"].parent), "--name", "grid", "--resume"]
    for words, said in (("--max_epochs 7", "max_epochs was 6, is now 7"), ("--keep 1", "keep was 0.5, is now 1.0")):
        with pytest.raises(InputError, match=re.escape(said)):
            main([*common, *words.split()])
    assert files(run["folder"]) == before


def test_one_training_a_setting_has_the_wilson_interval_of_its_images(tmp_path: Path) -> None:
    grid = opened(tmp_path, {"G00": ([0.1, 0.5], "completed")})
    base = grid.question.base.replace(folds=None)
    question = GridQuestion(
        options=GridOptions(), base=base, settings=[{"lr": 0.1}], folder=tmp_path, command="c", given={}
    )
    grid = Grid(question.checked())
    grid.prepare()
    grid.open_record()
    grid.experiment.trials["G00"].rows = curve([0.25, 0.5])
    grid.experiment.trials["G00"].status = "completed"
    checkpoint = grid.experiment.checkpoints("G00") / "best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"weights")
    grid.settle()
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["val_low"], best["val_high"]) == wilson(72, 144) and best["val_n"] == 144
    assert best["checkpoint"] == "checkpoints/G00/best.ckpt"
    assert best["sha256"] == hashlib.sha256(b"weights").hexdigest()
