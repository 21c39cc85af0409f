"""This machine: what it is asked to do for a training."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import look_into_resnets

from cifar_lab import machine
from cifar_lab.classifier import ImageClassifier
from cifar_lab.fit import trainer
from cifar_lab.recipe import Recipe

ROOT = Path(__file__).parents[1]


def large_pages() -> bool:
    """Whether Linux hands out large pages to those who ask, and to no one else."""
    try:
        return "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory as it likes")


@glibc
@pytest.mark.parametrize("addresses", [None, 3 << 30], ids=["any", "fewer than are asked for"])
def test_a_steps_memory_is_there_for_the_next_step(addresses: int | None) -> None:
    code = (
        f"addresses = {addresses}"
        + """
import resource, threading, torch
from cifar_lab.machine import reuse_memory

threading.Thread(target=threading.Event().wait, daemon=True).start()  # with one glibc knows several heaps
if addresses:
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + addresses,) * 2)

def faults():
    counts = []
    for _ in range(16):  # the first steps find the heap's size
        torch.zeros(30 << 20)  # 120 MB
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return counts[-1] - counts[-5]

before = faults()
reuse_memory()
print(before, faults())
"""
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    returned, kept = map(int, told.split())
    assert kept * 20 < returned


@glibc
@pytest.mark.skipif(not large_pages(), reason="this Linux gives no large pages on request")
def test_a_steps_memory_is_in_large_pages() -> None:
    code = """
import re, torch
from cifar_lab.machine import return_memory, reuse_memory

def large():
    return int(re.search(r"AnonHugePages: +(\\d+)", open("/proc/self/smaps_rollup").read())[1]) // 1024

for _ in range(2):  # two trainings in the same process
    reuse_memory()
    before = large()
    kept = [torch.ones(10 << 20) for _ in range(2)]  # 40 MB each
    print(large() - before)
    del kept
    return_memory()
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first, second = map(int, told.split())
    assert first >= 40 and second >= 40, "at least half of them: Linux may not find as many"


