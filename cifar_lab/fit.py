"""Fit a recipe: `fit`, the checkpoints it writes; a network from one."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, EarlyStopping
from pytorch_lightning.profilers import PassThroughProfiler

from cifar_lab import machine, progress
from cifar_lab.bars import StepBar
from cifar_lab.checkpoint import (
    CURVE_COLUMNS,
    CheckpointError,
    Record,
    Row,
    Run,
    difference,
    digests,
    finite,
    newest,
    read_checkpoint,
    recorded,
    refused,
)
from cifar_lab.classifier import ImageClassifier
from cifar_lab.data import CIFAR10DataModule
from cifar_lab.files import DIGESTS, LAST, PREVIOUS, sha256, write_json
from cifar_lab.prepare import begin
from cifar_lab.recipe import FREE, Recipe

# How often a network is compiled: for each shape of a batch, for training and validation, for what is frozen. Beyond
# that it would go uncompiled.
CODES = 32
UNPROFILED = nullcontext()
TRAINER_PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed"}


class Recorder(Checkpoint):
    """A row of metrics, the best and the last checkpoint after every epoch, then `on_epoch(row)`."""

    def __init__(self, run: Run, on_epoch: Callable[[Row], None] | None) -> None:
        self.run, self.on_epoch = run, on_epoch
        self.finished = False

    @property
    def state_key(self) -> str:
        return "Recorder"

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.run.history, "diverged": self.run.diverged, "finished": self.finished}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ImageClassifier)
        measured = {**pl_module.metrics, "lr": self.lr, "seconds": time.perf_counter() - self.start}
        row: Row = {"epoch": trainer.current_epoch + 1, **measured}
        validated = self.run.recipe.validated
        row = {name: row[name] for name in CURVE_COLUMNS if validated or not name.startswith("val_")}
        history = self.run.history
        history.append(row)
        self.run.diverged = not finite(row)
        if self.run.diverged:
            trainer.should_stop = True
        self.finished = trainer.should_stop or row["epoch"] >= self.run.recipe.max_epochs
        if self.run.best is row and not self.run.diverged:
            save_atomically(trainer, self.run.best_checkpoint, weights_only=True)
        save_atomically(trainer, self.run.folder / LAST, weights_only=False, keep=self.run.folder / PREVIOUS)
        if self.finished:
            (self.run.folder / PREVIOUS).unlink(missing_ok=True)
        if self.on_epoch is not None:
            self.on_epoch(row)


def save_atomically(trainer: pl.Trainer, path: Path, *, weights_only: bool, keep: Path | None = None) -> None:
    """Write a checkpoint aside, then rename it: at any moment the file at `path` is whole.

    Its digest is noted first, beside those of the files it replaces. The one before is kept at `keep`.
    """
    # A process of its own each: a killed search's worker may still be writing when a resumed one begins.
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        trainer.save_checkpoint(aside, weights_only=weights_only)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    note = path.with_name(DIGESTS)
    known = digests(path.parent)
    write_json(note, {**known, path.name: [sha256(aside), *known.get(path.name, [])][:3]})
    if keep is not None and path.exists():
        os.replace(path, keep)
    os.replace(aside, path)


def restore(path: Path) -> ImageClassifier:
    """The classifier that a checkpoint holds, in evaluation mode.

    Raises:
        CheckpointError: as `read_checkpoint`, or its weights are not those of its recipe.
    """
    content = read_checkpoint(path)
    try:
        model = ImageClassifier(**content["hyper_parameters"])
        model.load_state_dict(content["state_dict"])
    except Exception as error:
        raise refused(path, error) from error
    return model.eval()


def identity(model: ImageClassifier, checkpoint: Path) -> Record:
    """What answers when a checkpoint is used: its file, what it was trained as, and the versions that run it now."""
    return {
        "checkpoint": str(checkpoint),
        "sha256": sha256(checkpoint),
        "arch": model.recipe.arch,
        "dataset": model.recipe.dataset,
        "classes": list(model.classes),
        "recipe": model.recipe.to_dict(),
        "versions": machine.versions(),
    }


def quiet_lightning() -> None:
    """Silence what Lightning says of choices that are made here on purpose."""
    import logging

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for text in (
        r".*does not have many workers.*",
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*`?LeafSpec`? is deprecated.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*GPU available but not used.*",
        r".*`Trainer.fit` stopped.*",
        r".*module\(s\) in eval mode at the start of training.*",
    ):
        warnings.filterwarnings("ignore", message=text)


class _Unprofiled(PassThroughProfiler):
    """No profiler, at less cost a step than Lightning's own."""

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        return UNPROFILED


