"""Freed memory: kept inside the context, given back after it."""

import platform
import subprocess
import sys

import pytest
from tcsae.system.allocator import keeping_freed_memory

FAULTS = """
import contextlib, resource, sys
import torch
from pathlib import Path
from tcsae.system.allocator import keeping_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

outside, before = faults(), resident()
with keeping_freed_memory():
    faults()
    inside, kept = faults(), resident()
print(outside, inside, kept - before, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_inside_pages_are_reused_and_afterwards_they_are_given_back():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    outside, inside, kept_mib, left_mib = map(int, done.stdout.split())
    assert outside > 20 * 1000, "64 MiB twenty times: what the allocator does by itself"
    assert inside < 100
    assert kept_mib > 60
    assert left_mib < 8


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda _: pytest.fail("was asked"))
    with keeping_freed_memory():
        pass
