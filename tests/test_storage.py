"""Checkpoints at a URL: what was sent comes back, also after an upload that was cut short."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest

import tune.storage
from cifar_lab.checkpoint import newest
from cifar_lab.files import LAST, PREVIOUS
from cifar_lab.fit import fit
from cifar_lab.recipe import InputError, Recipe
from tune.storage import Mirror, checked, seen, token

RECIPE = Recipe(arch="classic_cnn", width=3, dataset="digits", limit_train=50, max_epochs=3)


@pytest.fixture(scope="module")
def epochs(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> list[Path]:
    """What a training had left after each of its first two epochs."""
    root = tmp_path_factory.mktemp("epochs")

    def on_epoch(row: dict[str, float]) -> None:
        shutil.copytree(root / "run", root / f"{row['epoch']}")
        if row["epoch"] == 2:
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setenv("XDG_CACHE_HOME", str(session_cache))
        fit(RECIPE, root / "run", on_epoch=on_epoch)
    return [root / "1", root / "2"]


@pytest.fixture
def mirror(epochs: list[Path], tmp_path: Path) -> Mirror:
    """A training of two epochs, sent after each."""
    made = Mirror(f"file://{tmp_path}/there/T000", tmp_path / "here")
    for left in epochs:
        shutil.copytree(left, tmp_path / "here", dirs_exist_ok=True)
        made.push()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_copy_equals_the_folder_and_comes_back_elsewhere(mirror: Mirror, tmp_path: Path) -> None:
    here = contents(tmp_path / "here")
    assert {LAST, PREVIOUS, "best.ckpt", "sha256.json"} == set(here)
    assert contents(tmp_path / "there" / "T000") == here
    Mirror(f"file://{tmp_path}/there/T000", tmp_path / "elsewhere").pull()
    assert contents(tmp_path / "elsewhere") == here


def test_only_what_changed_is_sent(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    put = type(mirror.files).put_file
    monkeypatch.setattr(
        type(mirror.files), "put_file", lambda self, a, b, **k: (sent.append(Path(b).name), put(self, a, b, **k))
    )
    mirror.push()
    assert sent == []
    (tmp_path / "here" / "best.ckpt").write_bytes(b"new")
    mirror.push()
    assert sent == ["best.ckpt"]
    assert (tmp_path / "there" / "T000" / "best.ckpt").read_bytes() == b"new"


def test_an_upload_cut_short_costs_one_epoch(mirror: Mirror, tmp_path: Path) -> None:
    last = tmp_path / "there" / "T000" / LAST
    last.write_bytes(last.read_bytes()[:1000])
    Mirror(f"file://{tmp_path}/there/T000", tmp_path / "elsewhere").pull()
    found = newest(tmp_path / "elsewhere")
    assert found is not None and found[0].name == PREVIOUS
    assert found[1]["epoch"] == 0, "Lightning counts from 0"


def test_an_upload_that_never_came_costs_one_epoch(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "there" / "T000" / LAST).unlink()
    Mirror(f"file://{tmp_path}/there/T000", tmp_path / "elsewhere").pull()
    found = newest(tmp_path / "elsewhere")
    assert found is not None and found[0].name == PREVIOUS


def test_a_storage_that_fails_for_a_moment_costs_nothing(
    epochs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror(f"file://{tmp_path}/there/T000", tmp_path / "here")
    shutil.copytree(epochs[0], tmp_path / "here")
    mirror.push()
    monkeypatch.setattr(tune.storage, "PAUSES", (0.0, 0.0))
    put, failed = mirror.files.put_file, []

    def put_file(*words: str) -> None:
        if len(failed) < 2:
            failed.append(words)
            raise ConnectionResetError("by the test")
        put(*words)

    monkeypatch.setattr(mirror.files, "put_file", put_file)
    shutil.copytree(epochs[1], tmp_path / "here", dirs_exist_ok=True)
    mirror.push()
    assert len(failed) == 2 and contents(tmp_path / "there" / "T000") == contents(tmp_path / "here")
    failed.clear()
    monkeypatch.setattr(tune.storage, "PAUSES", (0.0,))
    shutil.copytree(epochs[0], tmp_path / "here", dirs_exist_ok=True)
    with pytest.raises(OSError, match=r"cannot be used \(by the test\)"):
        mirror.push()


def test_what_is_gone_here_is_removed_there(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "here" / PREVIOUS).unlink()
    mirror.push()
    assert not (tmp_path / "there" / "T000" / PREVIOUS).exists()
    mirror.remove()
    assert not (tmp_path / "there" / "T000").exists()
    mirror.remove()  # what is not there needs no removing


def test_any_protocol_of_fsspec_serves(mirror: Mirror, tmp_path: Path) -> None:
    away = Mirror("memory://bucket/search/T000", tmp_path / "here")
    away.push()
    Mirror("memory://bucket/search/T000", tmp_path / "elsewhere").pull()
    assert contents(tmp_path / "elsewhere") == contents(tmp_path / "here")
    away.remove()
    assert fsspec.filesystem("memory").find("/bucket") == []


def test_a_token_is_seen_where_the_place_is_shared(tmp_path: Path) -> None:
    with token(str(tmp_path)) as name:
        assert seen(str(tmp_path), name)
        assert not seen(str(tmp_path / "other"), name)
    assert not seen(str(tmp_path), name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["nonsense://bucket", "/proc/nowhere", "file:///proc/nowhere"])
def test_a_url_that_cannot_be_used_is_quoted_with_what_is_legal(url: str) -> None:
    with pytest.raises(InputError, match=r"storage: '" + url) as refused:
        checked(url)
    assert "s3://bucket/folder" in str(refused.value)
