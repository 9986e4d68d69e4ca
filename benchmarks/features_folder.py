"""What opening every feature in a browser costs, at several widths: weight, files, and time until a feature is there.

    python benchmarks/features_folder.py                              4k, 16k and 65k features
    python benchmarks/features_folder.py --quick                      a quick check that it runs

A run and its twin with random decoders, and made-up codes of both over the same rows: 32 of the features on every
token, some far more often than others. The folder is that of `pipeline features --html`, opened in Chromium from its file://
address. Bytes are those that the browser reads until the list and the first feature with its match stand there; they do
not depend on the machine. Seconds do: from the navigation to that moment, in a browser just started, median of turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

K, CONTEXT, D_MODEL = 32, 128, 64
WORDS = ("the", "bank", "river", "federal", "government", "1987", ",", "of", "loan", "water", "re", "stone", "went")
CLOCK = """
new MutationObserver(() => {
  const ready = document.documentElement.dataset.features && document.querySelector(".side h2");
  if (ready) window.readyAt ??= performance.now();
}).observe(document, { attributes: true, childList: true, subtree: true });
"""


def write_run(folder: Path, store: Path, width: int, seed: int, **record: object) -> None:
    """A finished run with a random decoder, and made-up codes of it over all rows of the store."""
    from tcsae.cache.storage.open_place import place_of
    from tcsae.cache.store import ActivationStore
    from tcsae.evaluate.codes.encode import weights_hash
    from tcsae.evaluate.codes.format import CodesManifest
    from tcsae.evaluate.codes.writer import CodesWriter
    from tcsae.train.run_folder.record import RunRecord
    from tcsae.train.sae.activation import Activation
    from tiny_runs import random_sae

    opened = ActivationStore.open(store)
    random_sae(D_MODEL, width, Activation("topk", k=K), seed).save(folder)
    manifest = opened.manifest.model_dump(mode="json")
    about = {
        "name": folder.name, "role": "tc", "twin": None, "layer": opened.layer, "store": str(store),
        "store_fingerprint": opened.fingerprint(), "store_rows": opened.n_rows, "store_manifest": manifest,
        "config": {"sae": {"activation": "topk", "k": K}}, "input_scale": 1.0, "seed": seed, "steps": 1,
        "planned_steps": 1, "tokens": 1, "finished": True, "metrics": {}, "versions": {}, "created": "2026-01-01",
    }  # fmt: skip
    RunRecord.model_validate(about | record).save(folder)
    codes = CodesManifest(
        run=folder.name, weights=weights_hash(str(folder)), architecture="topk", n_features=width, store=str(store),
        store_fingerprint=opened.fingerprint(), store_manifest=manifest, planned_rows=opened.n_rows,
        trained_rows=opened.n_rows, norm_limit=1e9,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    with CodesWriter.open(str(place_of(folder / "codes.zarr")), codes, fresh=True) as writer:
        text = {name: getattr(opened, name)(0, opened.n_rows) for name in ("tokens", "documents", "flags")}
        count_N = np.where(text["flags"].reshape(-1) == 0, K, 0)
        chosen = (width * rng.random((int((count_N > 0).sum()), K)) ** 2).astype(np.int32)  # low numbers more often
        chosen.sort(axis=1)
        chosen = np.minimum(chosen + np.arange(K, dtype=np.int32), width - K + np.arange(K, dtype=np.int32))
        writer.append(text, count_N, chosen.reshape(-1), rng.gamma(2.0, 1.0, chosen.size).astype(np.float32))
        writer.finish()


def measured(page: Path, turns: int) -> list[float]:
    """Seconds until a feature stands there, each in a browser of its own."""
    from browser import browsing

    found = []
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as profile, browsing(Path(profile)) as tab:
            tab.send("Page.addScriptToEvaluateOnNewDocument", source=CLOCK)
            tab.open(page.resolve().as_uri())
            tab.until("window.readyAt !== undefined")
            found.append(tab.js("window.readyAt") / 1000)
    return found


def main() -> None:
    """Print a line for every width."""
    from stores import make_store
    from tcsae.evaluate.features import catalogue
    from tcsae.evaluate.features.folder import write_features

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    if asked.quick:
        asked.features, asked.rows, asked.turns = [256], 24, 1
    catalogue.TokenTexts = lambda _: lambda token: f" {WORDS[token % len(WORDS)]}"  # no tokenizer is loaded
    for width in asked.features:
        with tempfile.TemporaryDirectory() as place:
            home = Path(place)
            store = make_store(home, rows=asked.rows, context=CONTEXT, d_model=D_MODEL, documents=40)
            write_run(home / "run", store, width, 0, twin="twin")
            write_run(home / "twin", store, width, 1, role="twin", twin="run")
            done = write_features([str(home / "run")], out=str(home / "features"))
            seconds = measured(done.page, asked.turns)
            facts = {
                "features": width, "runs": done.runs, "bytes_to_open": done.opening_bytes, "files": done.files,
                "bytes_on_disk": done.n_bytes, "seconds_to_open": round(statistics.median(seconds), 3),
                "slowest": round(max(seconds), 3),
            }  # fmt: skip
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
