"""Notebooks run from top to bottom, tell what the experiment's files say, define nothing, and stay small."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from PIL import Image
from scipy.stats import binomtest

from cifar_lab.data import CIFAR10DataModule
from cifar_lab.dataset import CIFAR10_CLASSES
from cifar_lab.files import read_json
from cifar_lab.gradient_table import COLUMNS
from cifar_lab.predict import predict
from cifar_lab.recipe import Recipe
from cifar_lab.report import headline

# Of Jupyter's own, which the tests of this file do not judge.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What each reads when CIFAR_LAB_EXPERIMENT is unset; one_factor reads all FACTORS.
COMMITTED = {
    "compare": "001-classic-cnn", "data": "000-final", "one_factor": "002-lr", "own_images": "002-channels",
    "per_class": "001-classic-cnn", "search": "001-classic-cnn",
}  # fmt: skip
FACTORS = ("002-channels", "002-batch", "002-lr")
VARIABLES = ("CIFAR_LAB_EXPERIMENT", "CIFAR_LAB_OTHER", "CIFAR_LAB_IMAGES", "CIFAR_LAB_DATA")
TINY = """
from tune import asha, kfold
common = "--dataset digits --optimizer adam --limit_train 200 --max_epochs 2 --precision 32 --results_dir".split()
common += [FOLDER, "--quiet", "--arch", "classic_cnn"]
assert asha.main([*common, *"--name search --num_samples 3 --finalists 2 --finalist_seeds 2".split()]) == 0
assert kfold.main([*common, *"--name grid --folds 2 --grid lr=0.00001,0.003 width=4,6".split()]) == 0
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Path:
    """A folder with a search, a grid with gradients, a second model's answers, own images, and a data folder."""
    folder = tmp_path_factory.mktemp("tiny")
    environment = {**os.environ, "XDG_CACHE_HOME": str(session_cache), "RAY_worker_niceness": "0"}
    command = [sys.executable, "-c", TINY.replace("FOLDER", repr(str(folder)))]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    shutil.copytree(folder / "search", folder / "other")
    answers = pd.read_csv(folder / "other" / "test_predictions.csv")
    answers.loc[::3, "prediction"] = 0
    answers.to_csv(folder / "other" / "test_predictions.csv", index=False)

    gone = {"epoch": 1, "layer": "convolutions.1", "kind": "relu", "n": 4, "zero": 1.0}
    sizes = {"epoch": 1, "layer": "head.weight", "kind": "gradient", "n": 10, "zero": 0.0, "rms": 0.1, "b16": 10}
    (folder / "grid" / "gradients").mkdir()
    watched = pd.DataFrame([gone, sizes], columns=COLUMNS)
    watched.fillna({name: 0 for name in COLUMNS if name.startswith("b")}).to_csv(
        folder / "grid" / "gradients" / "G00.csv", index=False
    )

    shutil.copytree(folder / "grid", folder / "half", ignore=shutil.ignore_patterns("gradients"))
    half = pd.read_csv(folder / "half" / "trials.csv")
    half[half.width == 4].drop(columns="width").to_csv(folder / "half" / "trials.csv", index=False)

    noise = np.random.default_rng(0)
    for name in CIFAR10_CLASSES:
        (folder / "data" / "train" / name).mkdir(parents=True)
        for i in range(10):
            pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / "train" / name / f"{i}.png")
    shutil.copytree(folder / "data" / "train" / "ship", folder / "images")
    (folder / "images" / "torn.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def executed(tiny: Path, session_cache: Path) -> dict[tuple[str, str], nbformat.NotebookNode]:
    """Each notebook, run on its committed experiment and on the tiny one: all in one kernel, emptied before each."""
    ours = {
        "CIFAR_LAB_EXPERIMENT": tiny / "search", "CIFAR_LAB_OTHER": tiny / "other", "CIFAR_LAB_IMAGES": tiny / "images",
    }  # fmt: skip
    whole, runs = nbformat.v4.new_notebook(), {}
    for place in NOTEBOOKS:
        grids = f"{tiny / 'grid'}{os.pathsep}{tiny / 'half'}"
        grid = {"CIFAR_LAB_EXPERIMENT": grids} if place.stem == "one_factor" else {}
        for name, variables in (("committed", {"CIFAR_LAB_DATA": tiny / "data"}), ("tiny", ours | grid)):
            said = {variable: str(value) for variable, value in variables.items()}
            start = (
                f"%reset -f\nimport os\n[os.environ.pop(name, None) for name in {VARIABLES}]\nos.environ.update({said})"
            )
            runs[place.stem, name] = nbformat.read(place, as_version=4)
            whole.cells += [nbformat.v4.new_code_cell(start), *runs[place.stem, name].cells]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(session_cache))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        where = {"metadata": {"path": str(ROOT / "notebooks")}}
        NotebookClient(whole, timeout=900, allow_errors=True, resources=where).execute()
    return runs


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text(notebook: nbformat.NotebookNode) -> str:
    """All that is shown but for the pictures."""
    shown = [out.get("text", "") + out.get("data", {}).get("text/html", "") for out in outputs(notebook)]
    return "\n".join([*shown, *(out.data.get("text/plain", "") for out in outputs(notebook) if "data" in out)])


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum(bool({"image/png", "image/jpeg"} & set(out.get("data", {}))) for out in outputs(notebook))


