"""Storage: the checkpoints of trials on other machines, at a URL that all of them reach."""

from __future__ import annotations

import contextlib
import functools
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import fsspec

from cifar_lab.files import DIGESTS, LAST, PREVIOUS
from cifar_lab.recipe import InputError

P = ParamSpec("P")
T = TypeVar("T")
PAUSES = (1.0, 5.0, 20.0)  # seconds before each further try


def patient(work: Callable[P, T]) -> Callable[P, T]:
    """Try again what met an OSError, such as a storage that does not answer for a moment, a few times."""

    @functools.wraps(work)
    def trying(*args: P.args, **named: P.kwargs) -> T:
        for pause in PAUSES:
            try:
                return work(*args, **named)
            except OSError:
                time.sleep(pause)
        return work(*args, **named)

    return trying


class Mirror:
    """A folder of checkpoints on this machine, and its copy at a URL of fsspec's.

    An upload that was cut short is known by its digest, as a damaged checkpoint is: the digests go first, and the last
    checkpoint becomes the previous one before the new one is sent.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.files, self.root = fsspec.url_to_fs(url)
        self.url, self.folder = url, folder
        self.sent: dict[str, tuple[int, int]] = {}

    @patient
    def pull(self) -> None:
        """Bring what lies at the URL here."""
        with told(self.url):
            names = self.names()
            if names:
                self.folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                self.files.get_file(f"{self.root}/{name}", str(self.folder / name))
        self.sent = self._state()

    @patient
    def push(self) -> None:
        """Send what changed since the last time; remove there what is gone here."""
        state = self._state()
        changed = [name for name, stamp in state.items() if self.sent.get(name) != stamp]
        with told(self.url):
            there = self.names()
            if not there:
                self.files.makedirs(self.root, exist_ok=True)
            if LAST in changed and LAST in there and PREVIOUS in state:
                self.files.mv(f"{self.root}/{LAST}", f"{self.root}/{PREVIOUS}")
                changed = [name for name in changed if name != PREVIOUS]
            for name in sorted(changed, key=lambda name: (name == LAST, name != DIGESTS, name)):
                self.files.put_file(str(self.folder / name), f"{self.root}/{name}")
            for name in set(there) - set(state):
                self.files.rm_file(f"{self.root}/{name}")
        self.sent = state

    @patient
    def remove(self) -> None:
        """Leave nothing at the URL."""
        with told(self.url):
            if self.files.exists(self.root):
                self.files.rm(self.root, recursive=True)

    def names(self) -> list[str]:
        """The files at the URL, as they are now; none where there is no such folder."""
        self.files.invalidate_cache(self.root)
        try:
            return [place.rstrip("/").rpartition("/")[2] for place in self.files.ls(self.root, detail=False)]
        except FileNotFoundError:
            return []

    def _state(self) -> dict[str, tuple[int, int]]:
        """What tells whether a file changed; what is still being written is left out."""
        files = [file for file in self.folder.glob("[!.]*") if file.is_file()]
        return {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in files}


def checked(url: str) -> None:
    """See that one can write at the URL.

    Raises:
        InputError: the protocol is unknown or lacks its package, or nothing can be written there.
    """
    try:
        with told(url), token(url) as name:
            if not seen(url, name):
                raise OSError("what was written there is not found again")
    except OSError as error:
        raise InputError(
            f"storage: {error}. Legal: a URL of fsspec's that may be written to, such as s3://bucket/folder, "
            "gs://bucket/folder, file:///mnt/shared."
        ) from error


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """Turn whatever goes wrong at the URL into an OSError that names it: each protocol has errors of its own.

    Raises:
        OSError: something went wrong.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f"{url!r} cannot be used ({reason})") from error


@contextlib.contextmanager
def token(url: str) -> Iterator[str]:
    """The name of a file that lies at the URL, or in the folder, while the block lasts."""
    files, root = fsspec.url_to_fs(url)
    name = f"token-{secrets.token_hex(8)}"
    files.makedirs(root, exist_ok=True)
    files.pipe_file(f"{root}/{name}", name.encode())
    try:
        yield name
    finally:
        files.rm_file(f"{root}/{name}")


def seen(url: str, name: str) -> bool:
    """Whether the token of that name can be read from this machine."""
    files, root = fsspec.url_to_fs(url)
    try:
        return bool(files.cat_file(f"{root}/{name}") == name.encode())
    except Exception:  # each protocol has errors of its own
        return False
