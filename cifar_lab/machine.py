"""This machine: its processor, and in which precision and memory format it trains faster, measured once."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import itertools
import json
import mmap
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cifar_lab import layers, winograd
from cifar_lab.files import cache_folder, sha256, write_json
from cifar_lab.layers import Network, memory_format
from cifar_lab.models import build, network_class
from cifar_lab.recipe import MEASURED, Recipe, RecipeError

PRECISIONS, FORMATS = ("32", "bf16"), ("channels_last", "contiguous")
REPEATS = 5
GAIN = 0.95  # of the time of the architecture's own memory format: what less it takes in the other may be chance
CUDA_CONTEXT = 600e6  # bytes that a process holds on a GPU beside its tensors, about
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
MADV_HUGEPAGE = 14  # of Linux's mman-common.h
ARENA, HUGE_PAGE = 1 << 32, 1 << 21  # bytes: addresses, of which memory is what is written to; a large page


def device() -> torch.device:
    """The GPU that this process may use, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor() -> str:
    """The model of the GPU, or of the CPU with its vector extensions as PyTorch names them, and AMX."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    model, matrices = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, told = (part.strip() for part in line.partition(":"))
            if name == "model name":
                model = told
            elif name == "flags" and "amx_bf16" in told.split():
                matrices = " and AMX"  # which makes bf16 several times faster, and which PyTorch does not name
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}{matrices}"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_share() -> float:
    """The part of its GPU's memory that this process has held at most, 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    _, total = torch.cuda.mem_get_info()
    return float((torch.cuda.max_memory_reserved() + CUDA_CONTEXT) / total)


def hardware() -> str:
    """The processor that trains, and how much of it."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {processor()}"
    return f"{cores()} cores of {processor()}"


def versions() -> dict[str, str]:
    """The versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("cifar_lab", "torch", "torchvision", "pytorch-lightning", "ray", "numpy", "scikit-learn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def reuse_memory() -> None:
    """Have the C library keep the memory that a step frees for the next one, where it is glibc.

    It would hand blocks of more than 32 MB back to the system, and take them anew page by page: with `speed_cnn` at a
    batch of 500 a sixth of the processor's time. In large pages, where Linux has them to give, its steps at a batch of
    250 in bf16 are another 7% faster.
    """
    with contextlib.suppress(OSError, AttributeError, OverflowError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.malloc.restype = ctypes.c_void_p
        # Where so many addresses cannot be had this raises; malloc would leave the heap for another, which shrinks.
        mmap.mmap(-1, ARENA, flags=mmap.MAP_PRIVATE).close()
        # What is freed at the end of the heap stays there: the next blocks are cut from these addresses.
        if block := libc.malloc(ctypes.c_size_t(ARENA)):
            first = -(-block // HUGE_PAGE) * HUGE_PAGE
            last = (block + ARENA) // HUGE_PAGE * HUGE_PAGE
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_HUGEPAGE)
            libc.free(ctypes.c_void_p(block))


def return_memory() -> None:
    """Hand back to the system what `reuse_memory` had kept: the next training may be a smaller one."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def settle() -> None:
    """Have this process compute as trainings do, before it trains or measures: what one gains, the other must have."""
    reuse_memory()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


@contextlib.contextmanager
def threads_limited(threads: int | None) -> Iterator[None]:
    """So many CPU threads for a while; as many as PyTorch takes where unset."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def computes(precision: str) -> bool:
    """Whether the processor computes in a precision: without AVX-512 a CPU emulates bf16, hundreds of times slower."""
    capable = torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))
    return precision == "32" or device().type != "cpu" or capable


def compile_fault() -> str:
    """Why PyTorch cannot compile for this process's device, in a sentence; empty where it can.

    Found by compiling something small: PyTorch needs a C++ compiler, and Triton for a GPU.
    """
    try:
        torch.compile(lambda numbers: numbers.sin() + 1)(torch.zeros(2, device=device()))
    except Exception as error:
        return textwrap.shorten(str(error).partition("Set TORCH")[0], 300) or type(error).__name__
    return ""


def check_compile(recipes: Iterable[Recipe], fault: Callable[[], str] | None = None) -> None:
    """See that networks which are to be compiled can be.

    Args:
        recipes: what is to be trained.
        fault: `compile_fault`, as it answers where they are to be trained; unset: here. Asked only if it matters.

    Raises:
        RecipeError: they cannot.
    """
    if any(recipe.compile for recipe in recipes) and (found := (fault or compile_fault)()):
        raise RecipeError(f"compile: True. PyTorch cannot compile where this would be trained ({found}). Legal: False.")


