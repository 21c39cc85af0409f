"""Notebooks run from top to bottom, define nothing, and stay small."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("place", NOTEBOOKS, ids=lambda place: place.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_notebook_runs_on_the_committed_experiment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = place.parent.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("CIFAR_LAB_EXPERIMENT", raising=False)
    notebook = nbformat.read(place, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(place.parent)}}).execute()
    shown = "".join(str(cell.get("outputs", "")) for cell in notebook.cells)
    assert "image/png" in shown and "Test accuracy" in shown


@pytest.mark.parametrize("place", NOTEBOOKS, ids=lambda place: place.stem)
def test_a_notebook_imports_and_shows_but_defines_nothing(place: Path) -> None:
    assert place.stat().st_size < 300_000
    for cell in nbformat.read(place, as_version=4).cells:
        if cell.cell_type == "code":
            tree = ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith("%")))
            assert not [
                node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))
            ]
            assert cell.outputs or cell.source.startswith("%"), "committed with its outputs"
