"""Completion of the commands in a shell; python -m tune.completion bash|zsh.

    python -m tune.completion bash > ~/.cifar_lab.bash && echo 'source ~/.cifar_lab.bash' >> ~/.bashrc

makes the shell complete `python -m tune.asha --sch<TAB>`: the commands, their flags, those of the architecture that
--arch names, and the legal values. For zsh the same with zsh, sourced after compinit. The script is static: no Python
runs at a <TAB>. It is to be made again where flags have changed.

The commands are modules of python, so it is python's completion that is replaced, by one that hands on all that is not
`-m` and one of ours: to the function that completed python before, else to file names. Scripts in the path,
`cifar-lab-asha` say, would need no such care; but then every command would have two names, here, in what is printed to
go on with, and in results.
"""

from __future__ import annotations

import argparse
import importlib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import capture_parser

import cifar_lab
from cifar_lab import cli, models
from cifar_lab.recipe import recipe_class
from tune.study import studies

SHELLS = ("bash", "zsh")

# What both shells understand. The words before the cursor, without those that are =, tell what may follow.
COMMON = """\
# Completion of cifar_lab's commands, made by: python -m tune.completion {shell}

_cifar_lab_flags() {{  # MODULE ARCH
    case "$1" in
{flags}
    esac
    case "$1:$2" in
{own_flags}
    esac
}}

_cifar_lab_values() {{  # MODULE:ARCH:WORD, the word before
    case "$1" in
{values}
    esac
}}

_cifar_lab_offers() {{  # CURRENT WORD...; status 1 where the command is none of ours
    local current="$1" module="" arch=resnet before="" word=""
    shift
    for word in "$@"; do
        case "$word" in
        =) continue ;;
        --arch=*) arch="${{word#*=}}" ;;
        esac
        case "$before" in
        --arch) arch="$word" ;;
        -m) [ -n "$module" ] || module="$word" ;;
        tune.study)
            case "$word" in
{studies}
            esac ;;
        esac
        before="$word"
    done
    if [ "$before" = -m ] && [ -z "$module" ]; then
        echo "{modules}"
        return 0
    fi
    case " {modules} " in
    *" $module "*) ;;
    *) return 1 ;;
    esac
    case "$current:$before" in
    -*) _cifar_lab_flags "$module" "$arch" ;;
    {without}) _cifar_lab_flags "$module" "$arch" ;;
    *) _cifar_lab_values "$module:$arch:$before" ;;
    esac
}}
"""

BASH = """
_cifar_lab_python() {
    local current="${COMP_WORDS[COMP_CWORD]}" offers="" ours=""
    [ "$current" != = ] || current=""
    COMPREPLY=()
    offers="$(_cifar_lab_offers "$current" "${COMP_WORDS[@]:0:COMP_CWORD}")" && ours=yes
    if [ -n "$_cifar_lab_before" ] && { [ -z "$ours" ] || [ "${COMP_WORDS[COMP_CWORD-1]}" = -m ]; }; then
        "$_cifar_lab_before" "$@"
    fi
    COMPREPLY+=($(compgen -W "$offers" -- "$current"))
}

_cifar_lab_register() {
    local name spec
    for name in python python3; do
        # bash-completion has one, which it loads when it is first asked for.
        if ! complete -p "$name" >/dev/null 2>&1; then
            if declare -F _comp_load >/dev/null; then _comp_load "$name"
            elif declare -F _completion_loader >/dev/null; then _completion_loader "$name"
            fi
        fi >/dev/null 2>&1
        spec="$(complete -p "$name" 2>/dev/null)"
        case "$spec" in
        *" -F _cifar_lab_python "*) ;;
        *" -F "*) spec="${spec#* -F }"; _cifar_lab_before="${spec%% *}" ;;
        ?*) continue ;;
        esac
        complete -o bashdefault -o default -F _cifar_lab_python "$name"
    done
}

_cifar_lab_register
"""

ZSH = """
_cifar_lab_python() {
    local offers
    local -a before
    before=("${(@)words[1,CURRENT-1]}")
    if [[ $PREFIX == --*=* ]]; then
        before+=("${PREFIX%%=*}")
        compset -P '*='
    fi
    if offers="$(_cifar_lab_offers "$PREFIX" "${(@)before}")"; then
        [[ $before[-1] != -m || -z $_cifar_lab_before ]] || $_cifar_lab_before "$@"
        if [[ -n $offers ]]; then compadd -- ${=offers}; else _files; fi
    elif [[ -n $_cifar_lab_before ]]; then
        $_cifar_lab_before "$@"
    else
        _files
    fi
}

# zsh knows its own by a pattern of names, not by the name.
(( $+functions[_python] )) && typeset -g _cifar_lab_before=_python
case "${_comps[python]:-_cifar_lab_python}" in
_cifar_lab_python) ;;
*) typeset -g _cifar_lab_before="${_comps[python]}" ;;
esac
compdef _cifar_lab_python python python3
"""


