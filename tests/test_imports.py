"""The imports run one way only, read from the source without running it."""

from __future__ import annotations

import ast
import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "cifar_lab").rglob("*.py"))
SEARCH = sorted((ROOT / "tune").rglob("*.py"))
ARCHITECTURE_FILES = [p for p in LIBRARY if p.parent.name == "models" and p.stem != "__init__"]
LIGHT = ("recipe", "winograd", "layers", "augment", "optim", "dataset", "prepare", "checkpoint")
WITHOUT_LIGHTNING = [p for p in LIBRARY if p.stem in LIGHT or p.parent.name == "models"]
ALLOWED = {
    "winograd": set(),
    "layers": {"winograd"},
    "augment": set(),
    "recipe": {"models"},
    "models": {"layers", "recipe"},
    "optim": {"recipe"},
    "corruptions": {"recipe"},
    "dataset": {"files", "progress", "recipe"},
    "prepare": {"dataset", "layers", "models", "recipe"},
    "checkpoint": {"files", "machine", "recipe"},
    "data": {"augment", "dataset", "recipe"},
    "classifier": {"augment", "layers", "optim", "dataset", "data", "models", "recipe"},
}  # fmt: skip


@functools.cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(file.read_text())))


@functools.cache
def imported(file: Path) -> set[str]:
    """Absolute names of all that a file imports, `from a import b` as a.b, however deep in a function."""
    names: set[str] = set()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(ROOT).parent.parts
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def packages(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(file)}


def label(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_there_is_something_to_read() -> None:
    assert {"recipe", "fit", "resnet"} <= {file.stem for file in LIBRARY}
    assert "pytorch_lightning" in packages(ROOT / "cifar_lab" / "fit.py")


@pytest.mark.parametrize("file", LIBRARY, ids=label)
def test_the_library_knows_neither_ray_nor_tune(file: Path) -> None:
    assert not packages(file) & {"ray", "tune"}


@pytest.mark.parametrize("file", WITHOUT_LIGHTNING, ids=label)
def test_lightning_stays_out_of_recipes_models_and_transforms(file: Path) -> None:
    assert not packages(file) & {"pytorch_lightning", "lightning", "lightning_fabric"}


@pytest.mark.parametrize("file", ARCHITECTURE_FILES, ids=label)
def test_no_architecture_imports_another(file: Path) -> None:
    others = {p.stem for p in ARCHITECTURE_FILES} - {file.stem}
    assert not {
        name for name in imported(file) if name.startswith("cifar_lab.models.") and name.split(".")[2] in others
    }
    assert not {name for name in imported(file) if name.startswith("cifar_lab.") and name.split(".")[1] != "layers"}


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_run_leftwards(name: str) -> None:
    file = ROOT / "cifar_lab" / (f"{name}/__init__.py" if name == "models" else f"{name}.py")
    inner = {found.split(".")[1] for found in imported(file) if found.startswith("cifar_lab.")}
    assert inner - {name} <= ALLOWED[name]


@pytest.mark.parametrize("file", LIBRARY + SEARCH, ids=label)
def test_the_namespace_is_pytorch_lightning(file: Path) -> None:
    assert "lightning" not in packages(file)


@pytest.mark.parametrize("file", LIBRARY + SEARCH, ids=label)
def test_ray_tune_is_imported_by_its_whole_name(file: Path) -> None:
    assert not [n for n in nodes(file) if isinstance(n, ast.ImportFrom) and n.module == "ray"]


def test_only_fit_and_evaluate_make_a_trainer() -> None:
    made = set()
    for file in LIBRARY + SEARCH:
        for node in nodes(file):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Trainer":
                made.add(label(file))
    assert made and made <= {"cifar_lab/fit.py", "cifar_lab/evaluate.py"}


def test_only_evaluate_loads_the_test_part() -> None:
    loading = set()
    for file in LIBRARY + SEARCH:
        for node in nodes(file):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] != "load":
                continue
            if any(isinstance(arg, ast.Constant) and arg.value == "test" for arg in node.args):
                loading.add(label(file))
    assert loading == {"cifar_lab/evaluate.py"}


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("cifar_lab.compare, cifar_lab.plots, cifar_lab.report, tune.report", {"torch", "pytorch_lightning", "ray"}),
        ("cifar_lab.prepare, cifar_lab.checkpoint", {"pytorch_lightning", "ray"}),
        ("tune.search, tune.grid", {"pytorch_lightning", "matplotlib", "sklearn"}),
    ],
    ids=["pages", "preparing", "searching"],
)
def test_what_need_not_wait_for_heavy_packages_starts_without_them(modules: str, heavy: set[str]) -> None:
    asked = f"import sys, {modules}; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("module", "name", "report", "experiment"),
    [("search", "Search", "write_report", "001-classic-cnn"), ("grid", "Grid", "write_grid_report", "002-lr")],
    ids=["search", "grid"],
)
def test_what_the_end_wants_is_among_what_is_imported_beside_the_trainings(
    module: str, name: str, report: str, experiment: str, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "results" / experiment / "corrected", tmp_path / "run")
    early = {"pytorch_lightning"} if module == "search" else set()  # to test the finalists
    code = f"""
import importlib, pathlib, sys
from tune.{module} import {name}
for module in {name}.AFTERWARDS:
    importlib.import_module(module)
packages = lambda: {{name.partition(".")[0] for name in sys.modules}}
before = packages()
from tune.report import {report}
{report}(pathlib.Path(sys.argv[1]))
print(*packages() - before, *{early} - before)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [] and (tmp_path / "run" / "report.html").exists()