@glibc
def test_what_a_training_has_left_is_given_back() -> None:
    code = """
import re, torch
from cifar_lab.machine import return_memory, reuse_memory

def held():
    return int(re.search(r"Anonymous: +(\\d+)", open("/proc/self/smaps_rollup").read())[1]) // 1024

reuse_memory()
before = held()
torch.zeros(10 << 20)  # 40 MB
kept = held() - before
return_memory()
print(kept, held() - before)
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kept, left = map(int, told.split())
    assert kept > 35 and left < 5


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("model name\t: Xeon\nflags\t\t: avx512f amx_bf16 amx_tile\n", "Xeon, AVX512 and AMX"),
        ("model name\t: Xeon\nflags\t\t: avx512f avx512_bf16\n", "Xeon, AVX512"),
    ],
)
def test_a_processor_with_amx_is_told_from_one_without(
    told: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(Path, "read_text", lambda *_: told)
    assert machine.processor() == expected


def test_a_gpu_is_measured_as_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_float32_matmul_precision()
    try:
        machine.settle()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_process_settles_before_it_measures_or_trains(
    monkeypatch: pytest.MonkeyPatch, fresh_cache: Path, tmp_path: Path
) -> None:
    done: list[str] = []

    def step_seconds(recipe: Recipe, precision: str) -> float:
        done.append(precision)
        return 1.0

    monkeypatch.setattr(machine, "settle", lambda: done.append("settled"))
    monkeypatch.setattr(machine, "computes", lambda precision: True)
    monkeypatch.setattr(machine, "step_seconds", step_seconds)
    recipe = machine.measured(Recipe(arch="classic_cnn"))
    assert done == ["settled", "32", "bf16"], "classic_cnn's channels are few, so that it lies in one way only"
    trainer(recipe, tmp_path, [])
    assert done[3:] == ["settled"]


# Seconds of a step, and what is to be chosen for a recipe with some of it fixed.
BOTH = {("32", "channels_last"): 3.0, ("bf16", "channels_last"): 2.0}
FIRST = BOTH | {("bf16", "contiguous"): 1.0}
CHOICES: list[tuple[dict[tuple[str, str], float], dict[str, Any], tuple[str, str]]] = [
    (FIRST, {}, ("bf16", "contiguous")),
    (BOTH | {("bf16", "contiguous"): 1.99}, {}, ("bf16", "channels_last")),  # which may be chance
    (BOTH | {("32", "channels_last"): 1.0, ("32", "contiguous"): 4.0}, {}, ("32", "channels_last")),
    ({("32", "channels_last"): 3.0, ("32", "contiguous"): 1.0}, {"precision": "32"}, ("32", "contiguous")),
    (BOTH, {"memory_format": "channels_last"}, ("bf16", "channels_last")),
    ({("32", "contiguous"): 1.0, ("bf16", "contiguous"): 2.0}, {"width": 20}, ("32", "contiguous")),  # too narrow
    ({("bf16", "contiguous"): 2.0, ("bf16", "channels_last"): 1.0},
     {"arch": "three_layer_cnn", "precision": "bf16"}, ("bf16", "channels_last")),
    ({}, {"precision": "32", "memory_format": "contiguous"}, ("32", "contiguous")),
]  # fmt: skip


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize(("seconds", "fields", "expected"), CHOICES)
def test_the_faster_precision_and_memory_format_are_measured_once(
    seconds: dict[tuple[str, str], float],
    fields: dict[str, Any],
    expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, str]] = []

    def step_seconds(recipe: Recipe, precision: str) -> float:
        seen.append((precision, recipe.memory_format))
        return seconds[seen[-1]]

    monkeypatch.setattr(machine, "computes", lambda precision: True)
    monkeypatch.setattr(machine, "step_seconds", step_seconds)
    asked = Recipe(**{"arch": "resnet", **fields})
    for _ in range(2):
        found = machine.measured(asked)
        assert (found.precision, found.memory_format) == expected
        assert sorted(seen) == sorted(seconds), "each once"
    assert found.replace(precision=asked.precision, memory_format=asked.memory_format) == asked


@pytest.mark.parametrize("damage", ["", "{", "null", "[]", "3", "{}"])
def test_a_damaged_cache_is_measured_anew(damage: str, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(machine, "computes", lambda precision: True)
    monkeypatch.setattr(machine, "step_seconds", lambda recipe, precision: seen.append(precision) or 1.0)
    fresh_cache.mkdir(parents=True)
    (fresh_cache / "measured.json").write_text(damage)
    for _ in range(2):
        machine.measured(Recipe(arch="resnet"))
        assert len(seen) == 3, "once more, and kept"
    place = fresh_cache / "measured.json"
    place.write_text(json.dumps({key: [damage] for key in json.loads(place.read_text())}))
    machine.measured(Recipe(arch="resnet"))
    assert len(seen) == 6, "a line that says something else"


def test_what_would_be_emulated_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "computes", lambda precision: precision == "32")
    monkeypatch.setattr(machine, "step_seconds", lambda recipe, precision: pytest.fail("it would take minutes"))
    found = machine.measured(Recipe(arch="resnet", precision="bf16"))
    assert (found.precision, found.memory_format) == ("bf16", "channels_last")


def test_without_bf16_only_the_memory_format_is_measured(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(machine, "computes", lambda precision: precision == "32")
    monkeypatch.setattr(
        machine, "step_seconds", lambda recipe, precision: seen.append((precision, recipe.memory_format)) or 1.0
    )
    found = machine.measured(Recipe(arch="resnet"))
    assert seen == [("32", "channels_last"), ("32", "contiguous")]
    assert (found.precision, found.memory_format) == ("32", "channels_last")
    assert machine.measured(Recipe(arch="resnet", width=20)).memory_format == "contiguous" and len(seen) == 2


@pytest.mark.parametrize("name", ["channels_last", "contiguous"])
def test_a_network_lies_in_memory_as_its_recipe_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(arch="resnet", width=16, memory_format=name, batch_size=4)
    seen: list[bool] = []

    def look(network: Any, images: torch.Tensor) -> None:
        both = images, network.stages[0].residual[0].weight
        seen.extend(one.is_contiguous(memory_format=torch.channels_last) for one in both)

    look_into_resnets(monkeypatch, look)
    machine.step_seconds(recipe, "32", repeats=1)
    model = ImageClassifier(recipe.to_dict(), list("0123456789"), [0.5] * 3, [0.5] * 3)
    model.training_step((torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)), 0)
    assert seen == [name == "channels_last"] * 6


def test_a_step_is_measured_with_images_of_the_size_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    look_into_resnets(monkeypatch, lambda _, images: shapes.append(tuple(images.shape)))
    machine.step_seconds(Recipe(arch="resnet", width=8), "32", batch=2, side=16, repeats=1)
    assert shapes == [(2, 3, 16, 16)] * 2
