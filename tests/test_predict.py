"""Predictions: any image is read as training reads it, answered as evaluation answers it, and explained."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cifar_lab import cli, dataset, predict
from cifar_lab.checkpoint import CheckpointError
from cifar_lab.evaluate import evaluate
from cifar_lab.fit import restore
from cifar_lab.models import ARCHITECTURES
from cifar_lab.predict import gradcam, heat_map, main, occlusion
from cifar_lab.recipe import InputError, Recipe

MakeCheckpoint = Callable[..., Path]
NOISE = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
DIGITS = tuple("0123456789")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A readable image, wider than high."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(tmp_path / "good.png")
    return tmp_path / "good.png"


# What is answered


@pytest.mark.parametrize("fields", [{}, {"ema": 0.5}, {"precision": "bf16"}], ids=str)
def test_the_probabilities_are_those_that_evaluate_writes(
    fields: dict[str, Any], make_checkpoint: MakeCheckpoint, make_tree: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_tree(count=4, size=45)
    Image.new("RGBA", (20, 64), (200, 0, 0, 90)).save(root / "test" / "pear" / "tall.png")
    Image.fromarray(np.arange(0, 60_000, 60, dtype=np.uint16).reshape(20, 50)).save(root / "test" / "pear" / "deep.png")
    checkpoint = make_checkpoint(dataset="folder", data_dir=str(root), **fields)
    evaluate(checkpoint).write(tmp_path)
    written = pd.read_csv(tmp_path / "test_predictions.csv")[["p0", "p1"]].to_numpy()
    answers = predict.predict(checkpoint, [root / "test" / "apple", root / "test" / "pear"])
    assert len(answers) == 10 and written.std() > 1e-3
    assert np.array_equal(np.stack([answer.probabilities for answer in answers]).astype(float), written)


def test_the_most_probable_classes_come_first_at_most_five(make_checkpoint: MakeCheckpoint, image: Path) -> None:
    (answer,) = predict.predict(make_checkpoint(classes=DIGITS), image)
    top = answer.top()
    assert len(top) == 5 and [p for _, p in top] == sorted(answer.probabilities.tolist(), reverse=True)[:5]
    assert top[0][0] == DIGITS[answer.probabilities.argmax()]
    assert len(predict.predict(make_checkpoint(), [str(image)])[0].top()) == 2


def test_what_is_printed_fits_80_columns(
    make_checkpoint: MakeCheckpoint, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(classes=DIGITS)
    monkeypatch.chdir(image.parent)
    assert main([str(checkpoint), image.name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "good.png" and len(lines) == 6 and max(map(len, lines)) <= 80
    name, probability = predict.predict(checkpoint, image)[0].top(1)[0]
    assert lines[1].split() == [f"{probability:.1%}", name]
    assert main([str(checkpoint), image.name, "--quiet"]) == 0
    assert capsys.readouterr().out == f"{name}\tgood.png\n"


def test_json_is_alone_and_says_who_answered(
    make_checkpoint: MakeCheckpoint, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint()
    assert main([str(checkpoint), str(image), "/nowhere.png", "--json"]) == 1
    said = capsys.readouterr()
    assert said.err == ""
    told = json.loads(said.out)
    assert set(told) == {"model", "images"}
    who = told["model"]
    assert who["checkpoint"] == str(checkpoint) and who["arch"] == "classic_cnn" and who["dataset"] == "digits"
    assert len(who["sha256"]) == 64 and "torch" in who["versions"] and who["classes"] == ["apple", "pear"]
    assert Recipe(**who["recipe"]) == restore(checkpoint).recipe
    good, absent = told["images"]
    assert good["image"] == str(image) and [set(entry) for entry in good["top"]] == [{"class", "probability"}] * 2
    assert good["top"][0]["probability"] == pytest.approx(predict.predict(checkpoint, image)[0].top()[0][1], abs=1e-12)
    assert absent == {
        "image": "/nowhere.png",
        "error": "/nowhere.png is not a readable image (No such file or directory).",
    }


# What is read


def gray(value: int) -> tuple[int, int, int]:
    return value, value, value


@pytest.mark.parametrize(
    ("drawn", "ending", "seen"),
    [
        (Image.new("L", (9, 70), 77), "png", gray(77)),
        (Image.new("1", (40, 40), 1), "png", gray(255)),
        (Image.new("LA", (40, 40), (10, 255)), "png", gray(10)),
        (Image.new("RGBA", (40, 40), (200, 10, 10, 0)), "png", gray(255)),
        (Image.new("RGBA", (40, 40), (0, 0, 0, 51)), "webp", gray(204)),
        (Image.new("P", (40, 40), 3), "png", (9, 10, 11)),
        (Image.new("CMYK", (40, 40), (255, 0, 0, 0)), "tif", (0, 255, 255)),
        (Image.fromarray(np.full((40, 40), 0x8012, np.uint16)), "png", gray(0x80)),
        (Image.fromarray(np.full((40, 40), 0x8012, np.uint16)), "tif", gray(0x80)),
        (Image.fromarray(np.full((40, 40), 0x8012, np.int32)), "tif", gray(0x80)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_every_mode_becomes_rgb_on_white(
    drawn: Image.Image, ending: str, seen: tuple[int, int, int], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    if drawn.mode == "P":
        drawn.putpalette(list(range(48)))
    drawn.save(tmp_path / f"a.{ending}", **({"lossless": True} if ending == "webp" else {}))
    (answer,) = predict.predict(make_checkpoint(), tmp_path / f"a.{ending}")
    assert answer.error is None and answer.pixels.shape == (3, 32, 32) and answer.pixels.dtype == np.uint8
    assert np.array_equal(answer.pixels, np.broadcast_to(np.array(seen, np.uint8)[:, None, None], (3, 32, 32)))


def test_a_transparent_color_of_a_palette_is_white(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    drawn = Image.new("P", (40, 40), 3)
    drawn.putpalette(list(range(48)))
    drawn.save(tmp_path / "a.gif", transparency=3)
    assert (predict.predict(make_checkpoint(), tmp_path / "a.gif")[0].pixels == 255).all()


def test_an_image_is_turned_upright_as_its_exif_says(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    lying = Image.new("RGB", (64, 64))
    lying.paste((255, 255, 255), (0, 0, 32, 64))  # the left half becomes the upper one
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "a.png", exif=exif)
    seen = predict.predict(make_checkpoint(), tmp_path / "a.png")[0].pixels
    assert (seen[:, :15] == 255).all() and (seen[:, 17:] == 0).all()


def test_an_image_that_is_not_square_is_squeezed_not_cropped(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    wide = Image.new("RGB", (320, 20))
    wide.paste((255, 255, 255), (300, 0, 320, 20))
    wide.save(tmp_path / "a.png")
    seen = predict.predict(make_checkpoint(), tmp_path / "a.png")[0].pixels
    assert (seen[:, :, 31] == 255).all() and (seen[:, :, :29] == 0).all()


def test_an_image_of_32x32_is_read_pixel_by_pixel(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    Image.fromarray(NOISE.numpy().transpose(1, 2, 0)).save(tmp_path / "a.png")
    assert np.array_equal(predict.predict(make_checkpoint(), tmp_path / "a.png")[0].pixels, NOISE.numpy())


def test_a_folder_stands_for_its_images_sorted(
    make_checkpoint: MakeCheckpoint, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image.parent / "some"
    folder.mkdir()
    for name in ("b.PNG", "a.png"):
        (folder / name).write_bytes(image.read_bytes())
    (folder / "notes.txt").write_text("no image")
    assert main([str(make_checkpoint()), str(image), str(folder), "--quiet"]) == 0
    read = [line.partition("\t")[2] for line in capsys.readouterr().out.splitlines()]
    assert read == [str(image), str(folder / "a.png"), str(folder / "b.PNG")]


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(9))):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png


def test_what_cannot_be_read_is_a_line_each_and_stops_nothing(
    make_checkpoint: MakeCheckpoint, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image.parent / "bad"
    folder.mkdir()
    os.mkfifo(folder / "fifo.png")
    pipe = os.open(folder / "fifo.png", os.O_RDWR)  # so that who reads it anyway does not wait forever
    os.write(pipe, b"no image")
    (folder / "empty").mkdir()
    (folder / "garbage.png").write_bytes(os.urandom(500))
    (folder / "zero.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(image.read_bytes()[:-1000])
    (folder / "bomb.png").write_bytes(bomb())
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "float.tif")
    Image.new("RGB", (8, 8)).save(folder / "program.eps")
    said = {
        "absent.png": "No such file",
        "fifo.png": "neither a file nor a folder with images",
        "empty": "neither a file nor a folder with images",
        "garbage.png": "no known format",
        "zero.png": "no known format",
        "cut.png": "",
        "bomb.png": "decompression bomb",
        "float.tif": "floating-point",
        "program.eps": "no known format",
        "x" * 300: "File name too long",
    }
    assert main([str(make_checkpoint()), *(str(folder / name) for name in said), str(image), "--quiet"]) == 1
    os.close(pipe)
    told = capsys.readouterr()
    assert told.out.partition("\t")[2] == f"{image}\n"
    lines = told.err.splitlines()
    for (name, reason), line in zip(said.items(), lines, strict=True):
        assert line.startswith(f"error: {folder / name} is not a readable image (") and reason in line


def test_an_image_that_is_merely_large_is_read(
    make_checkpoint: MakeCheckpoint, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns above it, and refuses above twice as many
    assert predict.predict(make_checkpoint(), image)[0].error is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    assert "exceeds limit" in str(predict.predict(make_checkpoint(), image)[0].error)


def test_names_that_are_no_text_are_printed_on_one_line(
    make_checkpoint: MakeCheckpoint, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = os.fsdecode(os.fsencode(image.parent) + b"/a\n\x1b[31m\xff.png")
    Path(strange).write_bytes(image.read_bytes())
    assert main([str(make_checkpoint(classes=("a\nb", "\x1b[2J"))), strange]) == 0
    said = capsys.readouterr().out.encode()
    assert len(said.splitlines()) == 3 and b"\x1b" not in said
    assert main([str(make_checkpoint()), strange, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["image"] == strange


# What is refused


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended, cli.exit_status():
        main(words)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.startswith("error:")
    return " ".join(said.err.split())


def test_a_checkpoint_that_is_none_is_refused(
    make_checkpoint: MakeCheckpoint, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such checkpoint" in refused([str(tmp_path / "absent.ckpt"), str(image)], capsys)
    assert "is no checkpoint of cifar_lab" in refused([str(image), str(image)], capsys)
    assert "is no checkpoint of cifar_lab" in refused([str(tmp_path), str(image)], capsys)
    content = torch.load(make_checkpoint(), weights_only=True)
    header, weights = content["hyper_parameters"], content["state_dict"]
    changed = {
        "Missing key": (header, {}),
        "size mismatch": ({**header, "classes": ["one"]}, weights),
        "missing 1 required positional argument: 'classes'": ({"recipe": header["recipe"], "mean": [], "std": []}, {}),
        "arch: 'os'": ({**header, "recipe": {**header["recipe"], "arch": "os"}}, weights),
        "lr: -1": ({**header, "recipe": {**header["recipe"], "lr": -1}}, weights),
        "had diverged": (header, {name: value * torch.nan for name, value in weights.items()}),
    }
    for said, (parameters, state) in changed.items():
        torch.save({"hyper_parameters": parameters, "state_dict": state}, tmp_path / "b.ckpt")
        assert said in refused([str(tmp_path / "b.ckpt"), str(image)], capsys)


def test_a_malicious_checkpoint_runs_nothing(trap: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no checkpoint of cifar_lab" in refused([str(trap), str(image)], capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--map gradcam", "--map and --output belong together"),
        ("--output maps", "--map and --output belong together"),
        ("--map saliency --output maps", "'saliency' (choose from"),
        ("--map gradcam --output /proc/nowhere", "output: '/proc/nowhere' cannot be written"),
        ("--json --quiet", "not allowed with"),
        ("--jsn", "did you mean --json?"),
    ],
)
def test_impossible_words_are_refused(
    words: str, said: str, make_checkpoint: MakeCheckpoint, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused([str(make_checkpoint()), str(image), *words.split()], capsys)


# What is explained


def test_occlusion_finds_the_place_that_the_class_depends_on(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bright_there(_: Any, images: torch.Tensor) -> np.ndarray:
        share = (images[:, :, 8:16, 20:28].float().mean((1, 2, 3)) / 255).numpy()
        return np.stack([share, 1 - share], 1)

    monkeypatch.setattr("cifar_lab.evaluate.probabilities", bright_there)
    model, white = restore(make_checkpoint()), torch.full((3, 32, 32), 255, dtype=torch.uint8)
    fall = occlusion(model, white, 0)
    assert fall.shape == (32, 32)
    assert fall.min() == 0 and (fall[:2] == 0).all() and (fall[:, :13] == 0).all() and (fall[24:] == 0).all()
    y, x = np.unravel_index(fall.argmax(), fall.shape)
    assert 8 <= y < 16 and 20 <= x < 28
    # A square right upon the place takes all that the mean color lacks to white.
    assert 0.3 < fall.max() < 1 - (0.5 + 0.4 + 0.3) / 3
    assert np.allclose(occlusion(model, white, 1), -fall)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_can_be_explained(arch: str, make_checkpoint: MakeCheckpoint) -> None:
    model = restore(make_checkpoint(arch=arch, **({"resolution": 64} if arch == "pretrained" else {})))
    heat = gradcam(model, NOISE, 1)
    assert heat.shape == (32, 32) and heat.min() >= 0 and heat.max() in (0, pytest.approx(1))
    assert max(gradcam(model, NOISE, label).std() for label in (0, 1)) > 0.01
    if arch != "pretrained":  # the slowest; occlusion asks of a network no more than its answers
        assert occlusion(model, NOISE, 1).std() > 0


@pytest.mark.parametrize(
    ("arch", "layer"),
    [
        ("classic_cnn", "convolutions.4"),  # after the activation, before the pooling
        ("wide_cnn", "convolutions.22"),
        ("resnet", "stages"),
        ("nf_resnet", "activation"),
        ("mixed_kernel_cnn", "blocks"),  # all branches, not the last one alone
        ("dynamic_cnn", "segments"),
    ],
)
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_gradcam_weights_the_last_map_by_its_gradient(
    arch: str, layer: str, ema: float, make_checkpoint: MakeCheckpoint
) -> None:
    model = restore(make_checkpoint(arch=arch, ema=ema))
    network: Any = model.averaged.module if model.averaged is not None else model.network
    kept: list[torch.Tensor] = []
    hook = network.get_submodule(layer).register_forward_hook(lambda _, __, out: kept.append(out))
    logits = model(NOISE[None])
    hook.remove()
    kept[0].retain_grad()
    logits[0, 1].backward()
    (features,) = kept[0].detach()
    weights = kept[0].grad[0].mean((1, 2))
    small = torch.einsum("c,chw->hw", weights, features).clamp_min(0)
    large = torch.nn.functional.interpolate(small[None, None], (32, 32), mode="bilinear")[0, 0].numpy()
    np.testing.assert_allclose(gradcam(model, NOISE, 1), large / max(large.max(), 1e-30), atol=1e-4)


def test_a_frozen_network_has_gradients_for_its_map_too(make_checkpoint: MakeCheckpoint) -> None:
    model = restore(make_checkpoint())
    before = gradcam(model, NOISE, 0)
    model.requires_grad_(False)
    assert before.any() and np.array_equal(gradcam(model, NOISE, 0), before)


def test_gradcam_without_places_is_refused_and_nothing_is_written(
    make_checkpoint: MakeCheckpoint, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(make_checkpoint(arch="pretrained")), str(image), "--output", str(tmp_path / "maps")]
    said = refused([*words, "--map", "both"], capsys)
    assert "the last convolution of this pretrained leaves a map of 1x1. Legal: occlusion" in said
    assert not (tmp_path / "maps").exists()


def test_a_map_is_of_the_class_that_was_asked_for(make_checkpoint: MakeCheckpoint, image: Path) -> None:
    checkpoint = make_checkpoint()
    model = restore(checkpoint)
    (answer,) = predict.predict(checkpoint, image)
    seen, best = torch.from_numpy(answer.pixels), int(answer.probabilities.argmax())
    assert np.array_equal(heat_map(checkpoint, image), occlusion(model, seen, best))
    other = model.classes[1 - best]
    assert np.array_equal(heat_map(checkpoint, image, "gradcam", label=other), gradcam(model, seen, 1 - best))
    with pytest.raises(InputError, match=r"label: 'quince'\. Legal: apple, pear"):
        heat_map(checkpoint, image, label="quince")
    with pytest.raises(InputError, match=r"method: 'magic'\. Legal: occlusion, gradcam"):
        heat_map(checkpoint, image, "magic")
    with pytest.raises(dataset.DataError, match="is not a readable image"):
        heat_map(checkpoint, checkpoint)


def test_a_drawing_an_image_and_none_for_the_unreadable(
    make_checkpoint: MakeCheckpoint, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "other" / image.name
    again.parent.mkdir()
    again.write_bytes(image.read_bytes())
    words = [str(make_checkpoint(classes=("$^_$", "$_^$"))), str(image), "/nowhere.png", str(again)]
    assert main([*words, "--map", "both", "--output", str(tmp_path / "maps"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)["images"]
    assert [entry.get("map") and Path(entry["map"]).name for entry in told] == [
        "good-occlusion-gradcam.png", None, "good-occlusion-gradcam-2.png",
    ]  # fmt: skip
    assert sorted(entry["map"] for entry in told if "map" in entry) == sorted(map(str, (tmp_path / "maps").iterdir()))
    for entry in (told[0], told[2]):
        with Image.open(entry["map"]) as drawing:
            assert drawing.width > 2 * drawing.height


def test_a_drawing_that_cannot_be_written_is_an_error_of_its_image_alone(
    make_checkpoint: MakeCheckpoint,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from matplotlib.figure import Figure

    long, unlucky, maps = image.with_name("x" * 250 + ".png"), image.with_name("unlucky.png"), tmp_path / "maps"
    for copy in (long, unlucky):
        copy.write_bytes(image.read_bytes())
    plain = Figure.savefig

    def full_disk(self: Figure, place: Path, **options: Any) -> None:
        plain(self, place, **options)
        if place.name.startswith("unlucky"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    words = [str(make_checkpoint()), str(long), str(unlucky), str(image), "--map", "gradcam", "--output", str(maps)]
    assert main([*words, "--json"]) == 1
    first, second, third = json.loads(capsys.readouterr().out)["images"]
    assert len(first["top"]) == len(second["top"]) == 2 and "map" not in first and "map" not in second
    assert first["error"].endswith("-gradcam.png cannot be written (File name too long).")
    assert second["error"].endswith("unlucky-gradcam.png cannot be written (No space left on device).")
    assert "error" not in third and [str(place) for place in maps.iterdir()] == [third["map"]]
    (maps / "good-gradcam.png").unlink()
    assert main(words) == 1
    told = capsys.readouterr()
    assert [line.split(":")[0] for line in told.err.splitlines()] == ["error", "error"]
    assert f"{long}\n" in told.out and f"{unlucky}\n" in told.out and "good-gradcam.png" in told.out


def test_a_drawing_is_never_overwritten(
    make_checkpoint: MakeCheckpoint, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = image.with_name("another.png")
    other.write_bytes(image.read_bytes())
    words = ["--map", "gradcam", "--output", str(tmp_path / "maps"), "--quiet"]
    assert main([str(make_checkpoint()), str(image), *words]) == 0
    capsys.readouterr()
    there = (tmp_path / "maps" / "good-gradcam.png").read_bytes()
    said = refused([str(make_checkpoint(classes=("plum", "fig"))), str(other), str(image), *words], capsys)
    assert "good-gradcam.png' exists already, and results are never overwritten. Name another folder." in said
    assert (tmp_path / "maps" / "good-gradcam.png").read_bytes() == there and len([*(tmp_path / "maps").iterdir()]) == 1


def test_a_drawing_names_the_class_and_its_probability(make_checkpoint: MakeCheckpoint, image: Path) -> None:
    from cifar_lab import plots

    figure = plots.explained(NOISE.numpy(), {"gradcam": np.zeros((32, 32))}, "a cat, 12.3%")
    assert figure.get_suptitle() == "a cat, 12.3%"
    assert np.array_equal(figure.axes[0].images[0].get_array(), NOISE.numpy().transpose(1, 2, 0))


def test_answers_that_are_no_numbers_are_refused(make_checkpoint: MakeCheckpoint, image: Path) -> None:
    checkpoint = make_checkpoint()
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["network.head.0.bias"].fill_(torch.inf)
    torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match="not numbers"):
        predict.predict(checkpoint, image)
