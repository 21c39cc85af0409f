"""The commands as they are typed: what they refuse, in which words, before what; what they leave."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cifar_lab import cli
from cifar_lab.evaluate import main as evaluate
from cifar_lab.recipe import InputError
from cifar_lab.train import main as train
from tune.asha import main as asha
from tune.question import ask
from tune.report import main as report

ROOT = Path(__file__).parent.parent
TINY = ["--arch", "classic_cnn", "--dataset", "digits", "--limit_train", "100", "--optimizer", "adam", "--lr", "0.003"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_a_search_that_died_before_it_began_leaves_its_name_free(tmp_path: Path) -> None:
    words = [*TINY, "--name", "one", "--results_dir", str(tmp_path)]
    (tmp_path / "one" / "ray").mkdir(parents=True)
    (tmp_path / "one" / "ray" / "lock").touch()
    assert ask(words).folder == tmp_path / "one"
    (tmp_path / "one" / "ray" / "search.json").write_text("{}")
    with pytest.raises(InputError, match=r"'one' exists in .* already, and results are never overwritten"):
        ask(words)


def test_a_reader_that_has_had_enough_is_no_error_of_ours() -> None:
    asked = [sys.executable, "-m", "cifar_lab.cache"]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(120)) == ("", 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--arch resnt", r"arch: 'resnt'; did you mean resnet\? Legal: classic_cnn, compact_cnn, dynamic_cnn"),
        ("--num_sample 5", r"--num_sample: there is no such flag; did you mean --num_samples\?"),
        ("--num_sampels=5", r"--num_sampels: there is no such flag; did you mean --num_samples\?"),
        ("--depth 35", r"--depth: '35'. Legal: 18, 34, 50, 101"),
        ("--lr 0", r"lr: 0.0. Legal: more than 0"),
        ("--lr nan", r"lr: .*nan.* Legal: more than 0"),
        ("--lr abc", r"--lr: 'abc' is not a number. Legal: more than 0"),
        ("--schedule cosin", r"--schedule: 'cosin'; did you mean cosine\? Legal: none, step"),
        ("--num_samples 0", r"num_samples: 0. Legal: 1 or more"),
        ("--reduction_factor 1", r"reduction_factor: 1. Legal: 2 or more"),
        ("--grace_period 31", r"grace_period: 31. Legal: 1 to 30, which is max_epochs"),
        ("--batch_norm true", r"there is no such flag"),
        ("--arch classic_cnn --depth 34", r"depth: 34. Legal: 2 to 6"),
        ("--val_fraction 0", r"val_fraction: 0.0. Trainings are compared by val_acc; legal: more than 0, or folds"),
        ("--name a/b", r"name: 'a/b'. Legal: the name of a folder, without a slash"),
        ("--resume", r"--resume: say with --name which search"),
        ("--resume --name unknown", r"name: there is nothing named 'unknown' to resume"),
        ("--config /nowhere.yaml", r"--config: '/nowhere.yaml' cannot be read"),
    ],
)
def test_what_is_impossible_is_refused_with_the_value_and_the_legal_ones(words: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        ask(["--results_dir", str(tmp_path / "results"), *words.split()])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--dataset digits --gpus_per_trial 99", r"gpus_per_trial: 99. Legal: up to \d+; this machine has \d+ GPUs"),
        (
            "--dataset digits --cpus_per_trial 9999",
            r"cpus_per_trial: 9999. Legal: up to \d+; this machine has \d+ CPUs",
        ),
        ("--data_dir /nowhere", r"--data_dir: '/nowhere' is no folder. Three ways out"),
        ("--dataset digits --limit_train 5000", r"limit_train: 5000. Legal: 10, one a class, to 1293"),
        ("--dataset digits --results_dir /proc/nowhere", r"results_dir: '/proc/nowhere' cannot be written"),
        ("--dataset digits --address 127.0.0.1:1", r"address: no Ray cluster answers at '127.0.0.1:1'"),
    ],
)
def test_what_the_machine_or_the_data_forbid_is_refused_before_any_training(
    words: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        asha(["--results_dir", str(tmp_path), "--max_epochs", "2", *words.split()])
    assert not list(tmp_path.rglob("*.csv"))


def test_a_disk_too_full_is_refused_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Full)
    with pytest.raises(InputError, match="has 1 kB free, and this search needs about"):
        asha(["--dataset", "digits", "--arch", "classic_cnn", "--results_dir", str(tmp_path), "--name", "a"])
    assert not list(tmp_path.iterdir())


def test_a_typo_exits_2_within_one_paragraph_and_loads_neither_lightning_nor_ray() -> None:
    done = run("-X", "importtime", "-m", "tune.asha", "--arch", "resnet", "--lrr", "0.1")
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and done.stdout == ""
    assert said and said[0].startswith("error: --lrr: there is no such flag; did you mean --lr?") and len(said) < 4
    loaded = {line.split("|")[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "torch" in loaded and not loaded & {"pytorch_lightning", "ray", "pandas", "matplotlib"}


@pytest.mark.parametrize("module", ["tune.asha", "cifar_lab.train"])
def test_missing_images_are_told_before_lightning_is_imported(module: str, tmp_path: Path) -> None:
    words = ["--arch", "classic_cnn", "--dataset", "folder", "--data_dir", str(tmp_path / "none")]
    done = run("-X", "importtime", "-m", module, *words, "--results_dir", str(tmp_path))
    loaded = {line.split("|")[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 2 and "torch" in loaded
    assert not loaded & {"pytorch_lightning", "matplotlib"} and not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["tune.asha", "cifar_lab.train"])
def test_help_names_every_field_with_its_docstring_and_stays_light(module: str) -> None:
    done = run("-X", "importtime", "-m", module, "--arch", "classic_cnn", "--help")
    assert done.returncode == 0
    for flag in ("--lr ", "--batch_norm", "--dataset", "--split_seed", "--resume"):
        assert flag in done.stdout
    assert "peak learning rate" in done.stdout and "each convolution is followed by batch norm" in done.stdout.replace(
        "\n                        ", " "
    )
    loaded = {line.split("|")[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not loaded & {"pytorch_lightning", "ray"}


@pytest.mark.parametrize(("module", "flag"), [("evaluate", "--data_dir"), ("predict", "--map"), ("export", "--output")])
def test_help_of_a_checkpoints_commands_stays_light(module: str, flag: str) -> None:
    done = run("-X", "importtime", "-m", f"cifar_lab.{module}", "--help")
    assert done.returncode == 0 and flag in done.stdout
    loaded = {line.split("|")[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "jsonargparse" in loaded and not loaded & {"pytorch_lightning", "pandas", "matplotlib", "onnxruntime"}


def test_a_yaml_file_gives_fields_and_flags_after_it_win(tmp_path: Path) -> None:
    place = tmp_path / "recipe.yaml"
    place.write_text(yaml.safe_dump({"arch": "classic_cnn", "lr": 0.003, "batch_norm": True}))
    question = ask(["--config", str(place), "--lr", "0.002"])
    assert question.base.arch == "classic_cnn" and question.base.lr == 0.002
    assert question.given["batch_norm"] is True and not {"lr", "batch_norm"} & set(question.space)
    place.write_text("arch: classic_cnn\nbatch_nrom: true\n")
    with pytest.raises(InputError, match="batch_nrom: there is no such field in a YAML file; did you mean batch_norm"):
        ask(["--config", str(place)])


def test_training_leaves_its_files_resumes_and_evaluation_adds_the_test_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "--name", "one", "--results_dir", str(tmp_path)]
    assert train([*words, "--max_epochs", "2"]) == 0
    folder = tmp_path / "one"
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.parent.name != "figures"}
    left = {name for name in left if not name.startswith("tensorboard/events.out.tfevents.")}
    names = ("best.ckpt", "last.ckpt", "sha256.json")
    assert left == {"curves.csv", "best.json", "report.html", *(f"checkpoints/{name}" for name in names)}
    best = json.loads((folder / "best.json").read_text())
    assert not [name for name in best if name.startswith("test")]
    assert len(pd.read_csv(folder / "curves.csv")) == 2
    with pytest.raises(InputError, match="already, and results are never overwritten"):
        train(words)
    assert train(["--name", "one", "--results_dir", str(tmp_path), "--resume"]) == 0
    assert len(pd.read_csv(folder / "curves.csv")) == 2
    capsys.readouterr()
    assert evaluate([str(folder / "checkpoints" / "best.ckpt"), "--quiet"]) == 0
    accuracy = float(capsys.readouterr().out)
    best = json.loads((folder / "best.json").read_text())
    assert abs(best["test_acc"] - accuracy) < 1e-4 and best["test_n"] == 360 and best["recipe"]["arch"] == "classic_cnn"
    assert {"test_predictions.csv", "per_class.csv", "confusion.csv"} <= {p.name for p in folder.iterdir()}
    assert evaluate([str(folder / "checkpoints" / "best.ckpt"), "--output", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "per_class.csv").read_text() == (folder / "per_class.csv").read_text()


def test_a_training_without_validation_says_so_and_can_be_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "--name", "one", "--results_dir", str(tmp_path), "--max_epochs", "2", "--val_fraction", "0"]
    assert train(words) == 0
    said = capsys.readouterr().out
    assert "Trained without validation, to epoch 2; not tested." in said and "val_acc" not in said
    assert pd.read_csv(tmp_path / "one" / "curves.csv").val_acc.isna().all()
    best = json.loads((tmp_path / "one" / "best.json").read_text())
    assert best["epoch"] == 2 and best["val_acc"] is None
    assert evaluate([str(tmp_path / "one" / "checkpoints" / "best.ckpt"), "--quiet"]) == 0
    page = (tmp_path / "one" / "report.html").read_text()
    assert "Test accuracy" in page and "none held out: the last epoch counts" in page
    assert not re.search(r"\bnan\b", page)


def test_a_diverged_training_exits_1_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--arch", "classic_cnn", "--dataset", "digits", "--limit_train", "100", "--lr", "1e9", "--max_epochs", "3"]
    assert train([*words, "--name", "one", "--results_dir", str(tmp_path)]) == 1
    assert "diverged in epoch 1: train_loss " in " ".join(capsys.readouterr().err.split())
    assert train(["--name", "one", "--results_dir", str(tmp_path), "--resume", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"folder": str(tmp_path / "one"), "status": {"diverged": 1}, "resume": None}
    assert err.startswith("error: diverged in epoch 1")


def test_evaluating_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(os.urandom(100))
    with pytest.raises(InputError, match=r"a\.ckpt is no checkpoint of cifar_lab"):
        evaluate([str(tmp_path / "a.ckpt")])
    with pytest.raises(InputError, match="there is no such checkpoint"):
        evaluate([str(tmp_path / "b.ckpt")])


def test_a_report_of_a_committed_search_can_be_written_again(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results" / "001-classic-cnn" / "corrected", tmp_path / "classic_cnn")
    assert report([str(tmp_path / "classic_cnn")]) == 0
    page = (tmp_path / "classic_cnn" / "report.html").read_text()
    best = json.loads((tmp_path / "classic_cnn" / "best.json").read_text())
    assert f"Test accuracy {sum(best['test_acc_seeds']) / 3:.2%}" in page
    with pytest.raises(InputError, match="nothing that was run lies there"):
        report([str(tmp_path)])


def test_a_missing_test_set_is_refused_before_any_training(tmp_path: Path, make_tree: Callable[..., Path]) -> None:
    images = make_tree()
    shutil.rmtree(images / "test" / "pear")
    (images / "test" / "plum").mkdir()
    shutil.copy(next((images / "test" / "apple").iterdir()), images / "test" / "plum" / "a.png")
    words = ["--arch", "classic_cnn", "--dataset", "folder", "--data_dir", str(images)]
    with pytest.raises(InputError, match="The test set has the classes apple, plum, the training set apple, pear"):
        asha([*words, "--results_dir", str(tmp_path / "results"), "--name", "a"])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_damaged_image_is_named_before_any_training(
    tmp_path: Path, make_tree: Callable[..., Path], capsys: pytest.CaptureFixture[str], part: str
) -> None:
    image = make_tree() / part / "pear" / "003.png"
    image.write_bytes(image.read_bytes()[:-1500])
    words = ["--arch", "classic_cnn", "--dataset", "folder", "--data_dir", str(image.parents[2])]
    with pytest.raises(SystemExit, match=r"^2$"), cli.exit_status():
        asha([*words, "--results_dir", str(tmp_path / "results"), "--name", "a"])
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"error: {image} is not a readable image") and said.endswith("Mend or remove it.")
    assert not (tmp_path / "results").exists()


def test_a_finished_training_is_left_alone_and_a_checkpoint_speaks_for_itself_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "--name", "one", "--results_dir", str(tmp_path), "--max_epochs", "1", "--quiet"]
    assert train(words) == 0
    folder = tmp_path / "one"
    assert evaluate([str(folder / "checkpoints" / "best.ckpt"), "--quiet"]) == 0
    before = (folder / "best.json").read_text()
    capsys.readouterr()
    assert train(["--name", "one", "--results_dir", str(tmp_path), "--resume", "--json"]) == 0
    told = {"folder": str(folder), "status": {"completed": 1}, "resume": None}
    assert json.loads(capsys.readouterr().out) == json.loads(before) | told
    assert evaluate([str(folder / "checkpoints" / "last.ckpt"), "--quiet"]) == 0
    assert (folder / "best.json").read_text() == before
    last, best = (json.loads((place / "best.json").read_text()) for place in (folder / "checkpoints", folder))
    assert last["recipe"] == best["recipe"] and last["sha256"] != best["sha256"] and "val_acc" not in last


def test_a_refused_training_leaves_its_name_free(tmp_path: Path) -> None:
    words = ["--name", "one", "--results_dir", str(tmp_path), "--arch", "classic_cnn"]
    with pytest.raises(InputError, match="is no folder"):
        train([*words, "--data_dir", "/nowhere"])
    assert not (tmp_path / "one").exists()


def test_the_command_that_goes_on_asks_the_same_again() -> None:
    first = cli.command("tune.asha", ["--arch", "resnet", "--name", "a b"])
    assert first == "python -m tune.asha --arch resnet --name 'a b'"
    assert cli.command("tune.asha", ["--name", "a b", "--resume"], first) == first
    grown = cli.command("tune.asha", ["--name", "a b", "--num_samples", "40", "--resume"], first)
    assert grown == f"{first} --name 'a b' --num_samples 40"
    assert cli.resume_line(first).endswith(" -m tune.asha --arch resnet --name 'a b' --resume")
