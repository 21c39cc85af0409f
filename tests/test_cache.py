"""The cache is listed with its bytes, and removed when asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifar_lab.cache import main
from cifar_lab.dataset import load
from cifar_lab.recipe import Recipe


def test_the_cache_is_listed_and_removed(fresh_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(Recipe(dataset="digits"), "test")
    assert main([]) == 0
    told = capsys.readouterr().out.splitlines()
    decoded = 360 * (3 * 32 * 32 + 8 + 6 * 8)
    assert len(told) == 2 and "digits-test-" in told[0] and told[0].split()[:2] == [f"{decoded / 1e6:.3g}", "MB"]
    assert list(fresh_cache.glob("digits-test-*"))
    assert main(["--clear"]) == 0
    assert "removed" in capsys.readouterr().out
    assert not [entry for entry in fresh_cache.iterdir() if entry.suffix != ".lock"]
    assert len(load(Recipe(dataset="digits"), "test")) == 360, "decoded again"


def test_an_absent_cache_is_empty(fresh_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--clear"]) == 0
    assert capsys.readouterr().out.startswith("0 B removed")