def sizes(notebook: nbformat.NotebookNode) -> list[str]:
    """Of each figure its size and how many axes it has."""
    return re.findall(r"<Figure size [^>]*>", text(notebook))


# What each must tell of an experiment, computed another way than the notebook does


def per_class_tells(shown: str, folder: Path) -> None:
    table = pd.read_csv(folder / "per_class.csv", dtype={"class": str}).set_index("class").accuracy
    assert headline(read_json(folder / "best.json")) in shown
    assert f"{table.idxmin()} is hardest ({table.min():.1%})" in shown


def search_tells(shown: str, folder: Path) -> None:
    best, trials = read_json(folder / "best.json"), pd.read_csv(folder / "trials.csv")
    assert headline(best) in shown and f"{best['trial_id']} won: " in shown
    full = len(trials) * best["recipe"]["max_epochs"]
    stopped = sum("below the cutoff" in reason for reason in trials.reason)
    assert f"{trials.epochs.sum():,} of {full:,} epochs and stopped {stopped} of {len(trials)} trials" in shown
    finalists = pd.read_csv(folder / "finalists.csv")
    for trial in set(finalists.trial_id):
        assert f"{np.mean(finalists.val_acc[finalists.trial_id == trial]):.2%}" in shown
    means = sorted(finalists.groupby("trial_id").val_acc.mean(), reverse=True)
    assert f"{100 * (means[0] - means[1]):+.2f} points over" in shown


def compare_tells(shown: str, folder: Path, other: Path) -> None:
    ours, theirs = (pd.read_csv(place / "test_predictions.csv") for place in (folder, other))
    right, also = ours.label == ours.prediction, theirs.label == theirs.prediction
    assert f"{right.mean():.2%} against {also.mean():.2%} of {len(right):,} test images" in shown
    alone, others = int((right & ~also).sum()), int((also & ~right).sum())
    p = binomtest(alone, alone + others).pvalue
    assert f"McNemar's exact p {p:.2g}." in shown
    assert ("The two differ" in shown) == (p < 0.05)


def one_factor_tells(shown: str, folder: Path) -> None:
    trials = pd.read_csv(folder / "trials.csv")
    varied = [name for name in list(trials)[1 : list(trials).index("epochs")] if name != "fold"]
    assert varied and f"Varied: {', '.join(varied)}." in shown
    assert shown.count("<Figure size 760x280 with 2 Axes>") >= len(varied)
    for name in varied:
        for value in set(trials[name]):
            assert f"{value} {trials.val_acc[trials[name] == value].mean():.1%}" in shown


def data_tells(shown: str, folder: Path, counts: tuple[int, int], mean: float) -> None:
    best = read_json(folder / "best.json")
    assert headline(best) in shown and f"{mean:.3f}" in shown
    train, validation = (re.search(rf"<th>{part}</th>\s*(<td>\d+</td>\s*)+", shown) for part in ("train", "validation"))
    assert train and validation
    for row, n in zip((train, validation), counts, strict=True):
        assert sum(map(int, re.findall(r"<td>(\d+)</td>", row[0]))) == n
    assert "Images in both parts: 0." in shown
    assert (f"crop {best['recipe']['crop']}, " in shown) == best["recipe"]["augment"]


