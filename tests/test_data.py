"""Images: decoded once, split the same everywhere, validation untouched, every error names a way out."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cifar_lab import dataset
from cifar_lab.data import Batches, CIFAR10DataModule
from cifar_lab.dataset import CIFAR10_CLASSES, DataError, load, split, statistics
from cifar_lab.recipe import Recipe

ROOT = Path(__file__).parents[1]
MakeTree = Callable[..., Path]
WAYS_OUT = ("downloaded", "cifar-10-python.tar.gz", "--dataset digits")


def digits(**fields: Any) -> Recipe:
    return Recipe(arch="classic_cnn", dataset="digits", **fields)


def tree(root: Path, **fields: Any) -> Recipe:
    return Recipe(arch="classic_cnn", **{"dataset": "folder", "data_dir": str(root), **fields})


def module(recipe: Recipe) -> CIFAR10DataModule:
    made = CIFAR10DataModule(recipe)
    made.setup("fit")
    return made


def served(batches: Batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


# The split


def test_the_split_is_stratified_disjoint_and_complete() -> None:
    labels = load(digits(), "train").labels
    train, validation = split(labels, digits())
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(1437))
    assert len(validation) == 144
    of_all, of_validation = torch.bincount(labels), torch.bincount(labels[validation])
    assert float((of_validation - of_all * 0.1).abs().max()) < 1


def test_the_split_is_the_same_in_another_process() -> None:
    code = (
        "from cifar_lab.dataset import load, split; from cifar_lab.recipe import Recipe;"
        "r = Recipe(arch='classic_cnn', dataset='digits', limit_train=200);"
        "print([part.tolist() for part in split(load(r, 'train').labels, r)])"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    recipe = digits(limit_train=200, seed=99)
    assert told.stdout.strip() == str([part.tolist() for part in split(load(recipe, "train").labels, recipe)])


def test_the_split_has_a_seed_of_its_own() -> None:
    labels = load(digits(), "train").labels
    assert torch.equal(split(labels, digits(seed=0))[1], split(labels, digits(seed=1))[1])
    assert not torch.equal(split(labels, digits())[1], split(labels, digits(split_seed=1))[1])


def test_limit_train_is_stratified_and_leaves_validation_whole() -> None:
    labels = load(digits(), "train").labels
    whole, validation = split(labels, digits())
    few, same = split(labels, digits(limit_train=300))
    assert torch.equal(validation, same) and set(few.tolist()) < set(whole.tolist())
    assert len(few) == 300
    expected = torch.bincount(labels[whole]) * 300 / len(whole)
    assert float((torch.bincount(labels[few]) - expected).abs().max()) <= 1


def test_limit_train_may_be_all_there_are() -> None:
    assert len(split(load(digits(), "train").labels, digits(limit_train=1293))[0]) == 1293


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"limit_train": 1294}, "limit_train: 1294. Legal: 10, one a class, to 1293"),
        ({"limit_train": 5}, "limit_train: 5. Legal: 10, one a class, to 1293"),
        ({"val_fraction": 0.001}, "val_fraction: 0.001 cannot be drawn"),
        ({"val_fraction": 0.9999}, "val_fraction: 0.9999 cannot be drawn"),
    ],
)
def test_a_split_that_leaves_a_class_empty_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError) as caught:
        CIFAR10DataModule(digits(**fields))
    assert named in str(caught.value)


def test_without_validation_all_images_train() -> None:
    labels = load(digits(), "train").labels
    train, validation = split(labels, digits(val_fraction=0))
    assert train.tolist() == list(range(1437)) and validation.tolist() == []
    few, _ = split(labels, digits(val_fraction=0, limit_train=300))
    assert len(few) == 300
    with pytest.raises(DataError, match=r"limit_train: 1438\. Legal: 10, one a class, to 1437, the training set"):
        split(labels, digits(val_fraction=0, limit_train=1438))


def test_a_smaller_limit_is_part_of_a_larger_one() -> None:
    labels = load(digits(), "train").labels
    few, more = (set(split(labels, digits(limit_train=n))[0].tolist()) for n in (100, 700))
    assert few < more


@pytest.mark.parametrize("few", [10, 11, 12, 1290, 1292])
def test_every_limit_that_leaves_each_class_an_image_is_possible(few: int) -> None:
    train, _ = split(load(digits(), "train").labels, digits(limit_train=few))
    assert len(train) == few


# Statistics


def test_statistics_are_of_the_training_images_alone() -> None:
    made = CIFAR10DataModule(digits(limit_train=200))
    pixels = made.set.images[made.train_indices].numpy() / 255
    np.testing.assert_allclose(made.mean, pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(made.std, pixels.std((0, 2, 3)), rtol=1e-6)


def test_normalize_half_and_none_look_at_no_image() -> None:
    moments = torch.zeros(3, 2, 3, dtype=torch.int64)
    assert [part.tolist() for part in statistics(moments, "half")] == [[0.5] * 3, [0.5] * 3]
    assert [part.tolist() for part in statistics(moments, "none")] == [[0.0] * 3, [1.0] * 3]


def test_a_channel_that_never_varies_is_not_divided_by_zero() -> None:
    moments = torch.tensor([[[7 * 1024] * 3, [49 * 1024] * 3]])
    mean, std = statistics(moments, "train")
    torch.testing.assert_close(mean, torch.full((3,), 7 / 255))
    assert std.tolist() == [1.0] * 3


# Batches


def test_validation_images_are_never_augmented() -> None:
    made = module(digits(crop=16, rotate=180.0, cutout=32, flip="random"))
    images, labels = served(made.val_dataloader())
    assert torch.equal(images, made.set.images[made.val_indices])
    assert torch.equal(labels, made.set.labels[made.val_indices])


def test_training_images_are_augmented_unless_told_otherwise() -> None:
    for augment in (True, False):
        made = module(digits(augment=augment, limit_train=200))
        images, _ = served(made.train_dataloader())
        known = {image.numpy().tobytes() for image in made.set.images[made.train_indices]}
        assert all(image.numpy().tobytes() in known for image in images) is not augment


@pytest.mark.parametrize("size", [7, 143, 144, 500])
def test_every_validation_image_is_served_once_though_the_batch_does_not_divide(size: int) -> None:
    made = module(digits())
    batches = Batches(made.images, made.labels, made.val_indices, size)
    images, labels = served(batches)
    assert torch.equal(images, made.images[made.val_indices]) and torch.equal(labels, made.labels[made.val_indices])
    assert len(batches) == len(list(batches)) == -(-144 // size)


def order(recipe: Recipe, epoch: int) -> list[int]:
    made = module(recipe)
    n = len(made.set)
    marked = torch.arange(n)[:, None, None, None].expand(-1, 3, 32, 32)
    batches = Batches(marked, made.labels, made.train_indices, recipe.batch_size, seed=recipe.seed, epoch=lambda: epoch)
    return [int(i) for i in served(batches)[0][:, 0, 0, 0]]


def test_a_train_epoch_is_a_permutation_and_a_function_of_seed_and_epoch() -> None:
    recipe = digits(limit_train=200, batch_size=60)
    first = order(recipe, 0)
    assert sorted(first) == module(recipe).train_indices.tolist() != first
    assert order(recipe, 0) == first
    assert order(recipe, 1) != first
    assert order(recipe.replace(seed=1), 0) != first
    assert order(recipe.replace(seed=1), 0) != order(recipe, 1)


def test_an_epoch_does_not_depend_on_the_global_generator() -> None:
    made = module(digits(limit_train=100))
    torch.manual_seed(0)
    one = served(made.train_dataloader())
    torch.manual_seed(1)
    other = served(made.train_dataloader())
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_only_a_lone_last_training_image_is_left_out() -> None:
    images, labels = torch.zeros(21, 3, 32, 32, dtype=torch.uint8), torch.zeros(21, dtype=torch.int64)
    for size, expected in ((10, 20), (20, 20), (7, 21), (21, 21), (64, 21)):
        batches = Batches(images, labels, torch.arange(21), size, seed=0)
        assert sum(len(y) for _, y in batches) == expected and len(batches) == len(list(batches))


# The cache


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoder(*_: Any) -> NoReturn:
        raise AssertionError("decoded again")

    monkeypatch.setattr(dataset, "_digits", decoder)
    monkeypatch.setattr(dataset, "read_image", decoder)
    monkeypatch.setattr("torchvision.datasets.CIFAR10.__init__", decoder)


def test_a_second_load_decodes_nothing(make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [digits(), tree(make_tree())]
    before = [load(recipe, "train") for recipe in recipes]
    poison(monkeypatch)
    for recipe, was in zip(recipes, before, strict=True):
        now = load(recipe, "train")
        assert (
            torch.equal(now.images, was.images) and torch.equal(now.labels, was.labels) and now.classes == was.classes
        )


def test_a_touched_file_is_decoded_again(make_tree: MakeTree) -> None:
    root = make_tree()
    before = load(tree(root), "train").images.clone()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(root / "train" / "apple" / "000.png")
    after = load(tree(root), "train").images
    assert after[0, :, 0, 0].tolist() == [1, 2, 3] and torch.equal(after[1:], before[1:])


def test_an_added_or_renamed_file_is_decoded_again(make_tree: MakeTree) -> None:
    root = make_tree()
    assert len(load(tree(root), "train")) == 20
    shutil.copy(root / "train" / "apple" / "000.png", root / "train" / "apple" / "new.png")
    assert len(load(tree(root), "train")) == 21


def test_what_was_decoded_otherwise_is_decoded_again(make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tree(make_tree())
    load(recipe, "train")
    monkeypatch.setattr(dataset, "READING", b"another")
    poison(monkeypatch)
    with pytest.raises(AssertionError, match="decoded again"):
        load(recipe, "train")


def test_nothing_is_written_in_the_data_folder(make_tree: MakeTree) -> None:
    root = make_tree()
    before = sorted(root.rglob("*"))
    module(tree(root))
    load(tree(root), "test")
    assert sorted(root.rglob("*")) == before


def test_a_killed_decode_leaves_nothing_that_looks_whole(
    make_tree: MakeTree, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tree(make_tree())
    with monkeypatch.context() as patch:
        patch.setattr("json.dumps", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load(recipe, "train")
    assert not [entry for entry in fresh_cache.iterdir() if entry.is_dir()]
    assert len(load(recipe, "train")) == 20


def test_what_is_loaded_cannot_change_the_cache(make_tree: MakeTree) -> None:
    recipe = tree(make_tree())
    images = load(recipe, "train").images
    images.zero_()
    assert load(recipe, "train").images.any()


def eight_at_once(wants: Callable[..., int], *words: Any) -> list[int]:
    """What eight processes get that want their images at the same moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cifar_lab.data", "torchvision.datasets"])
    with context.Pool(8) as pool:
        return pool.starmap(wants, [(number, *words) for number in range(8)], chunksize=1)