def commands() -> dict[str, cli.Parser]:
    """The parser of each module that is a command, by the module's name."""
    found = {}
    for package in (Path(cifar_lab.__file__).parent, Path(__file__).parent):
        for file in sorted(package.glob("*.py")):
            if "    cli.run(main)\n" in file.read_text():
                name = f"{package.name}.{file.stem}"
                found[name] = capture_parser(importlib.import_module(name).main, ["--help"])
    return typing.cast("dict[str, cli.Parser]", found)


def legal(hint: Any) -> list[str]:
    """The values that a type allows, as they are typed; none where they cannot be listed."""
    found = []
    for kind in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        if typing.get_origin(kind) is typing.Literal:
            found += [str(value) for value in typing.get_args(kind)]
        elif kind is bool:
            found += ["true", "false"]
    return found


def values_of(record: type) -> dict[str, list[str]]:
    """The legal values of a dataclass's fields, by their flags."""
    hints = typing.get_type_hints(record)
    return {f"--{f.name}": legal(hints[f.name]) for f in fields(record)}


def case(patterns: Iterable[str], words: Iterable[str], indent: int) -> str:
    """A branch of a shell's case: what is printed where one of the patterns matches."""
    return f'{" " * indent}{"|".join(patterns)}) echo "{" ".join(words)}" ;;'


def script(shell: str) -> str:
    """The script for a shell, one of SHELLS."""
    parsers = commands()
    flags: dict[str, list[str]] = {}
    values: dict[tuple[str, ...], list[str]] = {}  # patterns, by the words that they offer
    without = []  # the commands that take flags only

    def offer(words: Iterable[str], pattern: str) -> None:
        if words := tuple(words):
            values.setdefault(words, []).append(pattern)

    own = {arch: [f"--{name}" for name in models.parameters(arch)] for arch in models.ARCHITECTURES}
    trainers = [name for name, parser in parsers.items() if "--arch" in parser._option_string_actions]
    for name, parser in parsers.items():
        shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
        known = [flag for action in shown for flag in action.option_strings if flag.startswith("--")]
        flags[name] = [flag for flag in known if name not in trainers or flag not in own["resnet"]]
        listed = {flag: choices for record in parser.options for flag, choices in values_of(record).items()}
        for flag in flags[name]:
            choices = listed.get(flag) or parser.offers.get(flag) or parser._option_string_actions[flag].choices or ()
            offer(map(str, choices), f"{name}:*:{flag}")
        positional = [action for action in shown if not action.option_strings]
        for action in positional:
            offer(action.choices or (), f"{name}:*:{name}")
        if not positional and name != "tune.study":
            without.append(name)
    for name in trainers:
        offer(models.ARCHITECTURES, f"{name}:*:--arch")
    for arch in models.ARCHITECTURES:
        for flag, choices in values_of(recipe_class(arch)).items():
            if flag in own[arch]:
                offer(choices, f"*:{arch}:{flag}")
    offer(studies(), "tune.study:*:tune.study")
    offer(sorted({variant for variants in studies().values() for variant in variants}), "tune.study:*:--variant")
    archs: dict[str, list[str]] = {}
    for study, variants in studies().items():
        archs.setdefault(next(iter(variants.values())).arch, []).append(study)
    return COMMON.format(
        shell=shell,
        modules=" ".join(parsers),
        without="|".join(f":{name}" for name in without),
        flags="\n".join(case([name], words, 4) for name, words in flags.items()),
        own_flags="\n".join(case([f"{name}:{arch}" for name in trainers], own[arch], 4) for arch in own if own[arch]),
        values="\n".join(case(patterns, words, 4) for words, patterns in values.items()),
        studies="\n".join(f"            {'|'.join(names)}) arch={arch} ;;" for arch, names in archs.items()),
    ) + (BASH if shell == "bash" else ZSH)


def main(argv: Sequence[str]) -> int:
    """The command: print the script."""
    parser = cli.Parser(
        prog="python -m tune.completion", description="Print a script that completes the commands.", allow_abbrev=False
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to source it")
    print(script(parser.parse_args(list(argv)).shell), end="")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
