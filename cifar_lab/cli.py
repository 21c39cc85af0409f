"""Command lines: flags become a Recipe, errors a paragraph with an exit status."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from cifar_lab import progress
from cifar_lab.files import read_json
from cifar_lab.recipe import InputError, nearest, recipe_class

Given = dict[str, Any]
DONE, FAILED, REFUSED = 0, 1, 2


class Parser(ArgumentParser):
    """A jsonargparse parser whose errors quote the value, the legal ones and the nearest flag."""

    options: tuple[type, ...] = ()
    switches: tuple[str, ...] = ()
    offers: Mapping[str, Iterable[Any]] = {}  # legal values by flag, for a shell to complete, checked after parsing

    def parse_args(self, *args: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """Parse as jsonargparse does; --quiet and --json hold for the bars too."""
        parsed = super().parse_args(*args, **options)
        progress.quiet = bool(parsed.get("quiet") or parsed.get("json"))
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        """Turn jsonargparse's message into an InputError."""
        raise InputError(self._explained(str(message)))

    def _explained(self, message: str) -> str:
        flags = [name for name in self._option_string_actions if name.startswith("--")]
        if found := re.match(r"[Uu]nrecognized arguments: (\S+)", message):
            typed = found[1].partition("=")[0]
            return f"{typed}: there is no such flag{nearest(typed, flags)} --help lists them all."
        if found := re.search(r"Option '(\S+)' is not accepted", message):
            known = [flag.removeprefix("--") for flag in flags]
            return f"{found[1]}: there is no such field in a YAML file{nearest(found[1], known)}"
        key = re.search(r'Parser key "(\w+)"', message)
        value = re.search(r"(?:Got|Given) value: (.*)", message)
        if key and value:
            for record in self.options:
                if key[1] in {f.name for f in fields(record)}:
                    try:
                        record(**{key[1]: value[1]})
                    except InputError as error:
                        return flagged(error)
                    return f"--{key[1]}: {value[1]} must be a text; in a YAML file write it in quotes."
        return " ".join(message.split())


def flagged(error: InputError) -> str:
    """The error's text; a field's name at its start is written as the flag it is."""
    return re.sub(r"^(?=[a-z_]+: )", "--", str(error))


