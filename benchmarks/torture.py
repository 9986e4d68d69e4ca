"""Everything that can happen to files, again and again: kills, power cuts, flipped bits, full disks, bad input.

    python benchmarks/torture.py                                # the figures of docs/RELIABILITY.md, an hour
    python benchmarks/torture.py --only kills flips --scale 0.1 # minutes
    python benchmarks/torture.py --markdown                     # the table as it stands in that document

Each section says how often it tried and how often what is promised was kept: the same command goes on and ends with
the same bytes, damage is named, and every failure is one sentence. Stores have ``kill9.py``. Full disks and the block
device need root and are left out without it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"

from torture_sections.bad_input import fuzz, inputs
from torture_sections.bits import flips
from torture_sections.children import Tally
from torture_sections.disks import device, full
from torture_sections.stages import Scene, prepare
from torture_sections.stops import kills, power, writers

SECTIONS = {each.__name__: each for each in (kills, power, device, flips, full, writers, inputs, fuzz)}


def markdown(tallies: list[Tally]) -> str:
    """The table of docs/RELIABILITY.md."""
    rows = [f"| {each.name} | {each.tried:,} | {each.survived:,} | {each.promise} |" for each in tallies]
    return "\n".join(["| what happened | tried | survived | what is promised |", "|---|---|---|---|", *rows])


def run() -> None:
    """Parse, torture, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--scale", type=float, default=1.0, help="of how often everything is tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true", help="print the document's table and not JSON")
    options = parser.parse_args()
    tallies = []
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder).resolve(), options.scale, options.seed)
        prepare(scene.base)
        for name in options.only:
            for tally in SECTIONS[name](scene):
                print(f"{tally.name}: {tally.survived} of {tally.tried}", file=sys.stderr, flush=True)
                tallies.append(tally)
    if options.markdown:
        print(markdown(tallies))
    else:
        print(json.dumps({each.name: {"tried": each.tried, "survived": each.survived} for each in tallies}))
    if any(tally.failures for tally in tallies):
        raise SystemExit(1)


if __name__ == "__main__":
    run()