def committed_tells(name: str, notebook: nbformat.NotebookNode, images: tuple[tuple[int, int], float]) -> None:
    shown, folder = text(notebook), ROOT / "results" / COMMITTED[name] / "corrected"
    if name == "compare":
        compare_tells(shown, folder, ROOT / "results" / "000-final" / "corrected")
    elif name == "data":
        data_tells(shown, folder, *images)
    elif name == "own_images":
        assert headline(read_json(folder / "best.json")) in shown
    elif name == "one_factor":
        for study in FACTORS:
            one_factor_tells(shown, ROOT / "results" / study / "corrected")
    else:
        {"per_class": per_class_tells, "search": search_tells}[name](shown, folder)


# The committed outputs


def test_all_notebooks_are_known() -> None:
    assert {place.stem for place in NOTEBOOKS} == set(COMMITTED)


@pytest.mark.parametrize("place", NOTEBOOKS, ids=lambda place: place.stem)
def test_a_notebook_imports_and_shows_but_defines_nothing(place: Path) -> None:
    assert place.stat().st_size < 300_000
    cells = [cell for cell in nbformat.read(place, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        tree = ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith("%")))
        made = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not [node for node in ast.walk(tree) if isinstance(node, made)]


@pytest.mark.parametrize("place", NOTEBOOKS, ids=lambda place: place.stem)
def test_a_notebook_is_committed_as_it_ran_from_top_to_bottom(place: Path) -> None:
    notebook = nbformat.read(place, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)) and pictures(notebook)
    assert {out.output_type for out in outputs(notebook)} <= {"execute_result", "display_data", "stream"}
    assert not [out for out in outputs(notebook) if out.get("name") == "stderr"]
    assert not re.search(r"[\s'\"(=:>](/\w+){2,}|[A-Z]:\\", text(notebook)), "no path of a machine"


@pytest.mark.parametrize("name", COMMITTED)
def test_a_notebooks_saved_outputs_tell_what_the_committed_experiment_says(name: str) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    committed_tells(name, notebook, ((45000, 5000), 0.4914))
    assert "No checkpoint" not in text(notebook)


# Run on the committed experiments, with images of noise


@pytest.mark.parametrize("name", COMMITTED)
def test_a_notebook_runs_on_the_committed_experiment(
    name: str, executed: dict[tuple[str, str], nbformat.NotebookNode]
) -> None:
    notebook = executed[name, "committed"]
    assert not [out.evalue for out in outputs(notebook) if out.output_type == "error"]
    committed_tells(name, notebook, ((90, 10), 0.5))
    assert ("No checkpoint lies here" in text(notebook)) == (name == "own_images")
    saved = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert sizes(saved), "its figures are drawn"
    if name != "own_images":  # which draws none without the checkpoint
        assert sizes(notebook) == sizes(saved), "the figures that are committed are those that are drawn today"


# A tiny experiment


@pytest.mark.parametrize("name", COMMITTED)
def test_a_notebook_tells_what_the_experiment_named_says(
    name: str, executed: dict[tuple[str, str], nbformat.NotebookNode], tiny: Path
) -> None:
    notebook, folder = executed[name, "tiny"], tiny / "search"
    assert not [out.evalue for out in outputs(notebook) if out.output_type == "error"]
    assert pictures(notebook)
    shown = text(notebook)
    if name == "compare":
        compare_tells(shown, folder, tiny / "other")
    elif name == "data":
        data = CIFAR10DataModule(Recipe(**read_json(folder / "best.json")["recipe"]))
        data_tells(shown, folder, (len(data.train_indices), len(data.val_indices)), float(data.mean[0]))
    elif name == "one_factor":
        one_factor_tells(shown, tiny / "grid")
        one_factor_tells(shown, tiny / "half")
        assert "convolutions.1 (ReLU): all 4 channels gave nothing" in shown
    elif name == "own_images":
        best = read_json(folder / "best.json")
        answers = predict(folder / best["checkpoint"], tiny / "images")
        assert len(answers) == 11 and "10 images, of " in shown and str(answers[-1].error) in shown
        for answer in answers[:-1]:
            assert f"{answer.top(1)[0][0]} {answer.top(1)[0][1]:.1%}" in shown
    else:
        {"per_class": per_class_tells, "search": search_tells}[name](shown, folder)