def precisions() -> list[str]:
    """The precisions that the processor computes in."""
    return [name for name in PRECISIONS if computes(name)]


def measured(recipe: Recipe) -> Recipe:
    """The recipe with precision and memory format, where they are "auto", as its network trains fastest here.

    First the precisions are compared, in the architecture's own memory format, then in the faster one the two formats;
    the other one has to gain. Networks are not compiled for it. The answer is kept in the cache, a line a processor,
    torch version, network, batch size and what was left to choose, until the code of the network changes.
    """
    if "auto" not in (recipe.precision, recipe.memory_format):
        return recipe
    network = json.dumps(recipe.network_parameters(), sort_keys=True)
    files = (layers.__file__, winograd.__file__, inspect.getfile(network_class(recipe.arch)))
    code = " ".join(sha256(Path(file))[:8] for file in files)
    asked = f"batch {recipe.batch_size}, {recipe.precision} {recipe.memory_format}"
    key = f"{processor()} | torch {torch.__version__} | {recipe.arch} {network} | {asked} | {code}"
    found = _known().get(key)
    if found not in [dict(zip(MEASURED, pair, strict=True)) for pair in itertools.product(PRECISIONS, FORMATS)]:
        found = _fastest(recipe)
        try:
            _place().parent.mkdir(parents=True, exist_ok=True)
            write_json(_place(), {**_known(), key: found})
        except OSError:
            pass  # it is measured again next time
    return recipe.measured_as(found)


def _place() -> Path:
    return cache_folder() / "measured.json"


def _known() -> dict[str, Any]:
    """What was measured before; nothing where it cannot be read."""
    try:
        known = json.loads(_place().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _fastest(recipe: Recipe) -> dict[str, str]:
    """The precision and memory format in which a step is the shortest; the own format unless the other gains."""
    candidates = precisions() if recipe.precision == "auto" else [recipe.precision]
    own, *other = [recipe.replace(memory_format=name) for name in _formats(recipe)]
    if not computes(candidates[0]):
        other = []  # it is emulated, and would be measured for minutes
    if len(candidates) == 1 and not other:
        return {"precision": candidates[0], "memory_format": own.memory_format}
    settle()
    seconds = {name: step_seconds(own, name) for name in candidates}
    precision = min(seconds, key=seconds.__getitem__)
    gains = [one for one in other if step_seconds(one, precision) < GAIN * seconds[precision]]
    return {"precision": precision, "memory_format": (gains or [own])[0].memory_format}


def _formats(recipe: Recipe) -> list[str]:
    """The memory formats that the recipe's network may have, the architecture's own first."""
    if recipe.memory_format != "auto":
        return [recipe.memory_format]
    with torch.device("meta"):
        network = build(recipe, 10)
    if memory_format(network, "channels_last") != torch.channels_last:
        return ["contiguous"]
    return list(FORMATS if network.CHANNELS_LAST else reversed(FORMATS))


def step_seconds(
    recipe: Recipe,
    precision: str,
    *,
    batch: int | None = None,
    side: int = 32,
    threads: int | None = None,
    repeats: int = REPEATS,
) -> float:
    """Median seconds of a forward and backward pass of the recipe's network over one batch of noise.

    Not compiled, whatever the recipe has: to compile takes longer than to measure.

    Args:
        recipe: whose network.
        precision: 32 or bf16.
        batch: images, the recipe's batch size where unset.
        side: pixels of an image's side.
        threads: CPU threads, as many as PyTorch takes where unset.
        repeats: passes, after a first one that does not count.
    """
    with threads_limited(threads):
        once = training_pass(build(recipe, 10), recipe, precision, batch=batch, side=side)
        return statistics.median([once() for _ in range(repeats + 1)][1:])


def training_pass(
    network: Network, recipe: Recipe, precision: str, *, batch: int | None = None, side: int = 32
) -> Callable[[], float]:
    """A function that does a forward and backward pass over a batch of noise, and returns the seconds of it.

    Args:
        network: the recipe's, of 10 classes; it is moved to this process's device, into its memory format.
        recipe: as above, with its memory format and batch size.
        precision: 32 or bf16.
        batch: images, the recipe's batch size where unset.
        side: pixels of an image's side.
    """
    here, layout, batch = device(), memory_format(network, recipe.memory_format), batch or recipe.batch_size
    images, labels = torch.rand(batch, 3, side, side, device=here), torch.randint(10, (batch,), device=here)
    network.to(here, memory_format=layout)  # type: ignore[call-overload]
    images = images.contiguous(memory_format=layout)

    def once() -> float:
        start = time.perf_counter()
        with torch.autocast(here.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        if here.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return once