def _wants_a_tree(number: int, root: str, cache: str, notes: str) -> int:
    os.environ["XDG_CACHE_HOME"] = cache  # a forkserver's environment is that of its first test
    dataset.read_image = noting(dataset.read_image, notes, "decoded")
    return len(load(tree(Path(root)), "train"))


def _wants_a_download(number: int, archive: str, md5s: dict[str, str], cache: str, notes: str) -> int:
    from torchvision import datasets

    os.environ["XDG_CACHE_HOME"] = cache

    class Small(datasets.CIFAR10):
        tgz_md5 = md5s["archive"]
        train_list, test_list = [["data_batch_1", md5s["data_batch_1"]]], [["test_batch", md5s["test_batch"]]]
        meta = {"filename": "batches.meta", "key": "label_names", "md5": md5s["batches.meta"]}

    datasets.CIFAR10 = noting(Small, notes, "decoded")
    datasets.CIFAR10.filename, datasets.CIFAR10.base_folder = Small.filename, Small.base_folder
    download = noting(lambda url, place: shutil.copy(archive, place), notes, "downloaded")
    datasets.utils._get_redirect_url, datasets.utils._urlretrieve = lambda url, **_: url, download
    return len(load(Recipe(arch="classic_cnn"), "test" if number % 2 else "train"))


