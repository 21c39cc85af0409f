"""What a plain install ships: every file of the packages, not only the Python ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("cifar_lab", "tune")


def test_a_plain_install_has_every_file_of_the_packages(tmp_path: Path) -> None:
    # In a copy: building writes an egg-info beside pyproject.toml, and would read a stale one there.
    source, built = tmp_path / "source", tmp_path / "built"
    hidden = shutil.ignore_patterns("__pycache__", ".*")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=hidden)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build_py", "--build-lib", built]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    wanted = {p.relative_to(source) for name in PACKAGES for p in (source / name).rglob("*") if p.is_file()}
    assert {p.suffix for p in wanted} >= {".py", ".yaml"}
    assert wanted == {p.relative_to(built) for p in built.rglob("*") if p.is_file()}
