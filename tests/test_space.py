"""Search spaces: every architecture has one, and a trial's configuration depends on seed and index alone."""

from __future__ import annotations

import numpy as np
import pytest

from cifar_lab.models import ARCHITECTURES
from cifar_lab.recipe import RecipeError
from tune.space import SPACES, Choice, LogUniform, configuration, edges, space_for


def test_every_architecture_has_a_space() -> None:
    assert sorted(SPACES) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_is_a_legal_recipe(arch: str) -> None:
    base, search = space_for(arch, {})
    for i in range(200):
        base.replace(**configuration(search, 0, i))


def test_the_spaces_are_tables_2_and_3_with_the_seed_fixed() -> None:
    classic, resnet = SPACES["classic_cnn"].search, SPACES["resnet"].search
    assert classic["lr"] == LogUniform(1e-4, 1e-2)
    assert classic["weight_decay"] == LogUniform(1e-3, 1e-2)
    assert set(classic) == {"lr", "optimizer", "weight_decay", "dropout", "batch_norm", "init", "augment"}
    assert set(resnet) == {"lr", "optimizer", "weight_decay", "dropout", "augment", "depth"}
    assert resnet["depth"] == Choice(18, 34)


def test_a_field_given_is_fixed_and_changes_no_other_draw() -> None:
    _, free = space_for("classic_cnn", {})
    base, fixed = space_for("classic_cnn", {"lr": 0.003})
    assert base.lr == 0.003 and "lr" not in fixed
    for i in range(20):
        whole = configuration(free, 5, i)
        del whole["lr"]
        assert configuration(fixed, 5, i) == whole


def test_configurations_differ_by_seed_and_index_and_fill_the_range_evenly_in_the_logarithm() -> None:
    _, search = space_for("classic_cnn", {})
    drawn = [configuration(search, 0, i) for i in range(2000)]
    assert drawn[:30] != [configuration(search, 1, i) for i in range(30)]
    lr = np.log10([c["lr"] for c in drawn])
    assert lr.min() >= -4 and lr.max() <= -2
    assert abs(lr.mean() + 3) < 0.05 and abs((lr < -3).mean() - 0.5) < 0.05
    assert abs(np.mean([c["augment"] for c in drawn]) - 0.5) < 0.05


def test_a_given_field_the_architecture_does_not_have_is_refused() -> None:
    with pytest.raises(RecipeError, match="batch_norm: resnet has no such field"):
        space_for("resnet", {"batch_norm": True})


@pytest.mark.parametrize(
    ("value", "side"), [(1e-4, "lower"), (1.1e-4, "lower"), (1e-3, ""), (9.5e-3, "upper"), (1e-2, "upper")]
)
def test_the_edge_of_a_logarithmic_range_is_seen(value: float, side: str) -> None:
    assert LogUniform(1e-4, 1e-2).at_edge(value) == side


def test_the_edge_of_three_numbers_is_seen_but_a_switch_has_none() -> None:
    assert Choice(0.1, 0.3, 0.5).at_edge(0.5) == "upper"
    assert Choice(0.1, 0.3, 0.5).at_edge(0.3) == ""
    assert Choice(True, False).at_edge(True) == "" and Choice(18, 34).at_edge(34) == ""


def test_a_sentence_is_said_of_each_value_on_the_edge_of_what_was_searched() -> None:
    searched = {"lr": LogUniform(1e-4, 1e-2), "dropout": Choice(0.0, 0.1, 0.3), "augment": Choice(True, False)}
    assert edges(searched, {"lr": 1e-3, "dropout": 0.1, "augment": True, "depth": 34}) == []
    assert edges(searched, {"lr": 1e-2, "dropout": 0.0, "augment": True}) == [
        "lr 0.01 sits on the upper edge of its range (0.0001 .. 0.01 log-uniform): better values may lie beyond.",
        "dropout 0 sits on the lower edge of its range (0.0 | 0.1 | 0.3): better values may lie beyond.",
    ]
