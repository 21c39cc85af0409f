"""Recipe: refuses what is impossible, survives every round trip, and each of its fields moves something."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_lab import cli, models
from cifar_lab.recipe import InputError, Recipe, RecipeError, recipe_class

ROOT = Path(__file__).parents[1]
HINTS = typing.get_type_hints(Recipe)
LITERALS = [name for name, hint in HINTS.items() if typing.get_origin(hint) is typing.Literal]
OWN = [(arch, name) for arch in models.ARCHITECTURES for name in models.parameters(arch)]
SHARED = [f.name for f in dataclasses.fields(Recipe)]

OUT_OF_RANGE: dict[str, list[Any]] = {
    "limit_train": [0, -1],
    "val_fraction": [1.0, -0.1, 1.5],
    "split_seed": [-1],
    "folds": [1, 0],
    "fold": [-1],
    "crop": [-1, 17],
    "rotate": [-1.0, 181.0],
    "cutout": [-1, 33],
    "small_share": [-0.1, 1.0],
    "small_side": [7, 32],
    "mixup": [-0.1],
    "cutmix": [-0.1],
    "label_smoothing": [-0.1, 1.0],
    "agc": [-0.1],
    "lr": [0.0, -1.0],
    "momentum": [-0.1, 1.0],
    "weight_decay": [-1e-9],
    "lr_step": [0],
    "lr_patience": [-1],
    "warmup_epochs": [-1.0],
    "batch_size": [1, 0],
    "accumulate": [0],
    "max_epochs": [0],
    "early_stop_patience": [0],
    "ema": [-0.1, 1.0],
    "seed": [-1, 2**32],
}
NUMERIC = [name for name, hint in HINTS.items() if {int, float} & {hint, *typing.get_args(hint)}]


def refusal(**fields: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe(**fields)
    return str(caught.value)


def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    text = refusal(arch="resnet", weight_decya=0.1)
    assert "weight_decya" in text and "did you mean weight_decay?" in text
    assert all(name in text for name in SHARED)


def test_a_field_of_another_architecture_is_refused_with_the_own_ones() -> None:
    text = refusal(arch="classic_cnn", stem="cifar")
    assert "classic_cnn has no such field" in text
    assert all(name in text for name in models.parameters("classic_cnn"))


def test_an_unknown_architecture_is_refused_with_the_nearest_name() -> None:
    text = refusal(arch="resnt")
    assert "'resnt'" in text and "did you mean resnet?" in text
    assert all(arch in text for arch in models.ARCHITECTURES)


@pytest.mark.parametrize("name", LITERALS)
def test_a_choice_quotes_its_legal_values(name: str) -> None:
    text = refusal(**{name: "nonsense"})
    assert text.startswith(f"{name}: 'nonsense'")
    assert all(str(choice) in text for choice in typing.get_args(HINTS[name]))


@pytest.mark.parametrize("value", [True, None, 3, 1.5, []])
@pytest.mark.parametrize("name", LITERALS)
def test_a_choice_refuses_other_types(name: str, value: Any) -> None:
    assert refusal(**{name: value}).startswith(f"{name}: {value!r}")


def test_every_number_has_its_limits_in_this_file() -> None:
    assert sorted(OUT_OF_RANGE) == sorted(NUMERIC)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_a_number_out_of_range_quotes_itself_and_the_legal_ones(name: str, value: Any) -> None:
    text = refusal(**{name: value})
    (legal,) = [f.metadata["legal"] for f in dataclasses.fields(Recipe) if f.name == name]
    assert text.startswith(f"{name}: {value!r}") and f"Legal: {legal}" in text


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", True, [1]])
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_number_refuses_what_is_none(name: str, value: Any) -> None:
    text = refusal(**{name: value})
    assert text.startswith(f"{name}: {value!r}") and "Legal: " in text


@pytest.mark.parametrize("name", [name for name in OUT_OF_RANGE if int in {HINTS[name], *typing.get_args(HINTS[name])}])
def test_a_whole_number_refuses_a_fraction_and_takes_a_whole_float(name: str) -> None:
    assert "2.5 is not a whole number" in refusal(**{name: 2.5})
    low = OUT_OF_RANGE[name][0] + 2
    taken = getattr(Recipe(**{"folds": 3, name: float(low)}), name)
    assert taken == low and type(taken) is int


@pytest.mark.parametrize("name", ["augment", "nesterov"])
def test_a_switch_refuses_what_is_no_truth_value(name: str) -> None:
    for value in (1, "yes", None):
        assert refusal(**{name: value}).startswith(f"{name}: {value!r}")


@pytest.mark.parametrize(("arch", "name"), OWN)
def test_an_own_field_refuses_the_impossible(arch: str, name: str) -> None:
    for value in (math.nan, -1, "nonsense", [1]):
        assert refusal(**{"arch": arch, name: value}).startswith(f"{name}: {value!r}")


@pytest.mark.parametrize(("arch", "name"), OWN)
def test_an_architecture_gives_its_own_fields_and_defaults(arch: str, name: str) -> None:
    assert getattr(Recipe(arch=arch), name) == models.parameters(arch)[name]
    assert name not in SHARED, "an own field may not hide one that every recipe has"


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_an_architecture_moves_the_defaults_it_declares_and_no_other(arch: str) -> None:
    moved = models.network_class(arch).RECIPE
    made = Recipe(arch=arch)
    assert made == recipe_class(arch)() and isinstance(made, Recipe)
    for f in dataclasses.fields(Recipe):
        if f.name != "arch":
            assert getattr(made, f.name) == moved.get(f.name, f.default)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"optimizer": "adam", "nesterov": True}, "nesterov"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov"),
        ({"optimizer": "muon", "nesterov": True}, "nesterov"),
        ({"val_fraction": 0, "schedule": "plateau"}, "schedule"),
        ({"val_fraction": 0, "early_stop_patience": 3}, "early_stop_patience"),
        ({"mixup": 0.2, "cutmix": 1.0}, "mixup"),
        ({"arch": "classic_cnn", "small_share": 0.5}, "small_share"),
        ({"arch": "speed_cnn", "small_share": 0.5, "small_side": 8}, "small_side"),
        ({"fold": 1}, "fold"),
        ({"folds": 3, "fold": 3}, "fold"),
        ({"warmup_epochs": 3, "max_epochs": 3}, "warmup_epochs"),
        ({"warmup_epochs": 1, "schedule": "onecycle"}, "warmup_epochs"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], named: str) -> None:
    assert refusal(**fields).startswith(f"{named}: ")


@pytest.mark.parametrize(
    ("fields", "legal"),
    [
        ({"arch": "three_layer_cnn"}, "this three_layer_cnn takes images of 32x32 only. Legal: 0."),
        ({"arch": "wide_cnn", "depth": 4, "small_side": 15}, "small_side: 15. Legal: 16 to 31 for this wide_cnn."),
    ],
)
def test_small_images_are_refused_where_the_network_takes_none(fields: dict[str, Any], legal: str) -> None:
    assert refusal(**fields, small_share=0.5).endswith(legal)
    assert Recipe(**fields).small_epochs == 0


@pytest.mark.parametrize(
    ("share", "epochs", "small"),
    [
        (0.0, 8, 0),
        (0.5, 8, 4),
        (0.5, 9, 4),
        (0.7, 10, 7),
        (0.29, 100, 29),
        (0.99, 3, 2),
        (1 - 1e-12, 8, 7),
        (0.9, 1, 0),
    ],
)
def test_the_last_epoch_never_trains_on_small_images(share: float, epochs: int, small: int) -> None:
    assert Recipe(arch="resnet", small_share=share, max_epochs=epochs).small_epochs == small


def test_folds_validate_whatever_the_val_fraction() -> None:
    assert Recipe(val_fraction=0, folds=3, schedule="plateau", early_stop_patience=3).validated


def test_a_refusal_is_an_input_error_which_is_a_value_error() -> None:
    assert issubclass(RecipeError, InputError) and issubclass(InputError, ValueError)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().lr = 1.0  # type: ignore[misc]


RECIPES = st.builds(
    Recipe,
    arch=st.sampled_from(models.ARCHITECTURES),
    lr=st.floats(1e-9, 1e3),
    momentum=st.floats(0, 0.999),
    seed=st.integers(0, 2**32 - 1),
    optimizer=st.sampled_from(["sgd", "adam", "adamw", "muon"]),
    schedule=st.sampled_from(["none", "step", "plateau", "cosine", "onecycle", "linear"]),
    limit_train=st.none() | st.integers(1, 50_000),
    data_dir=st.none() | st.text(min_size=1),
    augment=st.booleans(),
    cutmix=st.floats(0, 5),
)


@settings(deadline=None)
@given(RECIPES)
def test_a_recipe_survives_dict_json_pickle_and_replace(recipe: Recipe) -> None:
    assert Recipe(**recipe.to_dict()) == recipe
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe
    again = pickle.loads(pickle.dumps(recipe))
    assert again == recipe and type(again) is type(recipe) and hash(again) == hash(recipe)
    assert recipe.replace() == recipe
    assert recipe.replace(lr=recipe.lr * 2) != recipe


PRESETS = sorted((ROOT / "cifar_lab" / "presets").glob("*.yaml"))


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_a_preset_is_its_architectures_recipe_but_for_what_it_says(file: Path) -> None:
    given, _ = cli.parse("train", "", ["--config", str(file)])
    own = Recipe(**{"arch": given["arch"]}).to_dict()
    assert file.stem.startswith(given["arch"]) and f"--config {file.relative_to(ROOT)}" in file.read_text()
    made = Recipe(**given).to_dict()
    assert {name for name in made if made[name] != own[name]} == set(given) - {"arch"}, "it says what differs, no more"


def test_replace_checks_again() -> None:
    with pytest.raises(RecipeError, match=r"^lr: -1\.0"):
        Recipe().replace(lr=-1.0)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_replace_to_another_architecture_keeps_what_both_have(arch: str) -> None:
    after = Recipe(arch="resnet", lr=0.123).replace(arch=arch)
    assert after.arch == arch and after.lr == 0.123


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_every_field_is_explained_in_the_docstring(arch: str) -> None:
    made = recipe_class(arch)
    for f in dataclasses.fields(made):
        assert f"\n        {f.name}: " in (made.__doc__ or "")


def test_making_a_recipe_loads_neither_lightning_nor_ray_nor_another_architecture() -> None:
    code = (
        "import sys; from cifar_lab.recipe import Recipe; Recipe(arch='classic_cnn');"
        "print([m for m in sys.modules if m.split('.')[0] in ('pytorch_lightning', 'lightning', 'ray', 'torchvision')"
        " or m == 'cifar_lab.models.resnet'])"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


# Every field moves something. A row: the context in which the field acts, then another value of it.
CONTEXT = {
    "arch": "classic_cnn", "width": 2, "dataset": "digits", "limit_train": 100, "max_epochs": 2, "batch_size": 32,
    "precision": "32", "optimizer": "adam", "lr": 3e-3, "weight_decay": 0.0, "rotate": 0.0,
}  # fmt: skip
ANY_SIDE = {"arch": "resnet", "width": 8, "stem": "imagenet"}
STUCK = {"optimizer": "sgd", "lr": 1e-6, "momentum": 0.0}  # nothing improves, so that patience runs out
MOVES: dict[str, tuple[dict[str, Any], Any]] = {
    "arch": ({}, "resnet"),
    "limit_train": ({}, 120),
    "val_fraction": ({}, 0.2),
    "split_seed": ({}, 1),
    "folds": ({}, 3),
    "fold": ({"folds": 3}, 1),
    "normalize": ({}, "half"),
    "augment": ({}, False),
    "crop": ({}, 0),
    "crop_border": ({}, "reflect"),
    "flip": ({}, "alternating"),
    "rotate": ({}, 90.0),
    "cutout": ({}, 8),
    "cutout_fill": ({"cutout": 8}, "black"),
    "small_share": (ANY_SIDE, 0.5),
    "small_side": ({**ANY_SIDE, "small_share": 0.5}, 12),
    "mixup": ({}, 1.0),
    "cutmix": ({}, 1.0),
    "label_smoothing": ({}, 0.2),
    "agc": ({}, 0.001),
    "optimizer": ({}, "sgd"),
    "lr": ({}, 1e-3),
    "momentum": ({}, 0.5),
    "nesterov": ({"optimizer": "sgd"}, True),
    "weight_decay": ({}, 0.1),
    "schedule": ({}, "cosine"),
    "lr_step": ({"schedule": "step"}, 1),
    "lr_patience": ({**STUCK, "schedule": "plateau", "max_epochs": 6, "lr_patience": 9}, 0),
    "warmup_epochs": ({}, 1.0),
    "batch_size": ({}, 50),
    "accumulate": ({}, 2),
    "max_epochs": ({}, 3),
    "early_stop_patience": ({**STUCK, "max_epochs": 4}, 1),
    "ema": ({}, 0.9),
    "seed": ({}, 1),
    "precision": ({"max_epochs": 1, "limit_train": 20, "batch_size": 20, "width": 1, "val_fraction": 0.01}, "bf16"),
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "classic_cnn": {"width": 2},
    "resnet": {"width": 8, "stem": "imagenet"},
    "nf_resnet": {"width": 4},
    "three_layer_cnn": {"channels1": 4, "channels2": 4},
    "wide_cnn": {"width": 4},
    "mixed_kernel_cnn": {"width": 4},
    "dynamic_cnn": {"width": 4, "num_blocks": "1,1"},
    "pretrained": {"resolution": 32, "weights": "none"},
    "speed_cnn": {"widths": "16,16,16"},
}
SHORT: dict[str, Any] = {k: v for k, v in CONTEXT.items() if k != "width"} | {"limit_train": 40, "max_epochs": 1}


def left(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a training leaves: its curves without the seconds, and its weights."""
    from cifar_lab.fit import fit

    run = fit(Recipe(**fields), folder)
    weights = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return {
        "curves": [{k: v for k, v in row.items() if k != "seconds"} for row in run.history],
        "weights": {name: tensor for name, tensor in weights.items() if name not in ("mean", "std")},
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (
        one["curves"] == other["curves"]
        and one["weights"].keys() == other["weights"].keys()
        and all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
    )


def test_every_field_of_a_recipe_is_in_the_table() -> None:
    # Of the last two: test_machine, test_compile. They move how fast about the same is computed.
    elsewhere = {"dataset", "data_dir", "memory_format", "compile"}
    assert sorted({*MOVES, *elsewhere}) == sorted(SHARED), "say in MOVES where the new field acts"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What a recipe leaves, trained once however many tests start from it."""
    known: dict[str, dict[str, Any]] = {}

    def once(fields: dict[str, Any]) -> dict[str, Any]:
        key = json.dumps(fields, sort_keys=True)
        if key not in known:
            known[key] = left(fields, tmp_path_factory.mktemp("trained"))
        return known[key]

    return once


Trained = Callable[[dict[str, Any]], dict[str, Any]]


def test_the_same_recipe_leaves_the_same_weights_and_curves(trained: Trained, tmp_path: Path) -> None:
    assert same(trained(CONTEXT), left(CONTEXT, tmp_path)), "else the tests below would see nothing but noise"


@pytest.mark.parametrize("name", [name for name in MOVES if name != "arch"])
def test_every_field_moves_something(name: str, trained: Trained) -> None:
    context, value = MOVES[name]
    before = {**CONTEXT, **context}
    assert before.get(name) != value
    assert not same(trained(before), trained({**before, name: value}))


# How each is left away, and what it is where it acts; CONTEXT crops and flips.
PARTS: dict[str, tuple[Any, Any]] = {
    "crop": (0, 4), "flip": ("none", "random"), "rotate": (0.0, 90.0), "cutout": (0, 8), "mixup": (0.0, 1.0),
    "cutmix": (0.0, 1.0), "label_smoothing": (0.0, 0.2),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_training_changes_the_curves_of_training_and_of_validation(name: str, trained: Trained) -> None:
    without, given = (trained({**CONTEXT, name: value})["curves"] for value in PARTS[name])
    assert len(without) == len(given) == CONTEXT["max_epochs"]
    for metric in ("train_loss", "val_loss"):
        apart = [abs(one[metric] - other[metric]) for one, other in zip(without, given, strict=True)]
        assert min(apart) > 0 and apart[-1] > 1e-4, metric


@pytest.mark.parametrize("name", PARTS)
def test_without_augment_only_what_mixes_images_or_labels_is_left(name: str, trained: Trained) -> None:
    without, given = (trained({**CONTEXT, "augment": False, name: value}) for value in PARTS[name])
    assert same(without, given) == (name in ("crop", "flip", "rotate", "cutout"))


def smoothed_image_by_image(logits: torch.Tensor, shares: list[dict[int, float]], smoothing: float) -> float:
    """The mean cross-entropy in Python's own numbers; an image's label is a share of each class it shows."""
    losses = []
    for row, share in zip(logits.tolist(), shares, strict=True):
        total = math.log(sum(math.exp(value) for value in row))
        wanted = [(1 - smoothing) * share.get(i, 0.0) + smoothing / len(row) for i in range(len(row))]
        losses.append(-sum(weight * (value - total) for weight, value in zip(wanted, row, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}, {"cutmix": 1.0}], ids=str)
def test_label_smoothing_is_that_of_a_slow_reference_and_leaves_validation_alone(
    mixing: dict[str, float], smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cifar_lab.classifier import ImageClassifier

    torch.manual_seed(0)
    made = Recipe(**{**CONTEXT, **mixing, "label_smoothing": smoothing})
    model = ImageClassifier(made.to_dict(), [str(i) for i in range(10)], [0.5] * 3, [0.25] * 3)
    images, labels = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8), torch.arange(12) % 10
    mixed: list[Any] = []
    mix = model._mixed
    monkeypatch.setattr(model, "_mixed", lambda *args: mixed.append(mix(*args)) or mixed[-1])
    loss = model.training_step((images, labels), 0)
    inputs, targets, _ = mixed.pop()
    shares = [{int(t): 1.0} if t.ndim == 0 else dict(enumerate(t.tolist())) for t in targets]
    assert bool(mixing) == any(0.01 < share < 0.99 for own in shares for share in own.values())
    assert loss.item() == pytest.approx(smoothed_image_by_image(model.network(inputs), shares, smoothing), rel=1e-5)
    model.eval().validation_step((images, labels))
    plain = smoothed_image_by_image(model(images), [{int(label): 1.0} for label in labels], 0)
    assert model.val_loss_sum.item() / 12 == pytest.approx(plain, rel=1e-5)


def test_patience_decides_how_many_epochs_there_are(tmp_path: Path) -> None:
    context, value = MOVES["early_stop_patience"]
    fields = {**CONTEXT, **context}
    assert len(left({**fields, "early_stop_patience": value}, tmp_path)["curves"]) == 2 < fields["max_epochs"]


# What weights a training begins from, tests/test_pretrained.py shows.
@pytest.mark.parametrize(("arch", "name"), [own for own in OWN if own != ("pretrained", "weights")])
def test_every_own_field_moves_something(
    arch: str, name: str, trained: Trained, tmp_path: Path, another: Callable[[str, str], Any]
) -> None:
    small = {k: v for k, v in SMALL.get(arch, {}).items() if k != name}
    before = {**SHORT, "arch": arch, **small}
    assert not same(trained(before), left({**before, name: another(arch, name)}, tmp_path))


@pytest.mark.parametrize("arch", [arch for arch in models.ARCHITECTURES if arch != CONTEXT["arch"]])
def test_the_architecture_moves_something(arch: str, trained: Trained) -> None:
    one, other = ({**SHORT, "arch": name, **SMALL.get(name, {})} for name in (arch, "classic_cnn"))
    assert not same(trained(one), trained(other))


def test_dataset_and_data_dir_move_something(make_tree: Callable[..., Path], trained: Trained, tmp_path: Path) -> None:
    tree = make_tree(count=20)
    fields = {**CONTEXT, "dataset": "folder", "limit_train": None, "data_dir": str(tree)}
    noise = left(fields, tmp_path / "noise")
    assert not same(noise, trained(CONTEXT))
    other = tree.rename(tree.with_name("moved"))
    (other / "train" / "apple").rename(other / "train" / "quince")
    (other / "train" / "pear").rename(other / "train" / "apple")
    moved = left({**fields, "data_dir": str(other)}, tmp_path / "moved-out")
    assert not same(noise, moved)
