"""kill -9 inside shard writes, log lines, documents, fsyncs and renames, and at any moment: benchmarks/kill9.py, in
small.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill9.py"


def stress(*options):
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_anywhere_the_store_is_the_same():
    record = stress("--kills", "12", "--rows", "96", "--no-sync")
    assert sum(record["kills"].values()) >= 12
    assert all(record["kills"].values())
    assert record["commits_lost"] == 0
    assert record["stores_completed_and_identical"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", ["writer", "extract"])
def test_fifty_kills(what):
    record = stress("--kills", "50", "--what", what)
    assert sum(record["kills"].values()) == 50
    assert record["commits_lost"] == 0
