"""ASHA search of one architecture, to the tested winner; python -m tune.asha."""

from __future__ import annotations

from collections.abc import Sequence

from cifar_lab import cli
from tune import resources
from tune.question import ask


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    question = ask(argv)
    if question.options.address is None:
        resources.per_trial(question.options, resources.here())
    else:
        resources.check_address(question.options.address)
    # Ray takes seconds to import: not before the question is known to be a legal one.
    from tune.search import Search

    search = Search(question)
    status = search.run()
    if question.json:
        print(cli.as_json(search.answer()))
    return status


if __name__ == "__main__":
    cli.run(main)
