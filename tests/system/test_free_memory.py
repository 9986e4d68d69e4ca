"""What a process holds is what it holds itself, and what an object holds is counted once."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from tcsae.system.free_memory import tensor_bytes

CHILD = """
from types import SimpleNamespace
from tcsae.system.free_memory import held_memory, peak_memory
cpu = SimpleNamespace(type="cpu")
print(held_memory(cpu), peak_memory(cpu))
block = b"x" * 2**26
print(held_memory(cpu), peak_memory(cpu))
del block
print(held_memory(cpu), peak_memory(cpu))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing says what a process alone held")
def test_a_process_does_not_inherit_what_its_parent_held():
    """As getrusage's most does: exec() hands it on."""
    block = b"x" * 2**28
    said = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout
    (held, most), (held_with, most_with), (held_after, most_after) = (
        map(int, line.split()) for line in said.split("\n")[:3]
    )
    assert 0 < held <= most < len(block)
    assert held_with - held > 0.9 * 2**26 < most_with - held
    assert held_after < held_with - 0.9 * 2**26, "what was given back is not held"
    # The kernel counts in batches of pages.
    assert most_after + 2**20 > most_with > held_after + 0.9 * 2**26, "and the most stays"


def test_tensors_and_arrays_are_counted_wherever_they_lie_and_once():
    class Holder:
        def __init__(self) -> None:
            self.weights = torch.zeros(10, 4)
            self.view = self.weights[2:]
            self.kept = {"a": [np.zeros(3)], "b": (torch.zeros(5, dtype=torch.int16), "text")}
            self.again = self
            self.kind = Holder

    assert tensor_bytes(Holder()) == 10 * 4 * 4 + 3 * 8 + 5 * 2
    assert tensor_bytes("text") == 0
