"""Published experiments: all are there, each is legal, and what a run leaves agrees with what it says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import COMMITTED
from sklearn.metrics import accuracy_score, f1_score, log_loss

from cifar_lab.evaluate import wilson
from cifar_lab.files import read_csv
from cifar_lab.models import build
from cifar_lab.recipe import InputError, Recipe
from cifar_lab.report import scale
from tune import study as declared
from tune.experiment import Trial
from tune.grid import METRICS, Setting
from tune.grid_question import GridQuestion
from tune.kfold import ask as ask_grid
from tune.question import Question, SearchQuestion, question_file
from tune.question import ask as ask_search
from tune.reproduce import grid_value, scaled, setting_value
from tune.space import Choice, configuration
from tune.study import Figure, Study, main, question_of, studies

ROOT = Path(__file__).parent.parent
COLUMNS = [
    "study", "variant", "metric", "published", "ours", "low", "high", "n", "seed", "scale", "hardware", "command",
    "reason",
]  # fmt: skip
BOTH, CORRECTED = ("as_reported", "corrected"), ("corrected",)
# A name for each row of the reports' tables of studies, and for what they leave to be done.
EXPECTED = {
    "000-base": CORRECTED,
    "000-activations": CORRECTED,
    "000-augmentation": CORRECTED,
    "000-width": CORRECTED,
    "000-wide": CORRECTED,
    "000-kfold": CORRECTED,
    "000-kfold-best": BOTH,
    "000-final": CORRECTED,
    "000-plateau": CORRECTED,
    "001-classic-cnn": BOTH,
    "001-resnet": BOTH,
    "001-resnet-schedule": CORRECTED,
    "002-channels": CORRECTED,
    "002-lr": BOTH,
    "002-batch": BOTH,
    "002-l2": BOTH,
    "002-batchnorm": BOTH,
    "002-mixup": CORRECTED,
    "002-test": BOTH,
    "003-lr": BOTH,
    "004-dynamic": BOTH,
    "beyond-resnet18": CORRECTED,
    "beyond-resnet18-cutout": CORRECTED,
    "beyond-nf-resnet": CORRECTED,
    "beyond-nf-resnet-twin": CORRECTED,
    "beyond-classic-depth": CORRECTED,
    "beyond-classic-longer": CORRECTED,
    "beyond-classic-whole": CORRECTED,
    "beyond-resnet-longer": CORRECTED,
    "beyond-resnet-depth": CORRECTED,
    "beyond-resnet18-mixing": CORRECTED,
    "beyond-resnet18-schedule": CORRECTED,
    "beyond-resnet18-ema": CORRECTED,
    "beyond-resnet18-muon": CORRECTED,
    "beyond-early-stop": CORRECTED,
    "beyond-mixed-kernel": CORRECTED,
    "beyond-wide-regularisation": CORRECTED,
    "beyond-wide-time": CORRECTED,
    "beyond-speed-94": CORRECTED,
    "beyond-speed-96": CORRECTED,
    "beyond-precision": CORRECTED,
    "beyond-speed-precision": CORRECTED,
    "beyond-resnet18-tta": CORRECTED,
    "imagenet-pretrained": CORRECTED,
}
ALL = [(name, variant) for name, variants in studies().items() for variant in variants]
FLOOR = math.log(1 + 9 / math.e)
# What an earlier study is made to have found: unlike any default, so that it is seen where it is carried.
FOUND = {
    "channels1": 7, "kernel1": 9, "channels2": 11, "kernel2": 13, "lr": 0.00123, "batch_size": 37,
    "weight_decay": 0.00321,
}  # fmt: skip


def asked(folder: Path, study: Study, given: dict[str, Any] | None = None, **options: Any) -> Question:
    """The question of a study whose files go below `folder`."""
    places = dict(**{"results_dir": str(folder / "runs"), "published_dir": str(folder / "results"), **options})
    return question_of(study, given or {}, places, resume=False, quiet=False, dashboard=False, words="python -m x y")


def grid_asked(folder: Path, name: str, variant: str, given: dict[str, Any] | None = None) -> GridQuestion:
    question = asked(folder, studies()[name][variant], given)
    assert isinstance(question, GridQuestion)
    return question


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    """A folder in which every study seems to have been run: each found FOUND."""
    for name, variants in studies().items():
        recipe = Recipe(arch=next(iter(variants.values())).arch).to_dict()
        recipe |= {field: value for field, value in FOUND.items() if field in recipe}
        place = tmp_path / "results" / name / "corrected" / "best.json"
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps({"recipe": recipe}))
    return tmp_path


# What is declared


def test_every_published_study_is_there_in_its_variants() -> None:
    assert {name: tuple(sorted(variants)) for name, variants in studies().items()} == EXPECTED


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_every_study_makes_legal_recipes(name: str, variant: str, carried: Path) -> None:
    study = studies()[name][variant]
    question = asked(carried, study)
    if isinstance(question, SearchQuestion):
        assert study.search is not None and set(question.space)
        for i in range(100):
            question.base.replace(**configuration(question.space, 0, i))
    recipes = [question.recipe(trial_id) for trial_id in question.configurations()]
    assert recipes and {r.arch for r in recipes} == {study.arch} and {r.dataset for r in recipes} == {"cifar10"}
    for recipe in recipes:
        for field, value in study.recipe.items():
            assert getattr(recipe, field) == value


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_every_published_figure_is_of_something_that_the_study_runs(name: str, variant: str, carried: Path) -> None:
    study = studies()[name][variant]
    question = asked(carried, study)
    labels = [figure.label for figure in study.published]
    assert len(set(labels)) == len(labels), "a row of the table has one name"
    classes = {
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck", "animals", "vehicles",
    }  # fmt: skip
    tested = ["test_acc", "test_loss", "test_macro_f1"]
    told = [*METRICS, *tested, "tta_acc", "best_epoch", "epoch_seconds", "class_std", "class_var"]
    for figure in study.published:
        assert figure.value is not None or figure.note or figure.at, "a figure without a value says what it is"
        assert re.sub("_(max|min|first|last)$", "", figure.metric) in told
        assert figure.metric != "tta_acc" or study.tta != "none"
        if isinstance(question, SearchQuestion):
            assert figure.metric in ("test_acc", "val_acc", "best_epoch", "class_std", "class_var")
            assert not figure.at or classes.issuperset(figure.at.values())
            continue
        assert isinstance(question, GridQuestion)
        for at in (figure.at, figure.over):
            full = [{**question.base.to_dict(), **setting} for setting in question.settings]
            assert any(at.items() <= setting.items() for setting in full), f"{at} is not tried"
        if figure.metric.startswith("test") and re.search("_(max|min|first|last)$", figure.metric):
            assert study.every_epoch, "a curve on test needs every epoch's weights"


@pytest.mark.parametrize("name", ["001-classic-cnn", "001-resnet", "001-resnet-schedule"])
def test_the_figures_of_table_4_fit_together(name: str) -> None:
    figures = {f.label: f.value for f in studies()[name]["corrected"].published if f.value is not None}
    animals = [figures[f"test_acc at class {c}"] for c in ("bird", "cat", "deer", "dog", "frog", "horse")]
    vehicles = [figures[f"test_acc at class {c}"] for c in ("airplane", "automobile", "ship", "truck")]
    assert statistics.fmean(animals) == pytest.approx(figures["test_acc at class animals"], abs=0.001)
    assert statistics.fmean(vehicles) == pytest.approx(figures["test_acc at class vehicles"], abs=0.001)
    assert statistics.fmean(animals + vehicles) == pytest.approx(figures["test_acc"], abs=0.001)
    # The last spread and its variance are given as they were printed, and the remarks say what the table gives.
    spread, variance = (f(animals + vehicles) for f in (statistics.pstdev, statistics.pvariance))
    notes = {f.label: f.note for f in studies()[name]["corrected"].published}
    assert f"Table 4 gives {1e4 * variance:.1f}" in notes["class_var"]
    if name == "001-resnet-schedule":
        assert (figures["class_std"], figures["class_var"]) == (0.06, 0.00369)
        assert f"Table 4 gives {100 * spread:.1f}" in notes["class_std"]
    else:
        assert spread == pytest.approx(figures["class_std"], abs=0.001)


def test_the_grids_are_those_of_the_reports(carried: Path) -> None:
    sizes = {}
    for name, variants in studies().items():
        question = asked(carried, variants["corrected"])
        if isinstance(question, GridQuestion) and not name.startswith("beyond"):
            sizes[name] = len(question.configurations())
    grids = {
        "000-plateau": 2,
        "000-kfold": 72,
        "000-width": 4,
        "000-activations": 3,
        "002-channels": 16,
        "002-lr": 3,
        "002-batch": 3,
    }
    more = {"002-l2": 4, "002-batchnorm": 3, "002-mixup": 2, "003-lr": 3}
    assert {name: count for name, count in sizes.items() if count > 1} == grids | more
    lengths = {"000-kfold": 8, "002-channels": 11, "003-lr": 150, "004-dynamic": 50, "000-final": 30}
    for name, epochs in lengths.items():
        assert asked(carried, studies()[name]["corrected"]).base.max_epochs == epochs
    kfold = grid_asked(carried, "000-kfold", "corrected")
    assert kfold.base.folds == 3 and len(kfold.settings) == 24


def test_as_reported_keeps_the_faults_and_corrected_has_none(carried: Path) -> None:
    reported, corrected = (asked(carried, studies()["003-lr"][v]).base.to_dict() for v in ("as_reported", "corrected"))
    assert (reported["softmax"], corrected["softmax"]) == (True, False)
    reported, corrected = (asked(carried, studies()["004-dynamic"][v]).base.to_dict() for v in BOTH)
    assert (reported["spare"], corrected["spare"]) == (10, 0)
    assert (reported["cutout_fill"], corrected["cutout_fill"]) == ("black", "mean")
    network = build(Recipe(arch="dynamic_cnn", width=4, num_blocks="1", spare=10), 10)
    assert [m for m in network.modules() if hasattr(m, "out_features")][-1].out_features == 20
    for name in ("001-classic-cnn", "001-resnet"):
        searched, fixed = (asked(carried, studies()[name][variant]) for variant in BOTH)
        assert isinstance(searched, SearchQuestion) and isinstance(fixed, SearchQuestion)
        assert searched.space["seed"] == Choice(7, 42, 77) and "seed" not in fixed.space
        assert fixed.options.finalist_seeds > 1
    lr, batch, l2 = (
        asked(carried, studies()[name]["as_reported"]).base for name in ("002-batch", "002-l2", "002-test")
    )
    assert lr.lr == batch.lr == l2.lr == 1e-4 and batch.batch_size == l2.batch_size == 20 and l2.weight_decay == 1e-5


@pytest.mark.parametrize("name", [name for name, variant in ALL if variant == "corrected"])
def test_corrected_studies_select_by_validation_alone(name: str) -> None:
    study = studies()[name]["corrected"]
    assert name == "002-test" or not study.every_epoch
    if name == "002-test":
        assert "selects nothing" in study.note


# What is carried forward


@pytest.mark.parametrize(("name", "variant"), [(n, v) for n, v in ALL if studies()[n][v].carry])
def test_what_earlier_studies_found_is_carried_forward_unless_it_is_given(
    name: str, variant: str, carried: Path
) -> None:
    study = studies()[name][variant]
    fields = [field for entry in study.carry for field in entry["fields"]]
    base = asked(carried, study).base
    assert {field: getattr(base, field) for field in fields} == {field: FOUND[field] for field in fields}
    assert getattr(asked(carried, study, {fields[0]: 5}).base, fields[0]) == 5
    names = list(studies())
    assert all(names.index(entry["study"]) < names.index(name) for entry in study.carry), "an earlier study"


def test_carrying_from_a_study_that_was_not_run_names_the_command_to_run_first(tmp_path: Path) -> None:
    said = re.escape(
        "study: 002-lr carries channels1, kernel1, channels2, kernel2 forward from 002-channels, which was not run"
    )
    with pytest.raises(InputError, match=rf"{said}.*First: python -m tune\.study 002-channels --variant corrected"):
        main(["002-lr", "--variant", "corrected", *places(tmp_path)])
    place = tmp_path / "results" / "002-channels" / "corrected" / "best.json"
    place.parent.mkdir(parents=True)
    place.write_text("{")
    with pytest.raises(InputError, match=said):
        main(["002-lr", "--variant", "corrected", *places(tmp_path)])
    assert not (tmp_path / "runs").exists()


# What may be given


def places(folder: Path) -> list[str]:
    return ["--results_dir", str(folder / "runs"), "--published_dir", str(folder / "results")]


def test_a_field_that_is_given_is_taken_out_of_the_grid(carried: Path) -> None:
    assert [dict(s) for s in grid_asked(carried, "003-lr", "corrected", {"lr": 0.02}).settings] == [{}]
    kept = grid_asked(carried, "000-kfold", "corrected", {"lr": 0.002, "max_epochs": 2})
    assert [s["weight_decay"] for s in kept.settings] == [0.0, 0.001, 0.002, 0.003, 0.005, 0.01]
    assert {(r.lr, r.max_epochs) for r in map(kept.recipe, kept.configurations())} == {(0.002, 2)}
    widths = grid_asked(carried, "000-width", "corrected", {"depth": 2})
    assert [dict(s) for s in widths.settings] == [{"width": 32}, {"width": 64}]
    search = asked(carried, studies()["001-classic-cnn"]["as_reported"], {"seed": 5, "lr": 0.004})
    assert isinstance(search, SearchQuestion) and not {"seed", "lr"} & set(search.space)


def test_settings_that_were_left_out_or_given_up_are_said(carried: Path) -> None:
    kfold = studies()["000-kfold"]["corrected"]
    question = grid_asked(carried, "000-kfold", "corrected", {"lr": 0.001})
    assert scaled(kfold, question) == ["only lr 0.001"], "one of its rates, though it is the default one"
    free = {"compile": True, "memory_format": "contiguous", "precision": "32", "data_dir": "images"}
    assert scaled(kfold, grid_asked(carried, "000-kfold", "corrected", free)) == []
    options = dataclasses.replace(question.options, prune_after=1, keep=0.25)
    pruned = dataclasses.replace(grid_asked(carried, "000-kfold", "corrected"), options=options)
    assert scaled(kfold, pruned) == ["only the best 25% of the settings beyond fold 1 of 3"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", r"study: none is named\. Legal: python -m tune\.study NAME, or --list for the names"),
        ("--variant corrected", r"study: none is named"),
        ("002-lrr", r"study: '002-lrr'; did you mean 002-lr\? Legal: 000-base, .*imagenet-pretrained"),
        ("nothing-like-it", r"study: 'nothing-like-it'\. Legal: 000-base"),
        ("003-lr --variant reported", r"variant: 'reported'\. Legal for 003-lr: corrected, as_reported"),
        ("000-base --variant as_reported", r"variant: 'as_reported'\. Legal for 000-base: corrected"),
        ("003-lr --arch resnet", r"arch: resnet\. 003-lr is a study of mixed_kernel_cnn; legal: leave it away"),
        ("003-lr --name a", r"name: 'a'\. A study's folder is named STUDY-VARIANT; legal: leave it away"),
        ("003-lr --widht 2", r"--widht: there is no such flag; did you mean --width\?"),
        ("003-lr --lr -1", r"lr: -1\.0\. Legal: more than 0"),
        ("003-lr --depth 18", r"--depth: there is no such flag"),
        ("003-lr --resume --variant corrected", r"--resume: 003-lr was not begun in"),
        ("000-kfold --prune_after 3", r"prune_after: 3\. Legal: 1 to 2, fewer than folds"),
        ("003-lr --prune_after 1", r"prune_after: 1\. Legal: unset, while there are no folds"),
        ("000-kfold --fold 1", r"fold"),
        # What only the other kind of study has is not silently ignored, nor an error of Python's.
        ("001-classic-cnn --prune_after 1", r"prune_after"),
        ("003-lr --num_samples 1", r"num_samples"),
        ("003-lr --finalists 1", r"finalists"),
        ("003-lr --finalist_seeds 1", r"finalist_seeds"),
        # Folds leave no checkpoint that could be tested.
        ("003-lr --folds 3", r"folds"),
        ("003-lr --render", r"--render: nothing but --published_dir goes with it"),
        ("--render --lr 0.1", r"--render: nothing but --published_dir goes with it"),
    ],
)
def test_what_is_impossible_is_refused_before_any_training(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune.reproduce.reproduce", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(InputError, match=said):
        main([*words.split(), *places(tmp_path)])
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_all_variants_are_refused_before_the_first_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "003-lr-as_reported").mkdir(parents=True)
    (tmp_path / "runs" / "003-lr-as_reported" / "curves.csv").touch()
    monkeypatch.setattr("tune.reproduce.reproduce", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(InputError, match="study: 003-lr, as_reported lies in"):
        main(["003-lr", *places(tmp_path)])


def test_all_variants_are_gone_on_with_though_the_second_had_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[str] = []

    def interrupted(study: Study, question: Question, published_dir: Path, answers: list[dict[str, Any]]) -> int:
        asked_for.append(study.variant)
        question_file(question.folder).parent.mkdir(parents=True, exist_ok=True)
        question_file(question.folder).write_text(json.dumps(question.to_dict()))
        return 1 if len(asked_for) == 1 else 0

    monkeypatch.setattr("tune.reproduce.reproduce", interrupted)
    assert main(["003-lr", *places(tmp_path)]) == 1 and asked_for == ["corrected"]
    assert main(["003-lr", "--resume", *places(tmp_path)]) == 0
    assert asked_for == ["corrected", "corrected", "as_reported"]


def test_the_command_kept_with_a_run_asks_for_one_variant_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[Question] = []
    monkeypatch.setattr("tune.reproduce.reproduce", lambda study, question, *_: questions.append(question) or 0)
    assert main(["003-lr", "--max_epochs", "7", *places(tmp_path)]) == 0
    for question, variant in zip(questions, ("corrected", "as_reported"), strict=True):
        common = f"python -m tune.study 003-lr --max_epochs 7 {' '.join(places(tmp_path))}"
        assert question.command == f"{common} --variant {variant}"
        assert question.folder == tmp_path / "runs" / f"003-lr-{variant}" and question.given == {"max_epochs": 7}


def test_the_list_has_a_line_a_study_and_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[2]) for line in lines] == ALL
    for name, arch, variant, published in lines:
        study = studies()[name][variant]
        assert arch == study.arch
        first = study.published[0]
        assert published.startswith(first.label) if first.value is not None else published == "in words only"
    told = {(line[0], line[2]): line[3] for line in lines}
    assert told["000-activations", "corrected"] == "val_acc at activation leaky_relu over activation relu +1.5"
    assert told["001-classic-cnn", "corrected"] == "test_acc 64.4"
    assert main(["--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(entry["study"], entry["variant"]) for entry in listed] == ALL
    for entry in listed:
        study = studies()[entry["study"]][entry["variant"]]
        assert list(entry["published"].items()) == [(figure.label, figure.value) for figure in study.published]
    for words in (["003-lr", "--list"], ["--list", "--lr", "0.1"]):
        with pytest.raises(InputError, match="--list: nothing but --json goes with it"):
            main(words)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (ask_search, "go on with the search --name where it was interrupted, or with a larger --num_samples"),
        (ask_grid, "go on with the grid --name where it was interrupted"),
        (main, "go on with the study where it was interrupted; with a search also to a larger --num_samples"),
    ],
)
def test_each_commands_help_says_what_it_can_go_on_with(
    command: Callable[[list[str]], Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"--resume {said} \(default", told)


def test_a_diverged_setting_has_no_test_figure_and_says_why(tmp_path: Path) -> None:
    rows = [dict.fromkeys((*METRICS, "lr", "seconds"), 0.5) | {"epoch": 1, "train_loss": math.nan}]
    made = [
        Setting("G00", {"lr": 0.01}, [Trial("G00", {}, rows, "diverged", "epoch 1: train_loss nan")]),
        Setting("G01", {"lr": 0.005}, [Trial("G01", {}, [rows[0] | {"train_loss": 1.0}], "completed", "all epochs")]),
    ]
    (tmp_path / "test.csv").write_text("setting_id,epoch,n,test_acc,low,high,test_loss\nG01,1,360,0.5,0.4,0.6,1.0\n")
    kept = {"trial_id": "G01", "val_n": 144, "recipe": {"lr": 0.005}}
    value, _ = grid_value(Figure(metric="test_acc", at={"lr": 0.005}), tmp_path, made, kept)
    assert value == (0.5, 0.4, 0.6, 360)
    value, note = grid_value(Figure(metric="test_acc", at={"lr": 0.01}), tmp_path, made, kept)
    assert value is None and "diverged" in note


# What is committed


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: "-".join(file.parts[-3:-1]))
def test_every_committed_run_names_its_study_and_its_scale_in_the_headline(file: Path) -> None:
    best, (name, variant) = json.loads(file.read_text()), file.parts[-3:-1]
    table = read_csv(ROOT / "results" / "published.csv")
    rows = [row for row in table if (row["study"], row["variant"]) == (name, variant)]
    assert (best["study"]["name"], best["study"]["variant"]) == (name, variant)
    assert {best["study"]["scale"]} == {row["scale"] for row in rows}
    assert [figure["metric"] for figure in best["study"]["figures"]] == [row["metric"] for row in rows]
    assert scale(best) == f" {name}, {variant}: {rows[0]['scale']}."


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: "-".join(file.parts[-3:-1]))
def test_every_committed_run_still_has_what_its_sources_found_best(file: Path) -> None:
    name, variant = file.parts[-3:-1]
    took, recipe = declared.carried(studies()[name][variant], ROOT / "results"), json.loads(file.read_text())["recipe"]
    assert {field: recipe[field] for field in took} == took


def test_the_committed_table_is_what_the_declarations_and_the_committed_runs_say(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", "*.html"))
    before = files(tmp_path)
    assert main(["--render", "--published_dir", str(tmp_path)]) == 0
    assert files(tmp_path) == before, "run python -m tune.study --render"
    rows = read_csv(tmp_path / "published.csv")
    assert {(row["study"], row["variant"]) for row in rows if row["ours"]} == {f.parts[-3:-1] for f in COMMITTED}
    assert all(row["ours"] or row["reason"] for row in rows)


def test_first_values_best_epochs_and_test_time_augmentation_are_read_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text(
        "setting_id,epoch,n,test_acc,low,high,test_loss\nG00,1,360,0.5,0.4,0.6,2.0\nG00,2,360,0.7,0.6,0.8,1.0\n"
    )
    rows = [dict.fromkeys((*METRICS, "seconds"), value) | {"epoch": i} for i, value in ((1, 0.25), (2, 0.5))]
    setting = Setting("G00", {}, [Trial("G00", {}, rows, "completed")])
    best = {"trial_id": "G00", "val_n": 144, "test_n": 360, "tta": {"acc": 0.75, "low": 0.7, "high": 0.8}}
    told = {
        "best_epoch": (2, None, None, None),
        "train_acc_first": (0.25, None, None, None),
        "test_acc_first": (0.5, 0.4, 0.6, 360),
        "test_acc": (0.7, 0.6, 0.8, 360),
        "tta_acc": (0.75, 0.7, 0.8, 360),
    }
    assert {metric: setting_value(metric, tmp_path, setting, best) for metric in told} == told
    assert setting_value("tta_acc", tmp_path, setting, best | {"tta": None}) is None
    assert setting_value("tta_acc", tmp_path, setting, best | {"trial_id": "G01"}) is None, "of the best setting alone"


def test_what_died_is_told_beside_the_accuracy() -> None:
    rows = read_csv(ROOT / "results" / "published.csv")
    told = {r["metric"]: r["reason"] for r in rows if (r["study"], r["variant"]) == ("002-lr", "corrected")}
    assert "convolutions.4 (ReLU): 56 of 64 channels (88%) gave nothing" in told["val_acc at lr 0.01"]
    assert "convolutions.3.weight 98.1%" in told["val_acc at lr 0.01"]
    assert "convolutions.3.weight 0.0%" in told["val_acc at lr 0.0001"]


# Studies as their users run them, scaled down


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80", "RAY_worker_niceness": "0"}
    command = [sys.executable, "-m", "tune.study", *words, *places(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900)


Ran = tuple[Path, subprocess.CompletedProcess[str]]
SCALED = ["--variant", "as_reported", "--dataset", "digits", "--limit_train", "100", "--max_epochs", "2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def rates(results: Path, session_cache: Path) -> Ran:
    """002-lr with tiny networks: a grid of three, nothing tested, gradients watched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(session_cache))
        patch.delenv("CIFAR_LAB_DATA", raising=False)
        done = start(results, "002-lr", *SCALED, *["--channels1", "3", "--channels2", "3", "--hidden", "6"])
    assert done.returncode == 0, done.stderr
    return results, done


