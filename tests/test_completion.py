"""Completion: what a real shell offers after a <TAB>, and that it leaves python's other completions alone."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from cifar_lab.corruptions import CORRUPTIONS
from cifar_lab.evaluate import TTA
from cifar_lab.models import ARCHITECTURES, parameters
from tune.completion import SHELLS, commands, main, script
from tune.study import studies

# Calls the function that the shell has for python, as the shell does.
TAB = """
tab() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
    local function="$(complete -p "${1##*/}" | sed 's/.* -F \\([^ ]*\\) .*/\\1/')"
    "$function" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
    echo "${COMPREPLY[@]}"
}
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script of each shell."""
    folder = tmp_path_factory.mktemp("scripts")
    for shell in SHELLS:
        (folder / shell).write_text(script(shell))
    return folder


def bash(scripts: Path, commands: str, before: str = "") -> list[str]:
    """What commands print, as words, in a bash that has sourced the script, after what came `before`."""
    lines = f"{before}\nsource {scripts}/bash\n{TAB}\n{commands}"
    done = subprocess.run(["bash", "--norc", "-c", lines], capture_output=True, text=True, timeout=200)
    assert done.stderr == "" and done.returncode == 0
    return done.stdout.split()


def offered(scripts: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    return bash(scripts, f"tab {shlex.join(words)}")


def test_every_command_is_known_with_its_flags(scripts: Path) -> None:
    known = offered(scripts, "python", "-m", "")
    assert known == list(commands()) and {"cifar_lab.train", "cifar_lab.evaluate", "tune.asha", "tune.study"} <= {
        *known
    }
    for name in known:
        flags = offered(scripts, "python", "-m", name, "--")
        assert "--help" in flags and len(flags) == len(set(flags))
    assert {"--clear"} < set(offered(scripts, "python3", "-m", "cifar_lab.cache", "--"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_architectures_own_flags_follow_it(scripts: Path, arch: str) -> None:
    others = {f"--{name}" for other in ARCHITECTURES for name in parameters(other)}
    own = {f"--{name}" for name in parameters(arch)}
    for given in (["--arch", arch], ["--arch", "=", arch], ["--lr", "1", "--arch", arch, "--resume"]):
        flags = offered(scripts, "python", "-m", "tune.asha", *given, "--")
        assert set(flags) & others == own and {"--num_samples", "--lr", "--json"} <= set(flags)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("tune.asha --optimizer ''", "sgd adam adamw muon"),
        ("tune.asha --schedule co", "cosine"),
        ("cifar_lab.train --schedule = co", "cosine"),
        ("cifar_lab.train --dataset =", "cifar10 folder digits"),
        ("tune.kfold --augment ''", "true false"),
        ("tune.asha --arch res", "resnet"),
        ("tune.asha --depth ''", "18 34 50 101"),
        ("tune.asha --arch nf_resnet --depth ''", "18 34 50"),
        ("tune.asha --arch classic_cnn --depth ''", ""),
        ("tune.study --variant ''", "as_reported corrected"),
        ("tune.study 004-dynamic --num_bl", "--num_blocks"),
        ("tune.completion ''", "bash zsh"),
        ("cifar_lab.evaluate --tta ''", " ".join(TTA)),
        ("cifar_lab.evaluate best.ckpt --corruptions ''", " ".join(["all", *CORRUPTIONS])),
        ("cifar_lab.evaluate best.ckpt --corruptions fog --severity ''", "1 2 3 4 5"),
        ("cifar_lab.benchmark --archs ''", " ".join(ARCHITECTURES)),
        ("tune.asha --num_samples ''", ""),
    ],
)
def test_the_legal_values_are_offered(scripts: Path, words: str, values: str) -> None:
    assert offered(scripts, ".venv/bin/python", "-m", *shlex.split(words)) == values.split()


def test_the_studies_are_offered(scripts: Path) -> None:
    assert offered(scripts, "python", "-m", "tune.study", "") == list(studies())


def test_a_completion_of_pythons_own_stays(scripts: Path) -> None:
    own = "own() { COMPREPLY=(mine.py); }; complete -F own python"
    assert bash(scripts, "tab python m", own) == ["mine.py"]
    assert bash(scripts, "tab python -m json.tool --", own) == ["mine.py"]
    assert bash(scripts, f"source {scripts}/bash; tab python x.py -m", own) == ["mine.py"]
    assert bash(scripts, "tab python -m tune.asha --sched", own) == ["--schedule"]
    assert bash(scripts, "tab python -m tune.a", own) == ["mine.py", "tune.asha"]
    words = "complete -W 'words' python"
    assert " ".join(bash(scripts, "complete -p python", words)) == words


def test_completing_starts_no_process_of_python(scripts: Path) -> None:
    there = bash(scripts, "python() { echo started; }; python3() { echo started; }; tab python -m tune.asha --sched")
    assert there == ["--schedule"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_has_the_same(scripts: Path) -> None:
    lines = f"""
        autoload -U compinit; compinit -D; source {scripts}/zsh
        compadd() {{ shift; print -l -- $*; }}; compset() {{ PREFIX=${{PREFIX#*=}}; }}; _python() {{ print own; }}
        tab() {{ words=("$@") CURRENT=$# PREFIX="${{@[-1]}}"; $_comps[$1] }}
        tab python -m tune.asha --arch nf_resnet --depth ''
        tab python -m tune.asha --optimizer=ad
        tab python x.py
    """
    done = subprocess.run(["zsh", "-f", "-c", lines], capture_output=True, text=True, timeout=200)
    assert done.stderr == "" and done.stdout.split() == ["18", "34", "50", "sgd", "adam", "adamw", "muon", "own"]


def test_the_command_prints_the_script(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bash"]) == 0
    assert capsys.readouterr().out == (scripts / "bash").read_text()
