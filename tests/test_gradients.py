"""The gradient watch: it counts what numpy counts, tells dead ReLUs in words, and changes no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import interrupted
from torch import nn

from cifar_lab import gradients, plots, report
from cifar_lab.checkpoint import read_checkpoint
from cifar_lab.files import read_csv
from cifar_lab.fit import fit
from cifar_lab.gradient_table import BINS, COLUMNS, EXPONENTS, verdicts
from cifar_lab.gradients import STEPS, GradientSums, GradientWatch, sampled
from cifar_lab.recipe import Recipe

EPOCHS = 3
ADVICE = "A lower lr or leaky_relu may help."


def recipe(**fields: Any) -> Recipe:
    small = {
        "arch": "three_layer_cnn", "channels1": 3, "channels2": 3, "kernel2": 3, "hidden": 6, "limit_train": 120,
        "optimizer": "adam", "lr": 1e-3, "batch_size": 20, "max_epochs": EPOCHS,
    }  # fmt: skip
    return Recipe(**{**small, "dataset": "digits", "precision": "32", "flip": "none", "rotate": 0.0, **fields})


def watched(asked: Recipe, folder: Path) -> pd.DataFrame:
    fit(asked, folder, callbacks=[GradientWatch(folder / "gradients.csv")])
    return pd.read_csv(folder / "gradients.csv")


# What is counted


def test_the_bins_are_numpys() -> None:
    rng = np.random.default_rng(0)
    edges = np.array([10**exponent for exponent in EXPONENTS], dtype=np.float32)
    spread = rng.choice([-1, 1], (30, 7)) * 10 ** rng.uniform(-13, 3, (30, 7))
    parts = [spread, np.zeros((4, 7)), edges[:21].reshape(3, 7)]
    sums = GradientSums(torch.device("cpu"))
    for part in parts:
        sums.add(torch.from_numpy(part.astype(np.float32)), torch.from_numpy(edges))
    entries = np.abs(np.concatenate(parts).astype(np.float32)).ravel()
    row = sums.row()
    expected = np.histogram(entries, [-np.inf, *edges, np.inf])[0]
    assert [row[name] for name in BINS] == expected.tolist() and expected[0] > 28 and expected[-1] > 0
    assert row["n"] == entries.size == sum(row[name] for name in BINS)
    assert row["zero"] == 28 / entries.size
    assert row["rms"] == pytest.approx(np.sqrt(np.mean(entries.astype(float) ** 2)))


@pytest.mark.parametrize("steps", [1, 3, STEPS, STEPS + 1, 2 * STEPS, 391])
def test_steps_are_sampled_evenly(steps: int) -> None:
    chosen = [step for step in range(steps) if sampled(step, steps)]
    assert len(chosen) == min(steps, STEPS) and chosen[0] == 0
    assert np.ptp(np.diff([*chosen, steps])) <= 1


def test_the_rows_are_of_the_gradients_that_were_stepped_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {}

    class Steps(GradientWatch):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            if self.looks and trainer.current_epoch == 1:
                for name, parameter in pl_module.network.named_parameters():
                    seen.setdefault(name, []).append(parameter.grad.clone())

    monkeypatch.setattr(gradients, "STEPS", 4)
    asked = recipe(max_epochs=2)
    fit(asked, tmp_path, callbacks=[Steps(tmp_path / "gradients.csv")])
    table = pd.read_csv(tmp_path / "gradients.csv")
    assert tuple(table.columns) == COLUMNS
    rows = table[(table.epoch == 2) & (table.kind == "gradient")].set_index("layer")
    assert list(rows.index) == list(seen) and {len(parts) for parts in seen.values()} == {4}
    for name, parts in seen.items():
        entries = torch.stack(parts).double()
        assert rows.n[name] == entries.numel() == rows.loc[name, list(BINS)].sum()
        assert rows.zero[name] == pytest.approx(float((entries == 0).double().mean()))
        assert rows.rms[name] == pytest.approx(float(entries.square().mean().sqrt()))


def test_a_channel_is_alive_when_it_was_above_zero_once(tmp_path: Path) -> None:
    watch = GradientWatch(tmp_path / "gradients.csv")
    watch.alive = {}
    layer = nn.ReLU()
    layer.register_forward_hook(watch._watch("act"))
    images = torch.full((2, 3, 4, 4), -1.0)
    images[1, 0, 2, 3] = 1

    def step(x: torch.Tensor) -> None:
        watch.uses.clear()
        layer(x)

    step(images)
    step(-torch.ones(2, 3, 4, 4))
    assert watch.alive["act", 3].tolist() == [True, False, False]
    step(torch.tensor([[-1.0, 2.0], [-1.0, -2.0]]))
    assert watch.alive["act", 2].tolist() == [False, True]
    step(torch.full((1, 2), torch.nan))
    assert watch.alive["act", 2].tolist() == [True, True], "what is not a number is something else than dead"


# What it leaves alone


@pytest.mark.parametrize(
    "fields",
    [{}, {"dropout": 0.5, "mixup": 1.0}, {"batch_norm": True, "ema": 0.9}],
    ids=["plain", "random", "averaged"],
)
def test_the_watch_changes_nothing_of_the_training(fields: dict[str, Any], tmp_path: Path) -> None:
    asked = recipe(max_epochs=2, **fields)
    runs = [
        fit(asked, tmp_path / "alone"),
        fit(asked, tmp_path / "watched", callbacks=[GradientWatch(tmp_path / "watched" / "gradients.csv")]),
    ]
    one, other = ([{k: v for k, v in row.items() if k != "seconds"} for row in run.history] for run in runs)
    assert one == other
    for name in ("last.ckpt", "best.ckpt"):
        alone, seen = (read_checkpoint(run.folder / name)["state_dict"] for run in runs)
        assert alone.keys() == seen.keys() and all(torch.equal(alone[key], seen[key]) for key in alone)


def test_no_hook_is_left(tmp_path: Path) -> None:
    networks: list[nn.Module] = []

    class Kept(GradientWatch):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            networks[:] = [pl_module.network]
            if trainer.current_epoch == 1:
                assert self.hooks
                raise RuntimeError("in the midst of a step")

    def hooks() -> int:
        return sum(len(layer._forward_hooks) for layer in networks[0].modules())

    fit(recipe(max_epochs=1), tmp_path / "whole", callbacks=[Kept(tmp_path / "gradients.csv")])
    assert hooks() == 0
    with pytest.raises(RuntimeError, match="in the midst"):
        fit(recipe(max_epochs=2), tmp_path / "broken", callbacks=[Kept(tmp_path / "gradients.csv")])
    assert hooks() == 0


def test_a_resumed_training_goes_on_with_the_table(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole" / "gradients.csv", tmp_path / "parts" / "gradients.csv"
    fit(recipe(), whole.parent, callbacks=[GradientWatch(whole)])
    interrupted(recipe(), parts.parent, 2, callbacks=[GradientWatch(parts)])
    before = parts.read_text()
    # An epoch that was written down, but whose checkpoint was not.
    parts.write_text(before + "".join(f"3,stale,relu,1,0.0,{',' * len(BINS)}\n" for _ in range(2)))
    fit(recipe(), parts.parent, resume=True, callbacks=[GradientWatch(parts)])
    assert parts.read_text() == whole.read_text()
    assert whole.read_text().startswith(before)
    fit(recipe(max_epochs=1), parts.parent, callbacks=[GradientWatch(parts)])
    assert {row["epoch"] for row in read_csv(parts)} == {"1"}, "a fresh training begins anew"


# Dead or alive


def test_a_dead_relu_is_detected(tmp_path: Path) -> None:
    table = watched(recipe(lr=1.0, max_epochs=4), tmp_path)
    said = verdicts(table)
    assert any("(ReLU): all" in text and text.endswith("dead.") for text in said), said
    assert any(text.startswith("No gradient reached convolutions.0.weight") for text in said), said
    assert said[-1] == ADVICE


def test_a_healthy_training_is_called_so(tmp_path: Path) -> None:
    assert verdicts(watched(recipe(batch_norm=True, hidden=128, lr=1e-4), tmp_path)) == ["No ReLU died."]


@pytest.mark.parametrize("activation", ["leaky_relu", "elu", "gelu"])
def test_what_cannot_die_is_not_watched(activation: str, tmp_path: Path) -> None:
    table = watched(recipe(activation=activation, max_epochs=1), tmp_path)
    assert set(table.kind) == {"gradient"}
    assert verdicts(table) == ["The network has no ReLU module: none could die."]


def test_the_relus_of_a_network_without_normalisation_are_watched(tmp_path: Path) -> None:
    asked = Recipe(arch="nf_resnet", width=2, dataset="digits", limit_train=60, max_epochs=1, precision="32")
    table = watched(asked, tmp_path)
    assert set(table.layer[table.kind == "relu"]) >= {"stages.0.activation", "activation"}


def test_a_relu_that_serves_two_layers_is_watched_in_each(tmp_path: Path) -> None:
    watch, shared = GradientWatch(tmp_path / "gradients.csv"), nn.ReLU()
    watch.alive = {}
    shared.register_forward_hook(watch._watch("relu"))
    for _ in range(2):  # batches
        watch.uses.clear()
        shared(torch.tensor([[-1.0, -1.0, 1.0]]))
        shared(torch.tensor([[1.0, -1.0, 1.0]]))
    alive = {layer: channels.tolist() for (layer, _), channels in watch.alive.items()}
    assert alive == {"relu": [False, False, True], "relu (2)": [True, False, True]}


def rows(layer: str, zeros: list[float], kind: str = "relu", n: int = 32) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for i, zero in enumerate(zeros):
        made.append({"epoch": i + 1, "layer": layer, "kind": kind, "n": n, "zero": zero})
        if kind == "gradient":
            none = round(zero * n)
            made[-1] |= {"rms": 0.1, **dict.fromkeys(BINS, 0), "b0": none, "b16": n - none}
    return made


def table_of(*parts: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame([row for part in parts for row in part], columns=list(COLUMNS))


@pytest.mark.parametrize(
    ("zeros", "expected"),
    [
        ([0, 0.5, 1, 1, 1], ["a.1 (ReLU): all 32 channels gave nothing from epoch 3 to the last: dead.", ADVICE]),
        ([1, 1, 0, 1, 1], ["a.1 (ReLU): all 32 channels gave nothing from epoch 4 to the last: dead.", ADVICE]),
        ([1, 1], ["a.1 (ReLU): all 32 channels gave nothing from the first epoch to the last: dead.", ADVICE]),
        ([0, 0, 1], ["a.1 (ReLU): all 32 channels gave nothing in the last epoch: dead.", ADVICE]),
        ([1, 0.125], ["a.1 (ReLU): 4 of 32 channels (12%) gave nothing in the last epoch: dead.", ADVICE]),
        ([0, 0.0625], ["No ReLU died."]),
        ([0, 1, 0.5, 0], ["No ReLU died."]),
    ],
    ids=["dead", "revived, dead again", "never alive", "at last", "partly", "hardly", "revived"],
)
def test_the_verdict_on_a_relu(zeros: list[float], expected: list[str]) -> None:
    assert verdicts(table_of(rows("a.1", zeros))) == expected


def test_the_verdict_on_gradients() -> None:
    cut_off = [rows(f"a.{i}.weight", [0, 1, 1], "gradient") for i in range(7)]
    table = table_of(*cut_off, rows("b.weight", [0.5, 1, 0.5], "gradient"), rows("b.bias", [0, 0, 1], "gradient"))
    table = pd.concat([table, table_of(rows("a.act", [0, 0, 0]))])
    assert verdicts(table) == [
        "No ReLU died.",
        "No gradient reached a.0.weight, a.1.weight, a.2.weight, a.3.weight and 3 more from epoch 2 to the last.",
        "No gradient reached b.bias in the last epoch.",
    ]


def test_dead_relus_come_before_what_they_cut_off() -> None:
    table = table_of(rows("a.weight", [1], "gradient"), rows("a.bias", [1], "gradient"), rows("act", [1.0], n=4))
    assert verdicts(table) == [
        "act (ReLU): all 4 channels gave nothing from the first epoch to the last: dead.",
        "No gradient reached a.weight and a.bias from the first epoch to the last.",
        ADVICE,
    ]


def test_of_an_empty_table_nothing_is_said() -> None:
    assert verdicts(table_of()) == []


# What is shown


def layers(count: int) -> list[list[dict[str, Any]]]:
    """Convolutions without and with bias, each followed by a norm, in turn."""
    parts = []
    for i in range(count):
        parts.append(rows(f"{i}.conv.weight", [0, 0.5], "gradient", 288))
        parts.append(rows(f"{i}.conv.bias", [0, 0.5], "gradient", 32))
        parts += [rows(f"{i}.norm.{what}", [0, 0.5], "gradient", 32) for what in ("weight", "bias")]
    return parts


@pytest.mark.parametrize(
    ("count", "shown", "words"),
    [
        (1, 4, ""),
        (6, 24, ""),
        (12, 24, "24 of 48 parameters; left out: the norms"),
        (13, 13, "13 of 52 parameters; left out: the norms, the biases"),
        (40, 24, "24 of 160 parameters; left out: the norms, the biases, 16 spread evenly"),
    ],
)
def test_a_figure_has_room_for_so_many_parameters(count: int, shown: int, words: str) -> None:
    table = table_of(*layers(count))
    names, choice = plots.shown_parameters(table)
    assert (len(names), choice) == (shown, words)
    figure = plots.gradients(table)
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == sorted(
        names, key=lambda name: (name.endswith("bias"), names.index(name))
    )


def test_the_figure_bears_a_single_epoch_and_only_zeros() -> None:
    for zeros in ([1.0], [0.0], [1.0, 1.0]):
        assert plots.gradients(table_of(rows("a.weight", zeros, "gradient"))).axes


def test_the_report_shows_the_gradients(tmp_path: Path) -> None:
    table = table_of(rows("a.weight", [0, 1], "gradient"), rows("a.1", [0, 1]))
    table.to_csv(tmp_path / "gradients.csv", index=False)
    title, body = report.gradient_section(tmp_path, "Gradients")
    assert title == "Gradients" and "data:image/png;base64," in body
    assert "all 32 channels gave nothing in the last epoch: dead. No gradient reached a.weight" in body
    assert (tmp_path / "figures" / "gradients.png").stat().st_size > 1000
