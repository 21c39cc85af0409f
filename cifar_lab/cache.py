"""What is cached of images and measurements; python -m cifar_lab.cache [--clear]."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_lab import cli
from cifar_lab.files import cache_folder, size


def entries(folder: Path) -> list[tuple[Path, int]]:
    """What lies in the cache, with its bytes: decoded images, downloads, what was measured; locks left out."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(entry, _bytes(entry)) for entry in found if entry.suffix != ".lock"]


def _bytes(place: Path) -> int:
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def main(argv: Sequence[str]) -> int:
    """The command: list the cache, or remove all of it."""
    parser = cli.Parser(prog="python -m cifar_lab.cache", description=(__doc__ or ""), allow_abbrev=False)
    parser.add_argument("--clear", action="store_true", help="remove it; what is needed again is decoded again")
    clear = parser.parse_args(list(argv)).clear
    folder = cache_folder()
    known = entries(folder)
    for entry, count in known:
        print(f"{size(count):>8}  {entry.name}")
    total = size(sum(count for _, count in known))
    if not clear:
        print(f"{total} in {folder}; --clear removes it.")
        return cli.DONE
    try:
        for entry, _ in known:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    except OSError as error:
        print(cli.paragraph(f"error: {error}. A search that is running may hold it."), file=sys.stderr)
        return cli.FAILED
    print(f"{total} removed from {folder}.")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
