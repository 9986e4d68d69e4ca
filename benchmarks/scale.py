"""What a store's records cost when there are many shards: opening, fingerprint, size, resuming, growing, checking,
planning. Logs are written without data.

    python benchmarks/scale.py --shards 1000 10000 100000 1000000      1.1 kB of log per shard
    python benchmarks/scale.py --quick                                  a quick check that it runs

Each line of the log is that of a shard of Gemma-2-2b (d = 2304, context 1024, 64 rows, 30 chunks of 10 MB). Every
measurement is a process of its own: seconds of the call alone, and the most memory that the process held above what it
holds after its imports. ``parsed`` reads every line, as it is without an index; ``first`` opens a store whose index is
not there yet, ``open`` one whose index is there; ``fingerprint`` and ``size`` are of an opened store. ``resume`` is
what a writer does with the records of two layers before it goes on (the sizes of files, four stats per shard, are left
out: there are no files); ``commit`` is one more shard, in both logs; ``records`` is what ``pipeline verify`` does
before it reads data; ``ls`` the line of ``pipeline ls``; ``plan`` the chunks of the first two pools of an epoch;
``grow`` opens a store whose log has 4,000 lines more than its index.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CHUNKS, ROWS = 30, 64
WORK = {
    "parsed": "parse_log((path / LOG).read_bytes())",
    "first": "ActivationStore.open(path)",
    "open": "ActivationStore.open(path)",
    "fingerprint": "store.fingerprint()",
    "size": "store.n_bytes",
    "resume": "agreed(logs := {at: _sound_log(place) for at, place in places.items()}); _settled(logs[1], rows, 64)",
    "commit": "append(logs)",
    "records": "log, size = open_log(place_of(path), keep=False); list(_log(manifest_at(place_of(path)), log, True))",
    "ls": "_store(path)",
    "plan": "reader._chunks(0, 0), reader._chunks(0, 1)",
    "grow": "ActivationStore.open(path, allow_unfinished=True)",
}
_LOGS = """
from tcsae.cache.format.commit_log import agreed
from tcsae.cache.resume import _sound_log
from tcsae.cache.storage.open_place import place_of
from tcsae.cache.writer import _settled
places, rows = {at: place_of(path) for at in (1, 2)}, ActivationStore.open(path).n_rows
"""
BEFORE = {
    "fingerprint": "store = ActivationStore.open(path)",
    "size": "store = ActivationStore.open(path)",
    "resume": _LOGS,
    "commit": _LOGS
    + """
from dataclasses import replace
logs = agreed({at: _sound_log(place) for at, place in places.items()})
def append(logs):
    for log in logs.values():
        last = log[-1]
        commit = replace(last, shard=last.shard + 1, first_row=last.stop_row)
        commit.to_line()
        log.append(commit)
        _settled(log, rows + 64, 64)
""",
    "records": """
from tcsae.cache.format.log_index import open_log
from tcsae.cache.format.manifest import manifest_at
from tcsae.cache.storage.open_place import place_of
from tcsae.cache.verify import _log
""",
    "ls": "from tcsae.on_disk import _store",
    "plan": """
from tcsae.cache.pools import PoolReader
store = ActivationStore.open(path)
PoolReader.__init__.__globals__["cached_statistics"] = lambda store: None
reader = PoolReader(store, pool_tokens=None, tokens_per_batch=4096, seed=0, norm_limit=None, rows=None)
""",
}
CHILD = """
import json, resource, sys, time
from pathlib import Path
from tcsae.cache.format.commit_log import LOG, parse_log
from tcsae.cache.store import ActivationStore
path = Path(sys.argv[1])
{before}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
held, began = peak(), time.perf_counter()
{work}
print(json.dumps([time.perf_counter() - began, peak() - held]))
"""


def write_store(path: Path, shards: int) -> None:
    """A finished store of so many shards of which only the records exist."""
    from tcsae.cache.format.layout import StoreLayout
    from tcsae.cache.format.manifest import Execution, ModelIdentity, StoreManifest, TextIdentity, group_document
    from tcsae.cache.format.zarr_documents import to_json

    layout = StoreLayout(2304, 1024, 2, ROWS)
    manifest = StoreManifest(
        layer=12, hook_name="blocks.12.hook_resid_post", d_model=2304,
        model=ModelIdentity(
            id="google/gemma-2-2b", fingerprint="0", architecture="Gemma2ForCausalLM", n_layers=26, vocab_size=256000,
            attn_implementation="eager", dtype="bfloat16", tokenizer_fingerprint="0",
        ),
        text=TextIdentity(
            dataset="text", split="train", text_column="text", fingerprint="0", packing="concat", context=1024, seed=0,
            held_out=0.0,
        ),
        execution=Execution(batch_size=8, threads=1, device="cuda"), layout=layout, planned_rows=shards * ROWS,
        finished=True,
    )  # fmt: skip
    (path / "activations").mkdir(parents=True)
    (path / "zarr.json").write_bytes(to_json(group_document(manifest)))
    lengthen(path, 0, shards)


def lengthen(path: Path, begin: int, more: int = 4000) -> None:
    """Add lines of shards to a log."""
    from tcsae.cache.format.commit_log import LOG, Commit
    from tcsae.cache.format.shard import FileRecord

    names = ("documents", "flags", "tokens")
    with (path / LOG).open("ab") as log:
        for shard in range(begin, begin + more):
            files = {name: FileRecord(262_148, f"{shard:032x}") for name in names}
            chunks = tuple(f"{shard * CHUNKS + chunk:016x}" for chunk in range(CHUNKS))
            files["activations"] = FileRecord(302_000_000, f"{shard:032x}", chunks)
            log.write(Commit(shard, shard * ROWS, ROWS, files, {"row": shard * ROWS}).to_line())
    from tcsae.cache.format.manifest import group_document, read_manifest
    from tcsae.cache.format.zarr_documents import to_json

    wanted = read_manifest(path).model_copy(update={"planned_rows": (begin + more) * ROWS})
    (path / "zarr.json").write_bytes(to_json(group_document(wanted)))


def measure(path: Path, name: str) -> tuple[float, float]:
    """Seconds and megabytes of one call in a process of its own."""
    code = CHILD.format(before=BEFORE.get(name, ""), work=WORK[name])
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    seconds, megabytes = json.loads(done.stdout)
    return seconds, megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--parse-up-to", type=int, default=100_000, help="shards up to which every line is parsed, too")
    parser.add_argument("--folder", help="where the logs are written, 1.1 kB per shard")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print(f"{'shards':>10} {'log MB':>8}" + "".join(f"{name:>20}" for name in WORK))
    for shards in [100, 5000] if args.quick else args.shards:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder) / "l12.zarr"
            write_store(path, shards)
            log_mb = (path / "activations" / "commits.jsonl").stat().st_size / 1e6
            found = {}
            for name in WORK:
                if name == "grow":
                    lengthen(path, shards)
                if name != "parsed" or shards <= args.parse_up_to:
                    found[name] = measure(path, name)
        cells = [f"{found[n][0]:9.3f} s {found[n][1]:5.0f} MB" if n in found else "—" for n in WORK]
        print(f"{shards:>10,} {log_mb:>8.1f}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
