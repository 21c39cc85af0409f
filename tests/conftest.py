"""Fixtures that several test files share: a cache of the session's own, a tree of images, the real CIFAR-10."""

from __future__ import annotations

import contextlib
import os
import pickle
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_lab import models
from cifar_lab.recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from cifar_lab.checkpoint import Row

# More threads spin while they wait for each other: on a busy machine that is a hundred times slower, not faster.
torch.set_num_threads(1)
GIVEN_DATA = os.environ.get("CIFAR_LAB_DATA")
# The runs that are in git; a user's own lie in results/runs.
COMMITTED = sorted(
    file for file in (Path(__file__).parents[1] / "results").glob("*/*/best.json") if file.parts[-3] != "runs"
)
NARROW: dict[str, dict[str, Any]] = {
    "resnet": {"width": 8},
    "nf_resnet": {"width": 8},
    "wide_cnn": {"width": 4},
    "mixed_kernel_cnn": {"width": 4},
    "dynamic_cnn": {"width": 4, "num_blocks": "1,1"},
    "pretrained": {"resolution": 32},
    "speed_cnn": {"widths": "16,16,16"},
}


# Lightning takes callbacks from installed packages; this one counts the epochs that are really trained. EPOCH_PAUSE
# makes each so many seconds longer, for tests that must come in between.
COUNTER = """
import os
import time
from pytorch_lightning.callbacks import Callback

class Counter(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        with open(os.environ["EPOCHS_TRAINED"], "a") as file:
            file.write(f"{trainer.default_root_dir} {trainer.current_epoch + 1}\\n")
        time.sleep(float(os.environ.get("EPOCH_PAUSE", "0")))

def made():
    return Counter()
"""


def install_callback(site: Path, name: str, source: str) -> None:
    """Leave in a folder for PYTHONPATH a package of whose `made()` Lightning takes a callback for every training."""
    (site / f"{name}.py").write_text(source)
    installed = site / f"{name}-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    entry = f"[pytorch_lightning.callbacks_factory]\n{name} = {name}:made\n"
    (installed / "entry_points.txt").write_text(entry)


class InterruptionError(Exception):
    """What a test stops a training with."""


def interrupted(
    asked: Recipe, folder: Path, epochs: int, *, on_epoch: Callable[[Row], None] = lambda _: None, **words: Any
) -> None:
    """Train until an exception ends it, after so many epochs; `words` are those of `fit`."""
    from cifar_lab.fit import fit

    def stop(row: Row) -> None:
        on_epoch(row)
        if row["epoch"] == epochs:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        fit(asked, folder, on_epoch=stop, **words)


def look_into_resnets(monkeypatch: pytest.MonkeyPatch, look: Callable[[Any, torch.Tensor], Any]) -> None:
    """Have `look` called with each ResNet that computes, and the images it is given."""
    from cifar_lab.models.resnet import ResNet

    plain = ResNet.forward

    def forward(self: ResNet, images: torch.Tensor) -> torch.Tensor:
        look(self, images)
        return plain(self, images)

    monkeypatch.setattr(ResNet, "forward", forward)


@pytest.fixture(scope="session")
def counter_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder which, on PYTHONPATH, has every trained epoch noted in the file that EPOCHS_TRAINED names."""
    site = tmp_path_factory.mktemp("site")
    install_callback(site, "counter", COUNTER)
    return site


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_environment(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the user's cache or the user's images unless it asks for them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(session_cache))
    monkeypatch.delenv("CIFAR_LAB_DATA", raising=False)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the folder which `cifar_lab.dataset.cache_folder` names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cifar_lab"


@pytest.fixture(scope="session")
def cifar10_folder() -> str:
    """The real CIFAR-10, an absolute path, where CIFAR_LAB_DATA named it before the tests began."""
    if not GIVEN_DATA or not Path(GIVEN_DATA).is_dir():
        pytest.skip("CIFAR_LAB_DATA names no folder with CIFAR-10")
    return str(Path(GIVEN_DATA).resolve())


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes train/CLASS/*.png and test/CLASS/*.png of noise and returns the folder above them."""

    def make(classes: tuple[str, ...] = ("apple", "pear"), count: int = 10, size: int = 32) -> Path:
        noise = np.random.default_rng(0)
        root = tmp_path / "images"
        for part in ("train", "test"):
            for name in classes:
                folder = root / part / name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = noise.integers(0, 256, (size, size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i:03}.png")
        return root

    return make


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the checkpoint of an untrained, narrow network, in 32 bits, and returns its path."""
    from cifar_lab.classifier import ImageClassifier

    def make(name: str = "a.ckpt", classes: tuple[str, ...] = ("apple", "pear"), **fields: Any) -> Path:
        torch.manual_seed(0)
        arch = fields.pop("arch", "classic_cnn")
        recipe = Recipe(**{"arch": arch, "dataset": "digits", "precision": "32", **NARROW.get(arch, {}), **fields})
        made = {"recipe": recipe.to_dict(), "classes": list(classes), "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1]}
        model = ImageClassifier(**made)
        for layer in model.network.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                layer.momentum = 1.0  # its statistics are those of one batch: without any, answers are 0 or 1
        with torch.no_grad():
            model.network.train()(model.normalise(torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)))
            for parameter in model.network.parameters():
                parameter.mul_(1.02)  # so that an average of the weights is not the weights
        place = tmp_path / "run" / "checkpoints" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"hyper_parameters": made, "state_dict": model.state_dict()}, place)
        return place

    return make


class Trap:
    """Unpickled, it makes the file it names."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture(params=["pickle", "torch"])
def trap(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint that runs code when it is unpickled; whoever read it must not have run it."""
    place, mark = tmp_path / "trap.ckpt", tmp_path / "mark"
    content = {"hyper_parameters": {"recipe": Trap(mark)}, "state_dict": {}}
    if request.param == "pickle":
        place.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, place)
    yield place
    assert not mark.exists(), "the checkpoint's code was run"
    with contextlib.suppress(RuntimeError):
        torch.load(place, weights_only=False)
    assert mark.exists(), "the trap does not work"


@pytest.fixture
def another() -> Callable[[str, str], Any]:
    """A function from an architecture and its own field to a legal value which is not the default, and cheap."""

    def find(arch: str, name: str) -> Any:
        default = models.parameters(arch)[name]
        hint = typing.get_type_hints(models.network_class(arch).__init__)[name]
        if typing.get_origin(hint) is typing.Literal:
            wanted: list[Any] = list(typing.get_args(hint))
        else:
            by_type: dict[Any, list[Any]] = {
                bool: [True, False], int: [16, 8, 3, 2, 1, 48], float: [0.5, 0.25, 2.0],
                str: ["1,2", "16,32,16", "none"],
            }  # fmt: skip
            wanted = by_type.get(hint, [])
        for value in wanted:
            try:
                if value != default and Recipe(**{"arch": arch, name: value}):
                    return value
            except RecipeError:
                continue
        raise AssertionError(f"{arch}.{name}: say in `another` what it may become")

    return find
