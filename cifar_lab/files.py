"""Files that a run leaves: written atomically, hashed."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Beside best.ckpt, in a folder of checkpoints: of the last epoch, of the one before, and the digests of all.
LAST, PREVIOUS, DIGESTS = "last.ckpt", "previous.ckpt", "sha256.json"
HUNG = "hung"  # a note beside the checkpoints of a training that was killed since it made no step


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a text, or bytes, aside, then rename it."""
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def unwritable(error: BaseException | None) -> bool:
    """Whether an error is one that everybody meets who writes there: a disk or a quota is full, or turned read-only."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, indented, atomically."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file that `write_json` wrote."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, atomically; floats in full, None as an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as texts; none if it is absent."""
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def read_table(path: Path, *texts: str) -> pd.DataFrame:
    """A CSV file that `write_csv` wrote as a table; the columns in `texts` hold what is written there, word for word.

    pandas alone takes the names None, NA, null and nan for missing values, and 007 for a number.

    Raises:
        FileNotFoundError: it is absent.
    """
    import pandas as pd

    # An empty cell is a missing value everywhere, nan in columns of numbers, where a diverged training leaves it.
    missing = {str(name): [""] if name in texts else ["", "nan"] for name in pd.read_csv(path, nrows=0)}
    return pd.read_csv(path, dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=missing)


def size(count: float) -> str:
    """Bytes in units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def sha256(path: Path) -> str:
    """The hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where decoded images and downloads are kept: `$XDG_CACHE_HOME/cifar_lab`, else `~/.cache/cifar_lab`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cifar_lab"
