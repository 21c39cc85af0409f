"""Processors: what a trial takes, what there is, how many trials fit."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import torch

from cifar_lab import cli, machine
from cifar_lab.recipe import InputError, at_least, check_fields


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where many trainings run, on what.

    Args:
        max_concurrent: trials at once; unset: as many as the processors hold.
        cpus_per_trial: CPU cores a trial.
        gpus_per_trial: GPUs a trial, fractions allowed; unset: 1 where there is one, else 0.
        name: a folder in results_dir; unset: ARCH-DATASET-YYYYmmdd-HHMMSS.
        results_dir: where searches lie.
        address: a running Ray cluster to join; unset: this machine alone.
        hang_timeout: seconds without a training step after which a trial is taken for hung, killed and tried again.
    """

    max_concurrent: int | None = at_least(1, None, ", or unset")
    cpus_per_trial: int = at_least(1, 1)
    gpus_per_trial: float | None = at_least(0, None, ", or unset")
    name: str | None = None
    results_dir: str = "results/runs"
    address: str | None = None
    hang_timeout: float = at_least(1, 600.0, " seconds")

    def __post_init__(self) -> None:
        check_fields(self)
        cli.check_name(self.name)


def here() -> dict[str, float]:
    """This machine's CPU cores and GPUs, in Ray's names."""
    return {"CPU": float(machine.cores()), "GPU": float(torch.cuda.device_count())}


def per_trial(options: RunOptions, there: dict[str, float]) -> dict[str, float]:
    """What one trial takes: a GPU, where there is one and nothing was said.

    Raises:
        InputError: more than there is; Ray would wait for it without end.
    """
    gpus = min(1.0, there.get("GPU", 0.0)) if options.gpus_per_trial is None else options.gpus_per_trial
    takes = {"CPU": float(options.cpus_per_trial), "GPU": gpus}
    for name, flag in (("CPU", "cpus_per_trial"), ("GPU", "gpus_per_trial")):
        has = there.get(name, 0.0)
        if takes[name] > has:
            where = "this machine" if options.address is None else f"the cluster at {options.address}"
            raise InputError(f"{flag}: {takes[name]:g}. Legal: up to {has:g}; {where} has {has:g} {name}s.")
    if gpus > 1 and gpus % 1:
        raise InputError(f"gpus_per_trial: {gpus:g}. Legal: a fraction of one GPU, or a whole number of them.")
    return takes


def at_once(options: RunOptions, there: dict[str, float]) -> int:
    """Trials that run at once."""
    takes = per_trial(options, there)
    fit = int(there["CPU"] // takes["CPU"])
    if share := takes["GPU"]:
        # Ray packs fractions of one GPU, but never splits a trial over two.
        fit = min(fit, int(there["GPU"] // share) if share >= 1 else int(there["GPU"]) * int(1 / share + 1e-9))
    return max(1, min(fit, options.max_concurrent or fit))


def check_address(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself would try for many minutes.

    Raises:
        InputError: no such address, or no answer within five seconds.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    legal = "Legal: HOST:PORT of a running cluster, or auto."
    if not host or not port.isdigit():
        raise InputError(f"address: {address!r}. {legal}")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"address: no Ray cluster answers at {address!r} ({error}). {legal}") from error
