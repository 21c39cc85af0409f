"""This machine: what it is asked to do for a training."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory as it likes")
def test_a_steps_memory_is_there_for_the_next_step() -> None:
    code = """
import resource, torch
from cifar_lab.machine import reuse_memory

def faults():
    counts = []
    for _ in range(16):  # the first steps find the heap's size
        torch.zeros(10 << 20)  # 40 MB
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return counts[-1] - counts[-5]

before = faults()
reuse_memory()
print(before, faults())
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    returned, kept = map(int, told.split())
    assert kept * 20 < returned
