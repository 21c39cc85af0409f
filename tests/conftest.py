"""Fixtures that several test files share: a cache of the session's own, a tree of images, the real CIFAR-10."""

from __future__ import annotations

import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_lab import models
from cifar_lab.recipe import Recipe, RecipeError

# More threads spin while they wait for each other: on a busy machine that is a hundred times slower, not faster.
torch.set_num_threads(1)
GIVEN_DATA = os.environ.get("CIFAR_LAB_DATA")


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_environment(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the user's cache or the user's images unless it asks for them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(session_cache))
    monkeypatch.delenv("CIFAR_LAB_DATA", raising=False)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the folder which `cifar_lab.data.cache_folder` names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cifar_lab"


@pytest.fixture(scope="session")
def cifar10_folder() -> str:
    """The real CIFAR-10, an absolute path, where CIFAR_LAB_DATA named it before the tests began."""
    if not GIVEN_DATA or not Path(GIVEN_DATA).is_dir():
        pytest.skip("CIFAR_LAB_DATA names no folder with CIFAR-10")
    return str(Path(GIVEN_DATA).resolve())


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes train/CLASS/*.png and test/CLASS/*.png of noise and returns the folder above them."""

    def make(classes: tuple[str, ...] = ("apple", "pear"), count: int = 10, size: int = 32) -> Path:
        noise = np.random.default_rng(0)
        root = tmp_path / "images"
        for part in ("train", "test"):
            for name in classes:
                folder = root / part / name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = noise.integers(0, 256, (size, size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i:03}.png")
        return root

    return make


@pytest.fixture
def another() -> Callable[[str, str], Any]:
    """A function from an architecture and its own field to a legal value which is not the default, and cheap."""

    def find(arch: str, name: str) -> Any:
        default = models.parameters(arch)[name]
        hint = typing.get_type_hints(models.network_class(arch).__init__)[name]
        if typing.get_origin(hint) is typing.Literal:
            wanted: list[Any] = list(typing.get_args(hint))
        else:
            by_type: dict[Any, list[Any]] = {
                bool: [True, False], int: [16, 8, 3, 2, 1, 48], float: [0.5, 0.25, 2.0], str: ["1,2", "none"],
            }  # fmt: skip
            wanted = by_type.get(hint, [])
        for value in wanted:
            try:
                if value != default and Recipe(**{"arch": arch, name: value}):
                    return value
            except RecipeError:
                continue
        raise AssertionError(f"{arch}.{name}: say in `another` what it may become")

    return find