def trainer(recipe: Recipe, folder: Path, callbacks: list[Callback], **options: Any) -> pl.Trainer:
    """A Trainer on this process's device, in the recipe's precision, that writes nothing of its own."""
    quiet_lightning()
    machine.settle()
    return pl.Trainer(
        accelerator=machine.device().type,
        devices=1,
        precision=TRAINER_PRECISION[recipe.precision],
        callbacks=[*callbacks, StepBar()] if progress.shown() else callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        profiler=_Unprofiled(),
        default_root_dir=folder,
        **options,
    )


@contextmanager
def compiled(network: torch.nn.Module) -> Iterator[None]:
    """Have a network compiled where it lies, to be used until the end; its parameters keep their names.

    Each shape of a batch has code of its own: code for any, which PyTorch makes at the second, would change the numbers
    of the first, and a resumed training would not repeat them. What is drawn, by dropout, is drawn as it is uncompiled.
    """
    from torch._dynamo import config  # these take seconds to import
    from torch._inductor import config as code

    limits = config.patch(recompile_limit=CODES)  # type: ignore[no-untyped-call]
    with limits, code.patch(fallback_random=True, compile_threads=torch.get_num_threads()):
        network.compile(dynamic=False)
        try:
            yield
        finally:
            torch.compiler.reset()  # else the next training of this process would soon be over the limit


def fit(
    recipe: Recipe,
    folder: Path | str,
    *,
    resume: bool = False,
    on_epoch: Callable[[Row], None] | None = None,
    callbacks: Sequence[Callback] = (),
    data: CIFAR10DataModule | None = None,
) -> Run:
    """Train the recipe, leaving `best.ckpt` (weights) and `last.ckpt` (all that a resume needs) in `folder`.

    Until the end `previous.ckpt` is of the epoch before: a resume takes it where `last.ckpt` is damaged. `sha256.json`
    holds the digests of all.

    Args:
        recipe: what to train; its precision and memory format are measured first where they are "auto".
        folder: where the checkpoints go; made if absent.
        resume: go on after the epoch of `last.ckpt`, if there is one; on the CPU the rest is then bit-identical to an
            uninterrupted run. A run that had ended is returned as it is.
        on_epoch: called after each epoch's checkpoints are written, with the epoch's row: CURVE_COLUMNS. A resumed run
            first calls it with the checkpoint's own epoch, which whoever was interrupted may not have heard of.
        callbacks: observers of the training, called before the epoch's checkpoints are written.
        data: the recipe's images, where they are at hand already.

    A training whose train or validation loss is no longer a number ends with that epoch and is marked `diverged`.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another recipe.
        DataError: the images are absent or unreadable.
        KeyboardInterrupt: Ctrl-C; what was reached is kept.
    """
    folder = Path(folder)
    run = Run(recipe, folder)
    ckpt_path = None
    found = newest(folder) if resume else None
    if found is not None:
        last, saved = found
        was = Recipe(**saved["hyper_parameters"]["recipe"])
        asked = recipe.measured_as(was.to_dict())
        same = asked.replace(**{name: getattr(was, name) for name in FREE})
        if same != was:
            raise CheckpointError(f"{last} is of another recipe: {difference(was, same)}.")
        run.recipe = asked
        state = recorded(saved, last)
        run.history, run.diverged = list(state["history"]), state["diverged"]
        if on_epoch is not None:
            on_epoch(run.history[-1])
        if state["finished"]:
            return run
        ckpt_path = last
    else:
        run.recipe = machine.measured(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    data = data or CIFAR10DataModule(run.recipe)
    torch.manual_seed(recipe.seed)
    model = ImageClassifier(run.recipe.to_dict(), data.classes, data.mean.tolist(), data.std.tolist())
    if ckpt_path is None:
        begin(model.network, data)
    chosen = list(callbacks)
    if recipe.early_stop_patience is not None:
        chosen.append(EarlyStopping("val_acc", mode="max", patience=recipe.early_stop_patience))
    chosen.append(Recorder(run, on_epoch))
    made = trainer(
        run.recipe,
        folder,
        chosen,
        max_epochs=recipe.max_epochs,
        accumulate_grad_batches=recipe.accumulate,
        limit_val_batches=None if recipe.validated else 0,
        log_every_n_steps=10**9,
    )
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with compiled(model.network) if recipe.compile else nullcontext():
            made.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except SystemExit:  # what Lightning makes of Ctrl-C, of which it lets no second one through
        if not made.interrupted or threading.current_thread() is not threading.main_thread():
            raise
        signal.signal(signal.SIGINT, interrupt)
        raise KeyboardInterrupt from None
    finally:
        # A Trainer is held by its own parts: its network and the optimizer's state, on a GPU as well, would stay until
        # Python looks for such circles by itself, dozens of trainings later.
        data.trainer = None
        del made, model, chosen
        gc.collect()
        machine.return_memory()
    return run
