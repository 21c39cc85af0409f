"""Recipe: the one record of what is trained."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cifar_lab import models

MEASURED = ("precision", "memory_format")  # fields which the machine may settle; see cifar_lab.machine.measured
FREE = ("data_dir", "compile")  # where and how fast it is trained, not what: these may change on a resume


class InputError(ValueError):
    """Something impossible was asked for: one paragraph quoting the value and the legal ones (exit status 2)."""


class RecipeError(InputError):
    """A Recipe's field is unknown or its value impossible."""


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known name closest to `name`, or a full stop when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."


def dial(default: Any, legal: str, test: Callable[[Any], bool]) -> Any:
    """A dataclass field with what is legal, in words and as a test, for `check_fields`."""
    return field(default=default, metadata={"legal": legal, "test": test})


def at_least(low: float, default: Any, unit: str = "") -> Any:
    """A field whose value may not be below `low`."""
    return dial(default, f"{low} or more{unit}", lambda v: v >= low)


def _positive(default: float) -> Any:
    return dial(default, "more than 0", lambda v: v > 0)


def _fraction(default: float) -> Any:
    return dial(default, "from 0 up to but not including 1", lambda v: 0 <= v < 1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, from which images, how, for how long; every command's flags are these fields.

    Making one checks it: `Recipe(arch="resnet", depth=34)` is an instance of a subclass of Recipe which adds the fields
    and the defaults that the architecture declares in its own file, so an impossible recipe never exists.

    Args:
        arch: architecture, a file in cifar_lab/models.
        dataset: cifar10; folder (train/CLASS/*.png and test/CLASS/*.png of your own); digits (embedded, no download).
        data_dir: where the images lie; unset: CIFAR_LAB_DATA, else the cache, into which cifar10 is downloaded.
        limit_train: use only this many images of the training part, stratified; validation stays whole.
        val_fraction: part of the training set held out for validation, stratified; 0 trains on all of it, and the last
            epoch counts for the best.
        split_seed: seed of that split, or of the folds.
        folds: cross-validation instead of that split: the training set in this many stratified parts, of which part
            `fold` validates; limit_train then counts the images of all parts.
        fold: the part that validates, counted from 0.
        normalize: per-channel mean and std of the training part (train), .5 and .5 (half), or neither (none).
        augment: whether training images are augmented by crop, flip, rotate and cutout.
        crop: padding of the random crop, pixels.
        crop_border: what that padding shows, black or reflect (the image's own edge mirrored).
        flip: horizontal flip: none, random (half of the images), alternating (all of them every second epoch).
        rotate: largest random rotation, degrees.
        cutout: side of the square that is blanked, pixels.
        cutout_fill: what the square shows, mean (the mean color) or black.
        small_share: progressive resizing: share of the epochs, the first ones, that train on images shrunk to
            small_side, rounded down to whole epochs; 0 is off. Validation and test see whole images. For networks that
            take images of several sizes.
        small_side: side of a shrunk image, pixels.
        mixup: alpha of the Beta distribution that mixes pairs of images and labels; 0 is off.
        cutmix: alpha of the Beta distribution of the area pasted from another image, labels in proportion; 0 is off.
        label_smoothing: share of the target spread evenly over the classes.
        agc: adaptive gradient clipping: largest norm of a unit's gradient over that of its weights, the last layer
            left alone; 0 is off.
        optimizer: sgd, adam (L2 in the gradient), adamw (decoupled decay) or muon (steps of equal size in all
            directions for the filters of convolutions, sgd with a twelfth of the lr for the rest).
        lr: peak learning rate.
        momentum: momentum of sgd and of muon's filters; the first beta of adam and adamw.
        nesterov: Nesterov momentum for sgd; that of muon always is.
        weight_decay: weight decay, per step times lr for adamw, else the L2 coefficient; under muon of what is no
            filter.
        schedule: lr over time after warm-up: none, step (times .1 every lr_step epochs), plateau (times .1 after
            lr_patience epochs without a better val_loss), cosine and linear (down to 0), onecycle (up for 30% of the
            run, then down, both cosine; it has its own warm-up).
        lr_step: epochs between the drops of schedule=step.
        lr_patience: epochs without improvement before schedule=plateau drops the lr.
        warmup_epochs: epochs over which the lr rises linearly from 0; fractions allowed.
        batch_size: images in a batch.
        accumulate: batches to a step, by the mean of their gradients; batch norm sees each by itself.
        max_epochs: passes over the training part.
        early_stop_patience: stop after this many epochs without a better val_acc; unset: never.
        ema: decay a step of the moving average of the weights that is validated and tested; 0 is off.
        seed: seed of weights, order, augmentation and dropout; the split has its own.
        precision: 32, or bf16 (autocast); auto measures once which is faster here and writes it into the recipe.
        memory_format: how images and filters lie in memory, channels_last or contiguous; auto measures it likewise. A
            network with a convolution whose channels do not fill a CPU's registers is contiguous whatever is said. The
            other one rounds otherwise, and dropout on maps (wide_cnn) draws other pixels.
        compile: train the network compiled (torch.compile), to the same numbers but for their rounding: its first steps
            take long, those after them may gain or lose.
    """

    arch: str = field(default="resnet")
    dataset: Literal["cifar10", "folder", "digits"] = "cifar10"
    data_dir: str | None = None
    limit_train: int | None = at_least(1, None, " images, or unset")
    val_fraction: float = _fraction(0.1)
    split_seed: int = at_least(0, 0)
    folds: int | None = at_least(2, None, ", or unset")
    fold: int = at_least(0, 0)
    normalize: Literal["train", "half", "none"] = "train"
    augment: bool = True
    crop: int = dial(4, "0 to 16 pixels", lambda v: 0 <= v <= 16)
    crop_border: Literal["black", "reflect"] = "black"
    flip: Literal["none", "random", "alternating"] = "random"
    rotate: float = dial(0.0, "0 to 180 degrees", lambda v: 0 <= v <= 180)
    cutout: int = dial(0, "0 to 32 pixels", lambda v: 0 <= v <= 32)
    cutout_fill: Literal["mean", "black"] = "mean"
    small_share: float = _fraction(0.0)
    small_side: int = dial(24, "8 to 31 pixels", lambda v: 8 <= v <= 31)
    mixup: float = at_least(0, 0.0)
    cutmix: float = at_least(0, 0.0)
    label_smoothing: float = _fraction(0.0)
    agc: float = at_least(0, 0.0)
    optimizer: Literal["sgd", "adam", "adamw", "muon"] = "sgd"
    lr: float = _positive(0.1)
    momentum: float = _fraction(0.9)
    nesterov: bool = False
    weight_decay: float = at_least(0, 5e-4)
    schedule: Literal["none", "step", "plateau", "cosine", "onecycle", "linear"] = "none"
    lr_step: int = at_least(1, 30, " epochs")
    lr_patience: int = at_least(0, 3, " epochs")
    warmup_epochs: float = at_least(0, 0.0, " epochs")
    batch_size: int = at_least(2, 64, " images (batch norm needs two)")
    accumulate: int = at_least(1, 1, " batch")
    max_epochs: int = at_least(1, 30, " epoch")
    early_stop_patience: int | None = at_least(1, None, " epoch, or unset")
    ema: float = _fraction(0.0)
    seed: int = dial(0, "0 to 4294967295", lambda v: 0 <= v < 2**32)
    precision: Literal["auto", "32", "bf16"] = "auto"
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    compile: bool = False

    if TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None: ...

    def __new__(cls, **fields: Any) -> Recipe:
        if cls is Recipe:
            cls = recipe_class(fields.get("arch", "resnet"))
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                arch = fields.get("arch", "resnet")
                own = ", ".join(models.parameters(arch)) or "none"
                raise RecipeError(
                    f"{name}: {arch} has no such field{nearest(name, known)} Its own are {own}; every recipe has "
                    f"{', '.join(f.name for f in dataclasses.fields(Recipe))}."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise RecipeError(
                f"nesterov: True needs optimizer=sgd and momentum above 0, not {self.optimizer} and {self.momentum}."
            )
        if self.fold >= (self.folds or 1):
            legal = f"0 to {self.folds - 1}, below folds" if self.folds else "0, while folds is unset"
            raise RecipeError(f"fold: {self.fold}. Legal: {legal}.")
        if not self.validated and self.schedule == "plateau":
            raise RecipeError("schedule: plateau looks at val_loss; it needs folds, or a val_fraction above 0.")
        if not self.validated and self.early_stop_patience is not None:
            raise RecipeError(
                f"early_stop_patience: {self.early_stop_patience} looks at val_acc; it needs folds, or a val_fraction "
                "above 0."
            )
        if self.mixup and self.cutmix:
            raise RecipeError(f"mixup: {self.mixup} and cutmix: {self.cutmix}; only one of them may be above 0.")
        if self.warmup_epochs and self.schedule == "onecycle":
            raise RecipeError(f"warmup_epochs: {self.warmup_epochs}; schedule=onecycle has its own warm-up; legal: 0.")
        if self.warmup_epochs >= self.max_epochs:
            raise RecipeError(f"warmup_epochs: {self.warmup_epochs}; legal: less than max_epochs, {self.max_epochs}.")
        if self.small_share:
            self._check_small()

    def _check_small(self) -> None:
        own = self.network_parameters()
        if not models.takes(self.arch, self.small_side, **own):
            sides = [side for side in range(8, 32) if models.takes(self.arch, side, **own)]
            if not sides:
                raise RecipeError(
                    f"small_share: {self.small_share}; this {self.arch} takes images of 32x32 only. Legal: 0."
                )
            raise RecipeError(f"small_side: {self.small_side}. Legal: {sides[0]} to 31 for this {self.arch}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.to_dict(),)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a flat dict of primitives; `Recipe(**recipe.to_dict()) == recipe`."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe with some fields changed, checked again; another arch brings its own fields' defaults."""
        kept = self.to_dict()
        if changes.get("arch", self.arch) != self.arch:
            kept = {f.name: kept[f.name] for f in dataclasses.fields(Recipe)}
        return Recipe(**{**kept, **changes})

    def measured_as(self, was: Mapping[str, Any]) -> Recipe:
        """The same recipe, what it leaves to be measured taken from `was`, another recipe's fields."""
        return self.replace(**{name: was[name] for name in MEASURED if getattr(self, name) == "auto"})

    @property
    def validated(self) -> bool:
        """Whether images are held out for validation."""
        return self.folds is not None or self.val_fraction > 0

    @property
    def small_epochs(self) -> int:
        """How many epochs, the first ones, train on shrunk images."""
        epochs = int(self.small_share * self.max_epochs + 1e-9)  # .29 * 100 is a little less than 29
        return min(epochs, self.max_epochs - 1)

    def network_parameters(self) -> dict[str, Any]:
        """The fields which the architecture itself declares: what its network is made from."""
        return {name: getattr(self, name) for name in models.parameters(self.arch)}


def _rebuild(fields: dict[str, Any]) -> Recipe:
    return Recipe(**fields)


@functools.cache
def recipe_class(arch: str) -> type[Recipe]:
    """Recipe with the fields and defaults of one architecture.

    Raises:
        RecipeError: no file in cifar_lab/models has that name.
    """
    if arch not in models.ARCHITECTURES:
        close = nearest(str(arch), models.ARCHITECTURES)
        raise RecipeError(f"arch: {arch!r}{close} Legal: {', '.join(models.ARCHITECTURES)}.")
    network = models.network_class(arch)
    hints = typing.get_type_hints(network.__init__)
    own: list[tuple[str, Any, Any]] = []
    for name, default in models.parameters(arch).items():
        metadata = {"legal": network.LEGAL[name][0], "test": network.LEGAL[name][1]} if name in network.LEGAL else {}
        own.append((name, hints[name], field(default=default, metadata=metadata)))
    inherited = {f.name: f for f in dataclasses.fields(Recipe)}
    for name, default in {"arch": arch, **network.RECIPE}.items():
        own.append((name, _hints(Recipe)[name], field(default=default, metadata=inherited[name].metadata)))
    made = dataclasses.make_dataclass(
        f"Recipe_{arch}", own, bases=(Recipe,), frozen=True, kw_only=True, namespace={"__module__": __name__}
    )
    made.__doc__ = f"{Recipe.__doc__}{models.parameter_docs(arch)}"
    return made


def check_fields(record: Any) -> None:
    """Bring each field of a frozen dataclass to its own type.

    Raises:
        RecipeError: quotes the first impossible value, and what would be legal.
    """
    kind: type = type(record)
    hints = _hints(kind)
    for f in dataclasses.fields(record):
        object.__setattr__(record, f.name, _checked(f.name, getattr(record, f.name), hints[f.name], f.metadata))


@functools.cache
def _hints(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _checked(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """`value` as the field's own type, or a RecipeError that quotes it and what would be legal."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        legal = ", ".join(map(str, choices))
        if value not in choices or isinstance(value, bool):
            raise RecipeError(f"{name}: {value!r}{nearest(str(value), map(str, choices))} Legal: {legal}.")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    named = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    legal = metadata.get("legal", "")
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise RecipeError(f"{name}: {value!r} is not {named}. Legal: {legal or named}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{name}: {value!r} is not finite. Legal: {legal or named}.")
    if "test" in metadata and not metadata["test"](value):
        raise RecipeError(f"{name}: {value!r}. Legal: {legal}.")
    return value
