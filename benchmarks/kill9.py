"""``kill -9`` while stores are written, many times: no commit is lost, and the final stores are byte-identical.

    python benchmarks/kill9.py --kills 50                   # the writer alone, seconds
    python benchmarks/kill9.py --kills 50 --what extract    # the whole extraction with a tiny model, minutes

The process is killed alternately at a random moment and at a random operation of a chosen kind: inside the write of a
shard (after half of it), before or after an fsync, before or after a rename, inside the line of the commit log, inside
a zarr.json. Prints one JSON record.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
LAYERS = (1, 3)
KINDS = ("moment", "shard", "log", "document", "fsync", "rename")


# --- the child process, which writes until it is done or killed


def arm(kind: str, at: int, when: str) -> None:
    """Make this process kill itself ``before``, ``half`` way through or ``after`` the ``at``-th operation of a kind."""
    seen = 0

    def wrap(name: str, is_kind) -> None:
        real = getattr(os, name)

        def operation(first, *rest, **options):
            nonlocal seen
            if not is_kind(first):
                return real(first, *rest, **options)
            seen += 1
            if seen < at:
                return real(first, *rest, **options)
            if when == "half" and name == "writev":
                data = b"".join(bytes(buffer) for buffer in rest[0])
                os.write(first, data[: len(data) // 2])
            elif when == "after":
                real(first, *rest, **options)
            return os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, operation)

    def target(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    if kind == "shard":
        wrap("writev", lambda fd: "/c." in target(fd))
    elif kind == "log":
        wrap("writev", lambda fd: target(fd).endswith("commits.jsonl"))
    elif kind == "document":
        wrap("writev", lambda fd: "zarr.json" in target(fd))
    elif kind == "fsync":
        wrap("fsync", lambda _: True)
    elif kind == "rename":
        wrap("replace", lambda _: True)


def write_stores(folder: Path, rows: int) -> None:
    """Fill the stores of two layers with random rows from a seed, resuming if they exist."""
    sys.path.insert(0, str(HERE.parents[1] / "tests"))
    from stores import make_activations, make_block, make_manifest, write_rows
    from tcsae.cache.format.layout import StoreLayout
    from tcsae.cache.writer import StoreSetWriter

    layout = StoreLayout(d_model=64, context=16, chunk_rows=4, shard_rows=32)
    block = make_block(rows, 16)
    bits = {layer: make_activations(block, 64, layer=layer) for layer in LAYERS}
    paths = {layer: folder / f"l{layer}.zarr" for layer in LAYERS}
    manifests = {layer: make_manifest(layer=layer, layout=layout, planned_rows=rows) for layer in LAYERS}
    with StoreSetWriter.open(paths, manifests) as writer:
        write_rows(writer, block, bits, step=8)


def extract_stores(folder: Path, rows: int) -> None:
    """Run the real extraction with a tiny random model over made-up text, resuming if the stores exist."""
    from tcsae.extract.config import ExtractConfig, ModelSource, TextSource
    from tcsae.extract.run import extract

    model, text = (
        ModelSource(str(folder.parent / "model"), device="cpu"),
        TextSource(str(folder.parent / "text"), context=16),
    )
    extract(
        ExtractConfig(
            LAYERS, model, text, tokens=rows * 16, batch_size=8, out=str(folder), shard_bytes=32 * 16 * 2 * 32
        )
    )


def prepare(base: Path, what: str) -> None:
    """Create the model and text for ``--what extract``."""
    if what == "extract":
        sys.path.insert(0, str(HERE.parents[1] / "tests"))
        from tiny import tiny_corpus, tiny_model

        tiny_model("llama", base / "model")
        tiny_corpus(base / "text", documents=400)


# --- the parent process, which kills and compares


def life(folder: Path, options: argparse.Namespace, death: tuple[str, int, str] | None, delay: float | None) -> int:
    """Run the child once; returns its exit status, −9 if it was killed."""
    command = [sys.executable, str(HERE), "--child", str(folder), "--what", options.what, "--rows", str(options.rows)]
    command += ["--no-sync"] if options.no_sync else []
    if death:
        command += ["--death", json.dumps(death)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if delay is not None:
        try:
            child.wait(delay)
        except subprocess.TimeoutExpired:
            child.kill()
    errors = child.communicate()[1].decode()
    if child.returncode not in (0, -9):
        raise SystemExit(f"a life ended in an error, which no kill may cause:\n{errors}")
    return child.returncode


def committed(folder: Path) -> tuple[int, ...]:
    """Number of valid lines in each layer's log."""
    from tcsae.cache.format.commit_log import LOG, parse_log

    logs = [folder / f"l{layer}.zarr" / LOG for layer in LAYERS]
    return tuple(len(parse_log(log.read_bytes())[0]) if log.exists() else 0 for log in logs)


def content(folder: Path) -> dict[str, bytes]:
    """Content of every file by path, without the time at which the store was created."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    for name in [n for n in files if n.count("/") == 1 and n.endswith("zarr.json")]:
        document = json.loads(files[name])
        document["attributes"]["tcsae"].pop("created")
        document["attributes"].pop("tcsae_check")
        files[name] = json.dumps(document).encode()
    return files


def stress(base: Path, options: argparse.Namespace) -> dict:
    """Kill the child ``--kills`` times, and compare every store that is completed in the meantime."""
    rng = random.Random(options.seed)
    began = time.perf_counter()
    life(base / "whole", options, None, None)
    duration = time.perf_counter() - began
    wanted, done, stores, lost = content(base / "whole"), dict.fromkeys(KINDS, 0), 0, 0
    folder, before = base / "0", (0,) * len(LAYERS)
    while sum(done.values()) < options.kills:
        kind = KINDS[sum(done.values()) % len(KINDS)]
        death = (
            kind,
            rng.randint(1, 24 if kind in ("fsync", "rename") else 6),
            rng.choice(("before", "half", "after")),
        )
        moment = kind == "moment"
        status = life(folder, options, None if moment else death, rng.uniform(0, duration) if moment else None)
        done[kind] += status == -9
        now = committed(folder)
        # A commit that only one layer has may be dropped; a commit that all layers have may not.
        lost += min(now) < min(before)
        before = now
        if status == 0:
            stores += check(folder, wanted)
            folder, before = base / str(stores), (0,) * len(LAYERS)
    life(folder, options, None, None)
    stores += check(folder, wanted)
    seconds = round(time.perf_counter() - began, 1)
    return {
        "what": options.what,
        "kills": done,
        "stores_completed_and_identical": stores,
        "commits_lost": lost,
        "seconds": seconds,
    }


def check(folder: Path, wanted: dict[str, bytes]) -> int:
    """1 if the store equals that of an uninterrupted run; otherwise ends the program."""
    found = content(folder)
    different = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    if different:
        raise SystemExit(f"not identical after kills: {', '.join(different)}")
    return 1


def main() -> None:
    """Parse the arguments, then act as the parent or the child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--what", choices=("writer", "extract"), default="writer")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-sync", action="store_true", help="leave fsync out: faster, and kill -9 loses no written page"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--death", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        if options.no_sync:
            os.fsync = lambda _: None
        if options.death:
            arm(*options.death)
        {"writer": write_stores, "extract": extract_stores}[options.what](options.child, options.rows)
        return
    with tempfile.TemporaryDirectory() as base:
        prepare(Path(base), options.what)
        record = stress(Path(base), options)
    print(json.dumps(record))
    if record["commits_lost"]:
        raise SystemExit("committed rows were lost")


if __name__ == "__main__":
    main()
