"""report.html: what a run found, on one page that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cifar_lab.evaluate import t_interval


def headline(best: dict[str, Any]) -> str:
    """The test accuracy with its interval, from best.json."""
    if "test_acc" not in best:
        return f"val_acc {best['val_acc']:.4f} at epoch {best['epoch']}, not tested."
    seeds = best["test_acc_seeds"]
    if len(seeds) < 2:
        return f"Test accuracy {best['test_acc']:.2%} ({best['test_low']:.2%} to {best['test_high']:.2%}, Wilson, n = {best['test_n']:,})."
    low, high = t_interval(seeds)
    return f"Test accuracy {sum(seeds) / len(seeds):.2%} ({low:.2%} to {high:.2%}, t, {len(seeds)} seeds, n = {best['test_n']:,})."


def write_report(folder: Path) -> None:
    pass