def noting(plain: Callable[..., Any], notes: str, word: str) -> Any:
    def noted(*words: Any, **named: Any) -> Any:
        with open(notes, "a") as file:
            file.write(f"{word}\n")
        return plain(*words, **named)

    return noted


def test_eight_processes_that_load_at_once_decode_once(make_tree: MakeTree, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    assert eight_at_once(_wants_a_tree, str(make_tree()), str(tmp_path / "cache"), str(notes)) == [20] * 8
    assert notes.read_text().splitlines() == ["decoded"] * 20


def test_eight_processes_that_load_at_once_download_once(tmp_path: Path) -> None:
    place, notes = tmp_path / "cifar-10-batches-py", tmp_path / "notes"
    place.mkdir()
    for name, count in (("data_batch_1", 20), ("test_batch", 10)):
        content = {"data": np.zeros((count, 3072), np.uint8), "labels": [i % 10 for i in range(count)]}
        (place / name).write_bytes(pickle.dumps(content))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(place, place.name)
    files = {"archive": tmp_path / "cifar-10-python.tar.gz", **{file.name: file for file in place.iterdir()}}
    md5s = {name: hashlib.md5(file.read_bytes()).hexdigest() for name, file in files.items()}
    got = eight_at_once(_wants_a_download, str(files["archive"]), md5s, str(tmp_path / "cache"), str(notes))
    assert got == [20, 10] * 4
    assert Counter(notes.read_text().splitlines()) == {"downloaded": 1, "decoded": 2}, "each part is decoded once"


def test_a_damaged_cache_is_named_and_its_removal_suggested(fresh_cache: Path) -> None:
    load(digits(), "train")
    (place,) = fresh_cache.glob("digits-train-*/images.npy")
    place.write_bytes(place.read_bytes()[:1000])
    with pytest.raises(DataError, match="Delete that folder") as caught:
        load(digits(), "train")
    assert str(place.parent) in str(caught.value)


# The sets


def test_digits_are_1437_and_360_stratified() -> None:
    train, test = load(digits(), "train"), load(digits(), "test")
    assert train.images.shape == (1437, 3, 32, 32) and test.images.shape == (360, 3, 32, 32)
    assert train.images.dtype == torch.uint8 and train.classes == test.classes == tuple("0123456789")
    share = torch.bincount(train.labels) / torch.bincount(test.labels)
    assert float((share - 1437 / 360).abs().max()) < 0.15
    assert not {i.numpy().tobytes() for i in train.images} & {i.numpy().tobytes() for i in test.images}


def test_a_folder_may_have_any_classes_and_sizes(make_tree: MakeTree) -> None:
    root = make_tree(("Ä pple", "zebra", "b"), size=50)
    (root / "train" / "b" / "notes.txt").write_text("no image")
    Image.new("L", (8, 70), 77).save(root / "train" / "b" / "gray.png")
    images = load(tree(root), "train")
    assert images.classes == tuple(sorted(("Ä pple", "zebra", "b"))) and images.images.shape == (31, 3, 32, 32)
    assert torch.bincount(images.labels).tolist() == [11 if name == "b" else 10 for name in images.classes]
    assert set(images.images[10].flatten().tolist()) == {77}


def test_a_32x32_folder_is_read_pixel_by_pixel(make_tree: MakeTree) -> None:
    root = make_tree()
    first = np.asarray(Image.open(root / "train" / "apple" / "000.png"))
    assert np.array_equal(load(tree(root), "train").images[0].numpy(), first.transpose(2, 0, 1))


def test_the_environment_names_the_folder_and_the_flag_wins(
    make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_tree()
    monkeypatch.setenv("CIFAR_LAB_DATA", str(root))
    assert len(load(tree(root, data_dir=None), "train")) == 20
    monkeypatch.setenv("CIFAR_LAB_DATA", "/nowhere")
    assert len(load(tree(root), "train")) == 20


# Errors: each a DataError that quotes the place


def refusal(recipe: Recipe, part: dataset.Part = "train") -> str:
    with pytest.raises(DataError) as caught:
        load(recipe, part)
    return str(caught.value)


@pytest.mark.parametrize("dataset", ["cifar10", "folder"])
def test_an_absent_folder_is_refused_with_the_ways_out(dataset: str, tmp_path: Path) -> None:
    for place in (tmp_path / "absent", tmp_path):
        text = refusal(tree(place, dataset=dataset))
        assert str(place) in text and "--data_dir" in text and all(way in text for way in WAYS_OUT)


def test_the_environment_is_named_when_it_is_at_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_LAB_DATA", str(tmp_path / "absent"))
    assert refusal(Recipe()).startswith("CIFAR_LAB_DATA: ")


def test_a_folder_without_a_place_is_refused() -> None:
    text = refusal(Recipe(dataset="folder"))
    assert "--data_dir" in text and all(way in text for way in WAYS_OUT)


def test_a_tree_without_its_test_part_is_refused(make_tree: MakeTree) -> None:
    root = make_tree()
    shutil.rmtree(root / "test")
    assert str(root) in refusal(tree(root), "test")


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_a_corrupt_image_is_named(make_tree: MakeTree, content: bytes) -> None:
    file = make_tree() / "train" / "pear" / "003.png"
    file.write_bytes(content)
    text = refusal(tree(file.parents[2]))
    assert str(file) in text and "Mend or remove it" in text


def test_a_truncated_image_is_named(make_tree: MakeTree) -> None:
    file = make_tree() / "train" / "pear" / "003.png"
    file.write_bytes(file.read_bytes()[:-1500])
    assert str(file) in refusal(tree(file.parents[2]))


def test_a_corrupt_image_leaves_no_cache(make_tree: MakeTree, fresh_cache: Path) -> None:
    file = make_tree() / "train" / "pear" / "003.png"
    whole = file.read_bytes()
    file.write_bytes(b"x")
    refusal(tree(file.parents[2]))
    assert not [entry for entry in fresh_cache.iterdir() if entry.is_dir()]
    file.write_bytes(whole)
    assert len(load(tree(file.parents[2]), "train")) == 20


def test_cifar10_wants_its_own_class_names(make_tree: MakeTree) -> None:
    root = make_tree()
    text = refusal(tree(root, dataset="cifar10"))
    assert str(root / "train") in text and "apple, pear" in text and "--dataset folder" in text
    assert all(name in text for name in CIFAR10_CLASSES)


def test_cifar10_wants_32x32(make_tree: MakeTree) -> None:
    root = make_tree(CIFAR10_CLASSES, count=1, size=33)
    text = refusal(tree(root, dataset="cifar10"))
    assert str(root / "train" / "airplane" / "000.png") in text and "33x33" in text and "--dataset folder" in text


def test_an_empty_class_is_named(make_tree: MakeTree) -> None:
    root = make_tree()
    (root / "train" / "quince").mkdir()
    text = refusal(tree(root))
    assert str(root / "train" / "quince") in text and ".png" in text


def test_one_class_is_too_few(make_tree: MakeTree) -> None:
    assert "at least 2" in refusal(tree(make_tree(("alone",))))


def test_a_class_of_one_image_cannot_be_split(make_tree: MakeTree) -> None:
    with pytest.raises(DataError, match="val_fraction"):
        CIFAR10DataModule(tree(make_tree(count=1)))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "XDG_CACHE_HOME" in refusal(digits())


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every address that torchvision asks for; none is answered."""
    asked: list[str] = []

    def refuse(request: Any, *_: Any, **__: Any) -> NoReturn:
        asked.append(getattr(request, "full_url", request))
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return asked


def test_an_archive_with_a_wrong_md5_is_refused_and_not_replaced(
    tmp_path: Path, fresh_cache: Path, no_network: list[str]
) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(__file__, "cifar-10-batches-py/data_batch_1")
    before = (folder / "cifar-10-python.tar.gz").read_bytes()
    text = refusal(tree(folder, dataset="cifar10"))
    assert str(folder) in text and all(way in text for way in WAYS_OUT)
    assert [entry.name for entry in folder.iterdir()] == ["cifar-10-python.tar.gz"]
    assert (folder / "cifar-10-python.tar.gz").read_bytes() == before
    assert no_network == [], "who names a folder is never given images from elsewhere"


def test_unpacked_batches_with_a_wrong_md5_are_refused(tmp_path: Path, no_network: list[str]) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"x")
    text = refusal(tree(tmp_path, dataset="cifar10"))
    assert str(tmp_path) in text and all(way in text for way in WAYS_OUT)
    assert no_network == []


def test_a_failed_download_names_the_ways_out(fresh_cache: Path, no_network: list[str]) -> None:
    text = refusal(Recipe())
    assert no_network and all(way in text for way in WAYS_OUT)


# The real CIFAR-10


@pytest.fixture(scope="session")
def cifar10(cifar10_folder: str) -> Recipe:
    return Recipe(dataset="cifar10", data_dir=cifar10_folder)


def test_cifar10_has_the_published_sizes_and_statistics(cifar10: Recipe) -> None:
    made = CIFAR10DataModule(cifar10)
    assert len(made.set) == 50_000 and len(made.train_indices) == 45_000 and made.classes == CIFAR10_CLASSES
    np.testing.assert_allclose(made.mean, (0.4914, 0.4822, 0.4465), atol=1e-3)
    np.testing.assert_allclose(made.std, (0.2470, 0.2435, 0.2616), atol=1e-3)
    mean, std = statistics(made.set.moments, "train")
    np.testing.assert_allclose(mean, (0.49140, 0.48216, 0.44653), atol=5e-5)
    np.testing.assert_allclose(std, (0.24703, 0.24349, 0.26159), atol=5e-5)
    assert torch.bincount(made.set.labels[made.val_indices]).tolist() == [500] * 10


def test_cifar10_has_10000_test_images(cifar10: Recipe) -> None:
    assert torch.bincount(load(cifar10, "test").labels).tolist() == [1000] * 10


def test_a_memory_mapped_load_costs_little_private_memory(cifar10: Recipe) -> None:
    # Anonymous, not Private_Dirty: the latter counts the page cache of a file that was written a moment ago.
    load(cifar10, "train")
    code = (
        "import re, sys, torch; from cifar_lab.dataset import load; from cifar_lab.recipe import Recipe;"
        "private = lambda: int(re.search(r'Anonymous: +(\\d+)', open('/proc/self/smaps_rollup').read())[1]);"
        "load(Recipe(dataset='digits'), 'train'); r = Recipe(dataset='cifar10', data_dir=sys.argv[1]);"
        "before = private(); s = load(r, 'train'); s.images.view(-1)[::4096].sum(); print(private() - before)"
    )
    command = [sys.executable, "-c", code, str(cifar10.data_dir)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert int(told.stdout) < 20_000


# What a network may see before it starts


@pytest.mark.parametrize(("limit", "n"), [(None, 512), (100, 100)])
def test_the_sample_is_of_normalised_training_images(limit: int | None, n: int) -> None:
    made = CIFAR10DataModule(digits(limit_train=limit))
    sample = made.sample()
    assert sample.shape == (n, 3, 32, 32) and torch.equal(sample, made.sample())
    pixels = (sample * made.std[:, None, None] + made.mean[:, None, None]) * 255
    known = {image.numpy().tobytes() for image in made.set.images[made.train_indices]}
    assert {image.round().byte().numpy().tobytes() for image in pixels} <= known
    assert float(sample.mean()) == pytest.approx(0, abs=0.05) and float(sample.std()) == pytest.approx(1, abs=0.05)


def test_the_sample_holds_every_class_of_an_ordered_set(make_tree: MakeTree) -> None:
    root = make_tree(("apple", "pear", "plum"), count=300)
    made = CIFAR10DataModule(tree(root))
    images = {
        image.numpy().tobytes(): int(label) for image, label in zip(made.set.images, made.set.labels, strict=True)
    }
    pixels = (made.sample() * made.std[:, None, None] + made.mean[:, None, None]) * 255
    labels = [images[image.round().byte().numpy().tobytes()] for image in pixels]
    assert min(np.bincount(labels, minlength=3)) > 100


# Folds


@pytest.mark.parametrize(("folds", "limit"), [(2, None), (3, None), (5, 333), (3, 100)])
def test_over_all_folds_every_image_validates_exactly_once(folds: int, limit: int | None) -> None:
    labels = load(digits(), "train").labels
    parts = [split(labels, digits(folds=folds, fold=i, limit_train=limit)) for i in range(folds)]
    validated = sorted(i for _, validation in parts for i in validation.tolist())
    assert len(validated) == (limit or 1437) == len(set(validated)), "limit_train counts the images of all parts"
    if limit is None:
        assert validated == list(range(1437))
    counts = torch.stack([torch.bincount(labels[validation], minlength=10) for _, validation in parts])
    assert int((counts.max(0).values - counts.min(0).values).max()) <= 1, "stratified"
    assert int(counts.sum(1).max() - counts.sum(1).min()) <= 10
    for train, validation in parts:
        assert not set(train.tolist()) & set(validation.tolist())
        assert sorted([*train.tolist(), *validation.tolist()]) == validated


def test_folds_are_drawn_by_the_split_seed_alone() -> None:
    labels = load(digits(), "train").labels

    def validation(**fields: Any) -> list[int]:
        return split(labels, digits(folds=3, **fields))[1].tolist()

    assert validation() == validation(seed=5, lr=0.5) != validation(split_seed=1)
    assert validation(fold=1) != validation(fold=2)


def test_a_folds_statistics_are_those_of_its_training_images() -> None:
    one, other = (module(digits(folds=3, fold=i)) for i in (0, 1))
    pixels = one.set.images[one.train_indices].double() / 255
    torch.testing.assert_close(one.mean, pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(one.std, pixels.std((0, 2, 3), unbiased=False).float())
    assert not torch.equal(one.mean, other.mean)


def test_more_folds_than_a_class_has_images_are_refused() -> None:
    labels = torch.tensor([0] * 9 + [1] * 4)
    assert len(split(labels, digits(folds=4, fold=3))[1]) == 3
    with pytest.raises(DataError, match=r"folds: 5\. Legal: 2 to 4, the images of the smallest class"):
        split(labels, digits(folds=5))
    with pytest.raises(DataError, match=r"limit_train: 14\. Legal: 2, one a class, to 13, the training set"):
        split(labels, digits(folds=2, limit_train=14))


def test_nothing_of_a_batch_lies_elsewhere_than_the_images() -> None:
    module = CIFAR10DataModule(Recipe(arch="classic_cnn", dataset="digits", augment=True, cutout=8))
    module.images, module.labels = module.set.images.to("meta"), module.set.labels.to("meta")  # any device but the CPU
    batches = module.train_dataloader()
    used = (batches.images, batches.labels, batches.indices, batches.augmentation.fill)
    assert {tensor.device.type for tensor in used} == {"meta"}
