"""What a training's table of gradients tells.

gradients.csv is a CSV with a row an epoch and layer that was trained in it:

- `epoch`: from 1;
- `layer`: a parameter's name in the network (convolutions.0.weight), or a ReLU's (convolutions.1);
- `kind`: gradient or relu;
- `n`: gradient entries counted in the epoch, or channels of the ReLU;
- `zero`: fraction of them that were exactly zero, or that gave nothing: channels never above zero in the epoch;
- `rms`: root mean square of the gradient; empty for a ReLU, as are the bins;
- `b0` ... `b23`: how many |gradient| lay below 1e-10 (b0, zeros among them), in each half decade from there (b1 from
  1e-10, b2 from 1e-9.5, ..., b22 up to 10), and at 10 or above (b23, what is not a number among them).
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

EXPONENTS = tuple(half / 2 for half in range(-20, 3))  # of 10: the edges between the bins
BINS = tuple(f"b{i}" for i in range(len(EXPONENTS) + 1))
COLUMNS = ("epoch", "layer", "kind", "n", "zero", "rms", *BINS)
PARTLY = 0.1  # share of dead channels from which on a ReLU is reported
NAMED = 4  # parameters that a sentence names before it counts the rest


def verdicts(table: pd.DataFrame) -> list[str]:
    """What died in a training, in sentences, from a gradients.csv; the last epoch decides.

    A ReLU is reported when a tenth of its channels or more are dead, a parameter when its gradient is zero throughout.
    """
    if table.empty:
        return []
    relus = table[table.kind == "relu"]
    if relus.empty:
        said = ["The network has no ReLU module: none could die."]
    else:
        said = [sentence for _, own in relus.groupby(["layer", "n"], sort=False) if (sentence := dead_relu(own))]
    advice = ["A lower lr or leaky_relu may help."] if said and not relus.empty else []
    cut_off: dict[str, list[str]] = {}
    for name, own in table[table.kind == "gradient"].groupby("layer", sort=False):
        if when := all_zero(own):
            cut_off.setdefault(when, []).append(str(name))
    none = [f"No gradient reached {listed(names)} {when}." for when, names in cut_off.items()]
    return [*(said or ["No ReLU died."]), *none, *advice]


def dead_relu(own: pd.DataFrame) -> str | None:
    """A sentence on one ReLU's rows, where enough of its channels ended dead."""
    last = own.sort_values("epoch").to_dict("records")[-1]
    n, share = last["n"], last["zero"]
    if when := all_zero(own):
        return f"{last['layer']} (ReLU): all {n} channels gave nothing {when}: dead."
    if share >= PARTLY:
        dead = f"{round(share * n)} of {n} channels ({share:.0%})"
        return f"{last['layer']} (ReLU): {dead} gave nothing in the last epoch: dead."
    return None


def all_zero(own: pd.DataFrame) -> str | None:
    """Since when one layer's rows say zero throughout, in words; None if they do not in the last epoch."""
    last, other = own.epoch.max(), own.epoch[own.zero < 1]
    if other.empty:
        return "from the first epoch to the last"
    if other.max() == last:
        return None
    since = own.epoch[own.epoch > other.max()].min()
    return "in the last epoch" if since == last else f"from epoch {since} to the last"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence, the first NAMED of them if there are many."""
    if len(names) > NAMED + 1:
        return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
