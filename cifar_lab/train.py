"""Train one recipe; python -m cifar_lab.train."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar_lab import cli
from cifar_lab.recipe import InputError, Recipe, check_fields

SWITCHES = {
    "resume": "go on after the last epoch of the training --name",
    "gradients": "keep histograms of the gradients, gradients.csv, and look for dead ReLUs",
    "quiet": "print nothing but errors and the last line",
    "json": "print nothing but errors and, at the end, JSON: best.json with the folder, the status, and the command "
    "that goes on, or null",
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Where the training goes; below are the recipe's fields.

    Args:
        name: the training's name, a folder in results_dir; unset: ARCH-DATASET-YYYYmmdd-HHMMSS.
        results_dir: where trainings lie.
    """

    name: str | None = None
    results_dir: str = "results/runs"

    def __post_init__(self) -> None:
        check_fields(self)
        cli.check_name(self.name)


def main(argv: Sequence[str]) -> int:
    """The command: train, leaving curves.csv, best.json, report.html and the checkpoints; returns the exit status."""
    given, own = cli.parse("python -m cifar_lab.train", __doc__ or "", argv, options=TrainOptions, switches=SWITCHES)
    on = cli.switched(SWITCHES, own)
    options, recipe = TrainOptions(**own), Recipe(**given)
    name = cli.settled_name(options.name, given, what="training", resume=on["resume"])
    folder = Path(options.results_dir) / name
    checkpoints = folder / "checkpoints"
    if on["resume"]:
        if not checkpoints.is_dir():
            raise InputError(f"name: there is no training {name!r} to resume in {options.results_dir}.")
    else:
        cli.check_new(folder)
    from cifar_lab import machine
    from cifar_lab.board import Board
    from cifar_lab.checkpoint import CURVE_COLUMNS, Row, best_record, newest, recorded
    from cifar_lab.files import write_csv, write_json
    from cifar_lab.prepare import prepare, shortage

    def ended(status: str, text: str, resume: str | None = None) -> None:
        """Print the end: the text, or JSON."""
        print(cli.as_json(cli.answer(folder, {status: 1}, resume)) if on["json"] else text)

    rows: list[Row] = []
    found = newest(checkpoints) if on["resume"] else None
    if found is not None:
        last, saved = found
        # What was not given again is as it was; the last row comes again, from fit.
        recipe = Recipe(**{**saved["hyper_parameters"]["recipe"], **given})
        state = recorded(saved, last)
        rows = list(state["history"][:-1])
        if state["finished"] and (folder / "best.json").exists():
            ended("completed", "This training is finished; nothing was changed.")
            return cli.DONE
    machine.check_compile([recipe])
    images = prepare(recipe)
    # Lightning and plots take seconds to import: not before the recipe is known to be legal, the images to be there.
    from cifar_lab.data import CIFAR10DataModule
    from cifar_lab.fit import fit
    from cifar_lab.gradients import GradientWatch
    from cifar_lab.report import headline, write_report

    cli.make_folder(checkpoints, options.results_dir)
    if found is None:
        recipe = machine.measured(recipe)
    words = [*argv, *([] if options.name else ["--name", name])]
    command = cli.command("cifar_lab.train", words)
    again = cli.resume_line(command)
    board = Board(folder / "tensorboard", recipe, name)
    if (note := shortage(recipe, len(images.train_indices))) and not on["quiet"]:
        print(cli.paragraph(note), flush=True)

    def on_epoch(row: Row) -> None:
        rows.append(row)
        write_csv(folder / "curves.csv", ("trial_id", *CURVE_COLUMNS), [{"trial_id": name, **row} for row in rows])
        board.add(row)
        if not on["quiet"]:
            reached = ""
            if recipe.validated:
                reached = f"val_acc {row['val_acc']:.4f}  best {max(r['val_acc'] for r in rows):.4f}  "
            print(
                f"epoch {row['epoch']:.0f}/{recipe.max_epochs}  train_loss {row['train_loss']:.4f}  "
                f"{reached}{row['seconds']:.1f} s",
                flush=True,
            )

    try:
        watches = [GradientWatch(folder / "gradients.csv")] if on["gradients"] else []
        data = CIFAR10DataModule(recipe, images.set)
        run = fit(recipe, checkpoints, resume=on["resume"], on_epoch=on_epoch, callbacks=watches, data=data)
    except KeyboardInterrupt:
        ended("pending", f"Interrupted; what was reached is kept. To go on:\n{again}", again)
        return cli.FAILED
    except OSError as error:
        print(cli.paragraph(f"error: {error}. What was reached is kept. To go on:"), file=sys.stderr)
        ended("pending", again, again)
        return cli.FAILED
    if run.diverged:
        row = run.history[-1]
        losses = ", ".join(f"{name} {row[name]:.4g}" for name in ("train_loss", "val_loss") if name in row)
        print(
            cli.paragraph(
                f"error: diverged in epoch {row['epoch']:.0f}: {losses}. A lower --lr may help; this was {recipe.lr:g}."
            ),
            file=sys.stderr,
        )
        if on["json"]:
            ended("diverged", "")
        return cli.FAILED
    best = best_record(run.recipe, run.best, run.best_checkpoint, folder, trial_id=name, command=command)
    write_json(folder / "best.json", best)
    write_report(folder)
    ended("completed", cli.paragraph(f"{headline(best)} Checkpoint: {os.path.relpath(run.best_checkpoint)}"))
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