@pytest.fixture(scope="module")
def softmax(rates: Ran, session_cache: Path) -> Ran:
    """003-lr with a tiny network and one of its rates: each epoch tested after the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(session_cache))
        patch.delenv("CIFAR_LAB_DATA", raising=False)
        done = start(rates[0], "003-lr", *SCALED, *["--lr", "0.01", "--width", "2", "--hidden", "8"])
    assert done.returncode == 0, done.stderr
    return rates[0], done


def files(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def table(folder: Path, name: str) -> dict[str, dict[str, str]]:
    """The rows of published.csv of the study as it was reported, by their metric."""
    rows = read_csv(folder / "results" / "published.csv")
    return {r["metric"]: r for r in rows if (r["study"], r["variant"]) == (name, "as_reported")}


def test_the_small_files_are_copied_to_the_published_folder(rates: Ran) -> None:
    run, copied = rates[0] / "runs" / "002-lr-as_reported", rates[0] / "results" / "002-lr" / "as_reported"
    names = {"settings.csv", "trials.csv", "curves.csv", "best.json"}
    assert names <= {p.name for p in copied.iterdir()} and list(copied.glob("figures/curves_*.png"))
    for place, digest in files(copied).items():
        assert files(run)[place] == digest
    assert not list(copied.rglob("*.ckpt")) and not (copied / "ray").exists()
    assert sum(p.stat().st_size for p in copied.rglob("*") if p.is_file()) < 3e6


def test_gradients_are_kept_for_each_setting_and_shown_on_the_page(rates: Ran) -> None:
    run = rates[0] / "runs" / "002-lr-as_reported"
    assert {p.name for p in (run / "gradients").iterdir()} == {"G00.csv", "G01.csv", "G02.csv"}
    for file in (run / "gradients").iterdir():
        assert set(pd.read_csv(file).epoch) == {1, 2}
    page = (run / "report.html").read_text()
    assert page.count("<h2>Gradients of G0") == 3


def test_the_table_has_every_figure_of_every_study_once(rates: Ran) -> None:
    rows = read_csv(rates[0] / "results" / "published.csv")
    assert list(rows[0]) == COLUMNS
    declared = [
        (s.name, s.variant, f.label, f.value) for v in studies().values() for s in v.values() for f in s.published
    ]
    found = [(r["study"], r["variant"], r["metric"], float(r["published"]) if r["published"] else None) for r in rows]
    assert found == declared
    for row in rows:
        assert row["ours"] or row["reason"], "empty only with a reason"
        if (row["study"], row["variant"]) != ("002-lr", "as_reported") and row["study"] != "003-lr":
            assert row["ours"] == row["scale"] == row["command"] == "" and row["reason"].startswith("not run")


def test_the_figures_of_a_grid_are_those_of_its_curves(rates: Ran) -> None:
    curves = pd.read_csv(rates[0] / "runs" / "002-lr-as_reported" / "curves.csv")
    made = pd.read_csv(rates[0] / "runs" / "002-lr-as_reported" / "settings.csv")
    rates_of = dict(zip(made.setting_id, made.lr, strict=True))
    rows = table(rates[0], "002-lr")
    for setting_id, own in curves.groupby("trial_id"):
        lr = rates_of[str(setting_id)]
        row = rows[f"val_acc at lr {lr}"]
        assert float(row["ours"]) == own.val_acc.max() and row["n"] == "144"
        assert (float(row["low"]), float(row["high"])) == wilson(round(own.val_acc.max() * 144), 144)
        if lr == 0.001:
            assert float(rows["val_loss_min at lr 0.001"]["ours"]) == own.val_loss.min()
            assert float(rows["val_acc_last at lr 0.001"]["ours"]) == own.val_acc.iloc[-1]
            assert float(rows["val_loss_last at lr 0.001"]["ours"]) == own.val_loss.iloc[-1]
    assert set(made.lr) == {0.01, 0.001, 0.0001}


def test_a_row_says_what_was_scaled_down_with_what_it_was_made_and_what_it_wants(rates: Ran) -> None:
    for row in table(rates[0], "002-lr").values():
        scale = row["scale"].split("; ")
        assert scale[0] == "100 training images (limit_train)"
        assert set(scale[1:]) == {
            "dataset digits instead of cifar10",
            "2 of 10 epochs",
            "channels1 3 instead of 32",
            "channels2 3 instead of 128",
            "hidden 6 instead of 128",
        }
        assert row["seed"] == "0" and "core" in row["hardware"] and "wants an hour" in row["reason"]
        assert "only" not in row["scale"], "all three rates"
        assert row["command"].startswith("python -m tune.study 002-lr --variant as_reported --dataset digits")


def test_the_page_of_results_shows_them_in_percent(rates: Ran) -> None:
    page = (rates[0] / "results" / "README.md").read_text()
    row = table(rates[0], "002-lr")["val_acc at lr 0.001"]
    line = next(x for x in page.splitlines() if "002-lr/as_reported" in x and "| val_acc at lr 0.001 |" in x)
    shown = [f"{100 * float(row[name]):.1f}" for name in ("published", "ours", "low", "high")]
    assert f"| {shown[0]} | {shown[1]} | {shown[2]} to {shown[3]} | 144 |" in line
    assert "(002-lr/as_reported)" in line and row["command"] in page
    said = " ".join(rates[1].stdout.split())
    assert f"002-lr as_reported: val_acc at lr 0.001 {float(row['ours']):.4f}, published 0.71" in said


@pytest.mark.parametrize(("fixture", "name"), [("rates", "002-lr"), ("softmax", "003-lr")])
def test_going_on_with_a_finished_study_changes_nothing(
    fixture: str, name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder: Path = request.getfixturevalue(fixture)[0]
    before = files(folder)
    assert main([name, "--variant", "as_reported", "--resume", *places(folder)]) == 0
    assert "finished; nothing was changed" in " ".join(capsys.readouterr().out.split())
    assert main([name, "--variant", "as_reported", "--resume", "--json", *places(folder)]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    kept = json.loads((folder / "runs" / f"{name}-as_reported" / "best.json").read_text())
    assert told == kept | {
        "folder": str(folder / "runs" / f"{name}-as_reported"),
        "status": {"completed": len(pd.read_csv(folder / "runs" / f"{name}-as_reported" / "trials.csv"))},
        "resume": None,
    }
    after = files(folder)
    assert {n for n in {**before, **after} if before.get(n) != after.get(n)} == set()


def test_a_study_is_not_gone_on_with_as_another(rates: Ran) -> None:
    before = files(rates[0])
    for words, said in (("--max_epochs 3", "max_epochs was 2, is now 3"), ("--lr 0.01", "lr was 0.001, is now 0.01")):
        with pytest.raises(InputError, match=said):
            main(["002-lr", "--variant", "as_reported", "--resume", *words.split(), *places(rates[0])])
    with pytest.raises(InputError, match="study: 002-lr, as_reported lies in"):
        main(["002-lr", *SCALED, *places(rates[0])])
    assert files(rates[0]) == before


def test_each_epoch_is_tested_after_the_end_and_its_weights_are_gone(softmax: Ran) -> None:
    run = softmax[0] / "runs" / "003-lr-as_reported"
    tested = pd.read_csv(run / "test.csv")
    assert list(tested.epoch) == [1, 2] and set(tested.setting_id) == {"G00"} and set(tested.n) == {360}
    assert {p.name for p in run.rglob("*.ckpt")} == {"best.ckpt"}
    said, best = pd.read_csv(run / "test_predictions.csv"), json.loads((run / "best.json").read_text())
    row = tested.set_index("epoch").loc[best["epoch"]]
    probabilities = said[[f"p{i}" for i in range(10)]].to_numpy()
    probabilities /= probabilities.sum(1, keepdims=True)  # scikit-learn wants more than single precision
    assert row.test_acc == best["test_acc"] == accuracy_score(said.label, said.prediction)
    assert row.test_loss == pytest.approx(log_loss(said.label, probabilities, labels=range(10)), rel=1e-5)
    assert row.test_macro_f1 == pytest.approx(f1_score(said.label, said.prediction, average="macro"))
    assert (row.low, row.high) == wilson(round(row.test_acc * 360), 360) == (best["test_low"], best["test_high"])
    curves = pd.read_csv(run / "curves.csv")
    assert best["epoch"] == curves.epoch[curves.val_acc.idxmax()], "validation has chosen the epoch"
    logged = [json.loads(line) for line in (run / "test_readings.jsonl").read_text().splitlines()]
    assert [reading["accuracy"] for reading in logged] == list(tested.test_acc), "each reading is logged"
    copied = softmax[0] / "results" / "003-lr" / "as_reported" / "test_readings.jsonl"
    assert copied.read_text() == (run / "test_readings.jsonl").read_text()


def test_the_figures_of_the_test_curve_are_its_highest_and_its_last(softmax: Ran) -> None:
    run, rows = softmax[0] / "runs" / "003-lr-as_reported", table(softmax[0], "003-lr")
    tested, curves = pd.read_csv(run / "test.csv"), pd.read_csv(run / "curves.csv")
    highest = tested.loc[tested.test_acc.idxmax()]
    row = rows["test_acc_max at lr 0.01"]
    assert [float(row[name]) for name in ("ours", "low", "high", "n")] == list(
        highest[["test_acc", "low", "high", "n"]]
    )
    assert float(rows["test_loss_last at lr 0.01"]["ours"]) == tested.test_loss.iloc[-1]
    assert float(rows["train_loss_last at lr 0.01"]["ours"]) == curves.train_loss.iloc[-1]
    assert float(rows["train_acc at lr 0.01"]["ours"]) == curves.train_acc[curves.val_acc.idxmax()]
    for metric in ("test_acc_max at lr 0.005", "test_acc_max at lr 0.001"):
        assert rows[metric]["ours"] == "" and "left out" in rows[metric]["reason"]
    scale = row["scale"].split("; ")
    assert {"width 2 instead of 64", "2 of 150 epochs", "only lr 0.01"} <= set(scale)


def test_a_second_study_leaves_the_rows_of_the_first(softmax: Ran) -> None:
    assert all(row["ours"] for row in table(softmax[0], "002-lr").values())
    assert (softmax[0] / "results" / "002-lr" / "as_reported" / "best.json").exists()


def test_predictions_are_published_with_their_probability_alone(softmax: Ran) -> None:
    copied = pd.read_csv(softmax[0] / "results" / "003-lr" / "as_reported" / "test_predictions.csv")
    whole = pd.read_csv(softmax[0] / "runs" / "003-lr-as_reported" / "test_predictions.csv")
    assert list(copied) == ["index", "label", "prediction", "probability"]
    assert copied.iloc[:, :3].equals(whole.iloc[:, :3])
    own = [row[f"p{row['prediction']}"] for row in whole.to_dict("records")]
    assert list(copied.probability) == pytest.approx(own, abs=5e-5)


def test_a_softmax_before_the_cross_entropy_keeps_every_loss_above_its_floor(softmax: Ran) -> None:
    run = softmax[0] / "runs" / "003-lr-as_reported"
    assert json.loads((run / "best.json").read_text())["recipe"]["softmax"] is True
    curves, tested = pd.read_csv(run / "curves.csv"), pd.read_csv(run / "test.csv")
    assert math.isclose(FLOOR, 1.4612, abs_tol=5e-5)
    assert min(curves.train_loss.min(), curves.val_loss.min(), tested.test_loss.min()) > FLOOR
    probabilities = pd.read_csv(run / "test_predictions.csv")[[f"p{i}" for i in range(10)]]
    assert probabilities.max(axis=None) < math.e / (math.e + 9)