def parse(
    prog: str,
    description: str,
    argv: Sequence[str],
    *,
    options: type | None = None,
    switches: dict[str, str] | None = None,
    lists: dict[str, str] | None = None,
    default_arch: str = "resnet",
) -> tuple[Given, Given]:
    """What was given for the recipe, and for the command's own options and switches; nothing that was left out.

    Args:
        prog: the command, as one types it.
        description: what it does, for --help.
        argv: the words after it.
        options: a dataclass of further options, checked by its own making.
        switches: flags without a value and their help.
        lists: flags with one value or more and their help.
        default_arch: whose fields are offered when no --arch is given.

    Raises:
        InputError: an unknown flag, or a value of the wrong type.
    """
    recipe = recipe_class(_arch_of(argv, default_arch))
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.options = (recipe,) if options is None else (recipe, options)
    parser.add_argument("--config", action="config", help="a YAML file of fields; flags after it win")
    if options is not None:
        parser.add_class_arguments(options, None)
    for name, text in (switches or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    for name, text in (lists or {}).items():
        parser.add_argument(f"--{name}", nargs="+", help=text)
    parser.add_class_arguments(recipe, None)
    parsed = vars(parser.parse_args(list(argv), defaults=False))
    recipe_fields = {f.name for f in fields(recipe)}
    given = {k: v for k, v in parsed.items() if k in recipe_fields}
    own = {k: v for k, v in parsed.items() if k not in recipe_fields and k != "config"}
    if options is not None:
        options(**{k: v for k, v in own.items() if k not in {**(switches or {}), **(lists or {})}})
    return given, own


def switched(switches: Iterable[str], own: Given) -> dict[str, bool]:
    """The switches, taken out of `own`, each on or off; --json is quiet too."""
    on = {name: bool(own.pop(name, False)) for name in switches}
    on["quiet"] |= on["json"]
    return on


def _arch_of(argv: Sequence[str], default: str) -> str:
    """The architecture that the words or their YAML files name: it decides which other flags exist."""
    chosen = default
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in ("--arch", "--config"):
            value = value if equals else argv[i + 1] if i + 1 < len(argv) else ""
            chosen = value if flag == "--arch" else _arch_in(value) or chosen
    return chosen


def _arch_in(path: str) -> str | None:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(
            f"--config: {path!r} cannot be read ({error.strerror}). Legal: a YAML file of fields."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config: {path!r} is no YAML file ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise InputError(f"--config: {path!r} holds {type(content).__name__}, not fields and values.")
    arch = content.get("arch")
    return None if arch is None else str(arch)


def check_name(name: str | None) -> None:
    """Refuse a name that is no folder's."""
    if name is not None and (name in ("", ".", "..") or Path(name).name != name or len(name.encode()) > 200):
        raise InputError(f"name: {name!r}. Legal: the name of a folder, without a slash, up to 200 characters.")


def check_new(folder: Path) -> None:
    """Refuse a folder that holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"name: {folder.name!r} exists in {folder.parent} already, and results are never overwritten. "
            "Go on with what lies there by --resume, or take another --name."
        )


def settled_name(name: str | None, given: Given, *, what: str, resume: bool) -> str:
    """The name given, or ARCH-DATASET-YYYYmmdd-HHMMSS for a new search or training, `what`."""
    if name is not None:
        return name
    if resume:
        raise InputError(f"--resume: say with --name which {what} to go on with.")
    return f"{given.get('arch', 'resnet')}-{given.get('dataset', 'cifar10')}-{time.strftime('%Y%m%d-%H%M%S')}"


def command(module: str, argv: Sequence[str], earlier: str = "") -> str:
    """The command line that asks the same again: the words of an `earlier` one, then what is new."""
    words = [word for word in argv if word != "--resume"]
    asked = shlex.split(earlier)[3:] if earlier else []
    if not set(words) <= set(asked):
        asked += words
    return shlex.join(["python", "-m", module, *asked])


def resume_line(asked: str) -> str:
    """What to type here to go on with the command: by this interpreter, where that is the project's own."""
    here = Path(sys.executable)
    own = os.path.relpath(here) if here.is_relative_to(Path.cwd()) else "python"
    return f"{own}{asked.removeprefix('python')} --resume"


def answer(folder: Path, status: Mapping[str, int], resume: str | None) -> dict[str, Any]:
    """What --json prints of a run: its best.json, if there is one, and how it stands.

    Args:
        folder: the run's.
        status: how many of its trials are completed, stopped, diverged, failed, pending.
        resume: the command that goes on with it; None where there is nothing to go on with.
    """
    best = folder / "best.json"
    found = read_json(best) if best.exists() else {}
    return {**found, "folder": str(folder.absolute()), "status": dict(status), "resume": resume}


def as_json(content: Any) -> str:
    """The text of JSON, as it is printed."""
    return json.dumps(content, indent=1)


def make_folder(folder: Path, given: str, flag: str = "results_dir") -> None:
    """Make a folder, given by a flag or below what that gave, and see that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise InputError(
            f"{flag}: {given!r} cannot be written ({error.strerror}). Legal: a folder you may write to."
        ) from error


@contextlib.contextmanager
def exit_status() -> Iterator[None]:
    """Exit 2 with one paragraph for an InputError, 1 for an interrupt; other errors stay errors."""
    try:
        yield
    except InputError as error:
        print(paragraph(f"error: {flagged(error)}"), file=sys.stderr)
        sys.exit(REFUSED)
    except KeyboardInterrupt:
        sys.exit(FAILED)


def paragraph(text: str) -> str:
    """The text, wrapped at the terminal's width."""
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run a command's `main` on this process's words and end with its status; SIGTERM is taken for Ctrl-C."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    # Python looks for circles of dead objects for a quarter of the time in which Lightning is imported.
    gc.set_threshold(100_000)
    try:
        with exit_status():
            status = main(sys.argv[1:])
            sys.stdout.flush()
        # As sys.exit, but for taking apart all that torch and Lightning consist of, which takes more than a second.
        atexit._run_exitfuncs()
        os._exit(status)
    except BrokenPipeError:  # whoever read the output, `head` perhaps, has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
