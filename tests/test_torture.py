"""A little of everything that benchmarks/torture.py does; with root also full disks and power cuts on a loop device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).parents[1] / "benchmarks" / "torture.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("section", ["kills", "power", "device", "flips", "full", "writers", "inputs", "fuzz"])
def test_everything_is_survived(section):
    done = subprocess.run(
        [sys.executable, str(TORTURE), "--only", section, "--scale", "0.03"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(one["survived"] == one["tried"] for one in json.loads(done.stdout).values())
