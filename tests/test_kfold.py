"""A grid as it is typed: which settings it makes, what it refuses before any training."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_lab.files import read_json, write_json
from cifar_lab.recipe import InputError
from tune.grid_question import GridQuestion
from tune.kfold import ask, combinations, main
from tune.question import Question, question_file
from tune.question import ask as ask_search
from tune.space import configuration, space_for

ROOT = Path(__file__).parent.parent
STUDY_000 = (
    "--arch wide_cnn --grid lr=.001,.0015,.002,.003 weight_decay=0,.001,.002,.003,.005,.01 --folds 3 --max_epochs 8"
)


def asked(folder: Path, words: str) -> GridQuestion:
    return ask(["--results_dir", str(folder), *words.split()])


def begun(question: Question) -> None:
    """Leave what a run of this question leaves when it begins."""
    question_file(question.folder).parent.mkdir(parents=True)
    question_file(question.folder).write_text(json.dumps(question.to_dict()))


# What is tried


def test_the_grid_of_report_000_is_one_line_of_24_settings_and_72_trainings(tmp_path: Path) -> None:
    question = asked(tmp_path, STUDY_000)
    made = [(s["lr"], s["weight_decay"]) for s in question.settings]
    assert made == list(itertools.product((0.001, 0.0015, 0.002, 0.003), (0, 0.001, 0.002, 0.003, 0.005, 0.01)))
    recipes = {trial_id: question.recipe(trial_id) for trial_id in question.configurations()}
    assert len(recipes) == 72 and {r.max_epochs for r in recipes.values()} == {8}
    trained = [(r.fold, r.lr, r.weight_decay) for r in recipes.values()]
    assert trained == [(fold, *pair) for fold in range(3) for pair in made], "fold by fold"
    assert list(recipes)[23:25] == ["G23-f0", "G00-f1"]


def test_all_combinations_are_made_and_the_last_field_changes_fastest() -> None:
    made = combinations({"a": [1, 2], "b": [3.0], "c": ["x", "y"]})
    assert made == [
        {"a": a, "b": 3.0, "c": c} for a in (1, 2) for c in ("x", "y")
    ]  # fmt: skip
    assert combinations({}) == [{}]


def test_there_are_three_folds_unless_told_otherwise(tmp_path: Path) -> None:
    assert asked(tmp_path, "--grid lr=0.1").base.folds == 3
    assert len(asked(tmp_path, "--grid lr=0.1 --folds 5").configurations()) == 5


def test_values_become_numbers_truths_and_texts(tmp_path: Path) -> None:
    question = asked(tmp_path, "--arch classic_cnn --grid augment=true,False lr=1e-3 depth=2,3 activation=relu,elu")
    assert len(question.settings) == 8
    assert question.settings[0] == {"augment": True, "lr": 0.001, "depth": 2, "activation": "relu"}
    assert question.settings[-1] == {"augment": False, "lr": 0.001, "depth": 3, "activation": "elu"}


@pytest.mark.parametrize("words", ["--grid precision=32,bf16", "--arch dynamic_cnn --grid num_blocks=1,2;2,2"])
def test_a_text_that_looks_like_a_number_can_be_varied(words: str, tmp_path: Path) -> None:
    assert len(asked(tmp_path, words).settings) == 2


def test_num_samples_takes_a_random_part_of_the_grid_that_the_seed_determines(tmp_path: Path) -> None:
    whole = asked(tmp_path, STUDY_000).settings
    parts = [asked(tmp_path, f"{STUDY_000} --num_samples 7 --seed {seed}").settings for seed in (0, 0, 1, 2)]
    assert parts[0] == parts[1] and parts[0] != parts[2] != parts[3]
    for part in parts:
        places = [whole.index(setting) for setting in part]
        assert len(set(places)) == 7 and places == sorted(places)
    assert parts[0] != whole[:7]
    assert asked(tmp_path, f"{STUDY_000} --num_samples 100").settings == whole


def test_without_a_grid_settings_are_drawn_from_the_architectures_space(tmp_path: Path) -> None:
    question = asked(tmp_path, "--arch classic_cnn --num_samples 5 --seed 3 --lr 0.004")
    base, space = space_for("classic_cnn", {"lr": 0.004, "seed": 3})
    assert question.settings == [configuration(space, 3, i) for i in range(5)]
    assert not any("lr" in setting for setting in question.settings)
    assert question.base == base.replace(folds=3) and len(question.configurations()) == 15


# What is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--grid lr", r"grid: 'lr'\. Legal: FIELD=VALUE,VALUE,\.\.\. such as lr=0\.001,0\.01"),
        ("--grid =0.1", r"grid: '=0\.1'\. Legal: FIELD=VALUE"),
        ("--grid lr=", r"grid: 'lr='\. Legal: FIELD=VALUE"),
        ("--grid lr=0.1,,0.2", r"lr: '' is not a number\. Legal: more than 0"),
        ("--grid lr=0.1 lr=0.2", r"grid: lr is named twice"),
        ("--grid", r"--grid: expected at least one argument"),
        ("--grid lrr=0.1", r"lrr: resnet has no such field; did you mean lr\?"),
        ("--grid batch_norm=true", r"batch_norm: resnet has no such field"),
        ("--grid lr=0.1,-1", r"lr: -1\.0\. Legal: more than 0"),
        ("--grid lr=nan", r"lr: nan is not finite\. Legal: more than 0"),
        ("--grid optimizer=sgd,adm", r"optimizer: 'adm'; did you mean adam\? Legal: sgd, adam, adamw"),
        ("--grid batch_size=1.5", r"batch_size: 1\.5 is not a whole number"),
        ("--grid mixup=0,1 cutmix=0,1", r"mixup: 1\.0 and cutmix: 1\.0; only one of them may be above 0"),
        ("--grid lr=0.1,0.2 --lr 0.3", r"grid: lr is varied and given as --lr 0\.3 too; legal: one of them"),
        ("", r"grid: nothing is varied\. Legal: --grid FIELD=VALUE,VALUE,\.\.\. .* or --num_samples"),
        ("--grid lr=0.1 --fold 1", r"fold: every fold is trained; legal: leave it away"),
        ("--grid fold=0,1", r"fold"),
        ("--grid lr=0.1,0.1", r"lr"),
        ("--grid lr=0.1 --prune_after 3", r"prune_after: 3\. Legal: 1 to 2, fewer than folds"),
        ("--grid lr=0.1 --folds 5 --prune_after 6", r"prune_after: 6\. Legal: 1 to 4, fewer than folds"),
        ("--grid lr=0.1 --prune_after 0", r"prune_after: 0\. Legal: 1 or more fold, or unset"),
        ("--grid lr=0.1 --prune_after 1 --keep 0", r"keep: 0\.0\. Legal: more than 0, up to 1"),
        ("--grid lr=0.1 --prune_after 1 --keep 1.5", r"keep: 1\.5\. Legal: more than 0, up to 1"),
        ("--grid lr=0.1 --folds 1", r"folds: 1\. Legal: 2 or more, or unset"),
        ("--grid lr=0.1 --num_samples 0", r"num_samples: 0\. Legal: 1 or more, or unset"),
        ("--grid lr=0.1 --grids 1", r"--grids: there is no such flag; did you mean --grid\?"),
        ("--grid lr=0.1 --num_sample 1", r"--num_sample: there is no such flag; did you mean --num_samples\?"),
        ("--grid lr=0.1 --resume", r"--resume: say with --name which grid"),
        ("--grid lr=0.1 --resume --name unknown", r"name: there is nothing named 'unknown' to resume"),
    ],
)
def test_what_is_impossible_is_refused_with_the_value_and_the_legal_ones(words: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        asked(tmp_path / "results", words)
    assert not (tmp_path / "results").exists()


def test_a_refusal_exits_2_with_one_paragraph(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tune.kfold", "--results_dir", str(tmp_path / "results"), "--grid", "lr"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --grid: 'lr'. Legal: FIELD=VALUE") and "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()


def test_more_folds_than_a_class_has_images_are_refused_before_any_training(tmp_path: Path) -> None:
    words = "--arch classic_cnn --dataset digits --limit_train 100 --folds 11 --grid lr=0.1,0.2 --name a --results_dir"
    with pytest.raises(InputError, match=r"folds: 11\. Legal: 2 to (9|10), the images of the smallest class"):
        main([*words.split(), str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()


# What is gone on with


@pytest.mark.parametrize("arch", ["classic_cnn", "compact_cnn", "mixed_kernel_cnn"])
def test_drawn_settings_are_gone_on_with_by_their_name_alone(arch: str, tmp_path: Path) -> None:
    question = asked(tmp_path, f"--arch {arch} --num_samples 3 --name a")
    begun(question)
    again = asked(tmp_path, "--name a --resume")
    assert again.configurations() == question.configurations() and again.base == question.base


def test_a_part_of_a_grid_is_gone_on_with_by_its_name_alone(tmp_path: Path) -> None:
    question = asked(tmp_path, f"{STUDY_000} --num_samples 7 --prune_after 1 --keep 0.3 --name a")
    begun(question)
    again = asked(tmp_path, "--name a --resume")
    assert again.configurations() == question.configurations() and again.decisive() == question.decisive()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--grid lr=0.1,0.3", r"G01 was {'lr': 0\.2}, is now {'lr': 0\.3}"),
        ("--prune_after 2", r"prune_after was 1, is now 2"),
        ("--keep 0.9", r"keep was 0\.5, is now 0\.9"),
        ("--folds 4", r"folds was 3, is now 4"),
        ("--weight_decay 0.1", r"weight_decay was 0\.0005, is now 0\.1"),
    ],
)
def test_another_question_is_refused_with_the_difference(words: str, said: str, tmp_path: Path) -> None:
    begun(asked(tmp_path, "--grid lr=0.1,0.2 --prune_after 1 --name a"))
    with pytest.raises(InputError, match=said):
        asked(tmp_path, f"--name a --resume {words}")
    with pytest.raises(InputError, match=r"name: 'a' exists"):
        asked(tmp_path, "--name a --grid lr=0.1,0.2 --prune_after 1")


def test_a_run_goes_on_elsewhere_and_compiled_or_not(tmp_path: Path) -> None:
    begun(asked(tmp_path, "--grid lr=0.1,0.2 --name a"))
    base = asked(tmp_path, f"--name a --resume --compile true --data_dir {tmp_path}").base
    assert base.compile and base.data_dir == str(tmp_path)
    with pytest.raises(InputError, match=r"memory_format was auto, is now contiguous"):
        asked(tmp_path, "--name a --resume --memory_format contiguous")


def test_a_run_that_is_older_than_a_field_is_gone_on_with(tmp_path: Path) -> None:
    question = asked(tmp_path, "--grid lr=0.1,0.2 --name a")
    begun(question)
    place = question_file(question.folder)
    kept = read_json(place)
    del kept["recipe"]["small_side"], kept["recipe"]["memory_format"]
    write_json(place, kept)
    assert asked(tmp_path, "--name a --resume").base == question.base
    with pytest.raises(InputError, match=r"small_side was 24, is now 20"):
        asked(tmp_path, "--name a --resume --small_side 20")
    write_json(place, kept | {"recipe": {"arch": "resnet", "lr": -1}})
    with pytest.raises(InputError, match=r"is damaged \(lr: -1"):
        asked(tmp_path, "--name a --resume")


def test_a_grid_and_a_search_are_not_taken_for_each_other(tmp_path: Path) -> None:
    begun(asked(tmp_path, "--arch classic_cnn --grid lr=0.1,0.2 --name grid"))
    begun(ask_search(["--results_dir", str(tmp_path), "--arch", "classic_cnn", "--name", "search"]))
    with pytest.raises(InputError):
        asked(tmp_path, "--name search --resume")
    with pytest.raises(InputError):
        ask_search(["--results_dir", str(tmp_path), "--name", "grid", "--resume"])
