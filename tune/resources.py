"""Processors: what a trial takes, what there is, how many trials fit."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cifar_lab import cli, machine
from cifar_lab.recipe import InputError, at_least, check_fields

UNPACKED = "runtime_resources"  # the folder in which Ray unpacks the --working-dir of `ray job submit`


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
        storage: a URL of fsspec's (s3://bucket/folder, say) for the checkpoints of running trials, where the machines
            of a cluster share no disk; what is kept comes to results_dir in the end.
        hang_timeout: seconds without a training step, compiling included, after which a trial is taken for hung, killed
            and tried again.
    """

    max_concurrent: int | None = at_least(1, None, ", or unset")
    cpus_per_trial: int = at_least(1, 1)
    gpus_per_trial: float | None = at_least(0, None, ", or unset")
    name: str | None = None
    results_dir: str = "results/runs"
    address: str | None = None
    storage: str | None = None
    hang_timeout: float = at_least(1, 600.0, " seconds")

    def __post_init__(self) -> None:
        check_fields(self)
        cli.check_name(self.name)
        if "://" not in self.results_dir and UNPACKED in Path(self.results_dir).absolute().parts:
            raise InputError(
                f"results_dir: {self.results_dir!r} lies among the files that Ray unpacked for this job, and removes "
                "after it. Legal: an absolute path elsewhere."
            )


def here() -> list[dict[str, float]]:
    """This machine's CPU cores and GPUs, in Ray's names."""
    return [{"CPU": float(machine.cores()), "GPU": float(torch.cuda.device_count())}]


def per_trial(options: RunOptions, machines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What one trial takes: a GPU, where there is one and nothing was said.

    Raises:
        InputError: more than any machine has; Ray would wait for it without end.
    """
    most = {name: max(there.get(name, 0.0) for there in machines) for name in ("CPU", "GPU")}
    gpus = min(1.0, most["GPU"]) if options.gpus_per_trial is None else options.gpus_per_trial
    takes = {"CPU": float(options.cpus_per_trial), "GPU": gpus}
    cluster = f"the cluster at {options.address}"
    where = "this machine" if options.address is None else f"the largest machine of {cluster}"
    for name, flag in (("CPU", "cpus_per_trial"), ("GPU", "gpus_per_trial")):
        if takes[name] > most[name]:
            raise InputError(
                f"{flag}: {takes[name]:g}. Legal: up to {most[name]:g}; {where} has {most[name]:g} {name}s."
            )
    if gpus > 1 and gpus % 1:
        raise InputError(f"gpus_per_trial: {gpus:g}. Legal: a fraction of one GPU, or a whole number of them.")
    if not any(_fit(takes, there) for there in machines):
        raise InputError(
            f"cpus_per_trial: {takes['CPU']:g}. Legal: fewer; no machine of {cluster} has a GPU beside them."
        )
    return takes


def at_once(options: RunOptions, machines: Sequence[Mapping[str, float]]) -> int:
    """Trials that run at once."""
    takes = per_trial(options, machines)
    fit = sum(_fit(takes, there) for there in machines)
    return min(fit, options.max_concurrent or fit)


def _fit(takes: Mapping[str, float], there: Mapping[str, float]) -> int:
    """Trials that one machine holds."""
    fit = int(there.get("CPU", 0.0) // takes["CPU"])
    if share := takes["GPU"]:
        # Ray packs fractions of one GPU, but never splits a trial over two.
        gpus = there.get("GPU", 0.0)
        fit = min(fit, int(gpus // share) if share >= 1 else int(gpus) * int(1 / share + 1e-9))
    return fit


def advice(gpus: float, share: float) -> str:
    """What fraction of a GPU would have done for trials that took `gpus` of one each and held at most `share` of it.

    Empty where it was well chosen, or no GPU was used. A quarter is left as room to spare.
    """
    fitting = int(1 / (1.25 * share)) if share else 0
    if not 0 < gpus <= 1 or fitting <= int(1 / gpus + 1e-9):
        return ""
    fraction = math.floor(1e4 / fitting) / 1e4
    return (
        f"A trial held at most {share:.1%} of its GPU's memory: with --gpus_per_trial {fraction:g} up to {fitting} of "
        "them share a GPU."
    )


def check_address(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself would try for many minutes.

    Raises:
        InputError: no such address, Ray Client's, or no answer within five seconds.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    legal = "Legal: HOST:PORT of a running cluster, or auto."
    if address.startswith("ray://"):
        raise InputError(
            f"address: {address!r} is Ray Client's, through which a search cannot be steered. Run it on a machine of "
            f"the cluster, or as a job (ray job submit). {legal}"
        )
    if not host or not port.isdigit():
        raise InputError(f"address: {address!r}. {legal}")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"address: no Ray cluster answers at {address!r} ({error}). {legal}") from error
