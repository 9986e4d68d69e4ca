"""Speed of extraction as a share of the bare truncated forward pass: same process, model, batch size and rows.

    python benchmarks/extract.py --layers 8 --tokens 65536                     # the demo model, on this machine
    python benchmarks/extract.py --random-gemma2 --layers 5 12 19 --tokens 4M  # random weights

The two take turns, and their medians are compared. Extraction includes everything: reading and tokenising text, the
forward pass, copying the results, checks, writing every layer's store, fsync and commit, until the last byte is
durable. On a machine with other work the share of processor time is more reliable than that of elapsed time. Prints one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from tcsae.cache.format.manifest import installed_versions
from tcsae.cache.writer import StoreSetWriter
from tcsae.console import parse_count
from tcsae.extract.config import ExtractConfig, ModelSource, TextSource
from tcsae.extract.model.forward import choose_batch_size
from tcsae.extract.model.hooks import deepest_block
from tcsae.extract.model.load import LanguageModel, identify_model, load_language_model
from tcsae.extract.plan import Plan, describe_execution, make_plan, resolve_execution
from tcsae.extract.run import StoreSetRun
from tcsae.extract.text.row_batches import RowReader, batches
from tcsae.extract.text.rows import Cursor, read_rows

TESTS = Path(__file__).parents[1] / "tests"


def random_gemma2(folder: Path, tokens: int) -> tuple[str, str]:
    """A model folder with Gemma-2-2b's architecture, random weights, a small tokenizer and enough made-up text."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sys.path.insert(0, str(TESTS))
    from tiny import tiny_corpus, tiny_tokenizer

    config = Gemma2Config(
        vocab_size=256_000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=256,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Gemma2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "model")
    tiny_tokenizer("gemma2").save_pretrained(folder / "model")
    tiny_corpus(folder / "text", documents=max(8, tokens // 4000), words=2000)
    return str(folder / "model"), str(folder / "text")


def bare(plan: Plan, lm: LanguageModel, batch_size: int) -> tuple[float, float]:
    """Elapsed and processor seconds of the truncated forward passes alone, over the rows that extraction stores."""
    rows = read_rows(plan.config.text, plan.outline, plan.documents, Cursor())
    with RowReader(rows, plan.outline.special_token_ids) as feed:
        made = list(batches(feed, 0, plan.config.rows, plan.layout.shard_rows, batch_size))
    tokens = [torch.as_tensor(batch.block.tokens_BT, dtype=torch.long).to(lm.device) for batch in made]
    _wait(lm)
    began, worked = time.perf_counter(), time.process_time()
    with torch.no_grad():
        for tokens_BT in tokens:
            lm.decoder(input_ids=tokens_BT, use_cache=False)
    _wait(lm)
    return time.perf_counter() - began, time.process_time() - worked


def whole(plan: Plan, lm: LanguageModel, batch_size: int) -> tuple[float, float, int, float]:
    """Elapsed and processor seconds of a whole extraction, the bytes written, and the seconds waiting for the disk."""
    execution = resolve_execution(plan, batch_size)
    _wait(lm)
    began, worked = time.perf_counter(), time.process_time()
    with StoreSetWriter.open(plan.config.paths, plan.manifests(lm.identity, execution), fresh=True) as writer:
        StoreSetRun(plan, lm, writer).run(execution)
        writer.finish()
    return time.perf_counter() - began, time.process_time() - worked, writer.bytes_written, writer.seconds_blocked


def _wait(lm: LanguageModel) -> None:
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)


def measure(config: ExtractConfig, repeats: int) -> dict:
    plan = make_plan(config)
    lm = load_language_model(
        plan.outline, deepest_layer=deepest_block(config.locations), identity=identify_model(plan.outline)
    )
    batch_size = config.batch_size or choose_batch_size(lm, plan.layout, config.rows)
    bare(plan, lm, batch_size)  # warms up kernels, allocator and page cache
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
    turns = [(*bare(plan, lm, batch_size), *whole(plan, lm, batch_size)) for _ in range(repeats)]
    bare_s, bare_cpu, whole_s, whole_cpu, written, blocked = (
        statistics.median(column) for column in zip(*turns, strict=True)
    )
    tokens = plan.config.rows * config.text.context
    gpu = lm.device.type == "cuda"
    peak = (
        torch.cuda.max_memory_allocated(lm.device) if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "model": lm.identity.architecture,
        "layers": list(config.layers),
        "dtype": lm.identity.dtype,
        "attention": lm.identity.attn_implementation,
        "rows_per_batch": batch_size,
        "context": config.text.context,
        "tokens": tokens,
        "bare_tokens_per_second": round(tokens / bare_s),
        "extract_tokens_per_second": round(tokens / whole_s),
        "share_of_bare": round(bare_s / whole_s, 4),
        "share_of_bare_in_processor_time": round(bare_cpu / whole_cpu, 4),
        "share_each_turn": [round(turn[0] / turn[2], 4) for turn in turns],
        "written_gb_per_second": round(written / whole_s / 1e9, 4),
        "seconds_waiting_for_disk": round(blocked, 3),
        "peak_memory_gb": round(peak / 1e9, 3),
        "peak_memory_of": "GPU" if gpu else "process",
        "device": describe_execution(lm.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": installed_versions(),
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument(
        "--random-gemma2", action="store_true", help="Gemma-2-2b's shape with random weights instead of --model"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[8])
    parser.add_argument("--tokens", type=parse_count, default=32_768)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="folder for the stores; the system's temporary one by default")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tcsae-extract-", dir=given.out))
    try:
        names = random_gemma2(folder, given.tokens) if given.random_gemma2 else (given.model, given.dataset)
        config = ExtractConfig(
            layers=tuple(given.layers),
            model=ModelSource(names[0], device=given.device, dtype=given.dtype),
            text=TextSource(names[1]),
            tokens=given.tokens,
            batch_size=given.batch_size,
            out=str(folder / "cache"),
        )
        print(json.dumps(measure(config, given.repeats)))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
