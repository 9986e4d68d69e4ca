"""Cost of the feature, temporal and position metrics per batch, compared with encoding and decoding the same tokens.

    python benchmarks/measures.py                         # 16384 features, 64 active, width 2304, 2048 tokens a batch
    python benchmarks/measures.py --features 4096 --active 32 --width 576 --device cuda

All metrics run as in an evaluation, on the codes of slowly changing activations (so that every kind of pair occurs).
Prints a JSON record: medians over batches in milliseconds, the final computation in seconds, and the memory held
between batches.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from tcsae.evaluate.metrics.active_entries import ActiveEntries
from tcsae.evaluate.metrics.all import AllMetrics, families
from tcsae.evaluate.protocol import TokenBatch
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.temporal_sae import TemporalSAE
from torch import Tensor

CONTEXT = 128


def batch_of(rows: int, first_row: int, width: int, device: str) -> TokenBatch:
    """Rows in which ten consecutive ones are one document; position 0 is special."""
    row_B = torch.arange(first_row, first_row + rows, device=device)
    document_BT = (row_B // 10)[:, None].expand(-1, CONTEXT)
    valid_BT = torch.ones(rows, CONTEXT, dtype=torch.bool, device=device)
    valid_BT[:, 0] = False
    x_BTD = torch.randn(rows, CONTEXT, width, device=device)
    for t in range(1, CONTEXT):
        x_BTD[:, t] = 0.8 * x_BTD[:, t - 1] + 0.6 * x_BTD[:, t]
    tokens_BT = torch.randint(0, 1000, (rows, CONTEXT), device=device)
    units_BT = (row_B // 8)[:, None].expand(-1, CONTEXT)
    return TokenBatch(
        x_BTD, tokens_BT, document_BT, units_BT, valid_BT, valid_BT, row_B, document_BT % 6, tokens_BT % 7
    )


def milliseconds(work: Callable[[], object], device: str) -> float:
    """Milliseconds of one call; the device is synchronised before and after it."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def held_bytes(thing: object, seen: set[int]) -> int:
    """Bytes of the tensors and arrays in an object and its parts, without those of SAEs, which it only refers to."""
    if id(thing) in seen or isinstance(thing, torch.nn.Module):
        return 0
    seen.add(id(thing))
    if isinstance(thing, Tensor | np.ndarray):
        return thing.nbytes
    if isinstance(thing, dict | list | tuple):
        return sum(held_bytes(part, seen) for part in (thing.values() if isinstance(thing, dict) else thing))
    return held_bytes(vars(thing), seen) if hasattr(thing, "__dict__") and not isinstance(thing, type) else 0


@torch.no_grad()
def main() -> None:
    """Measure and print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("features", 16384), ("active", 64), ("width", 2304), ("rows", 16), ("batches", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.manual_seed(0)
    sae = TemporalSAE(asked.width, asked.features, Activation("topk", k=asked.active)).to(asked.device)
    sae.W_dec.normal_()
    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    sae.W_enc.copy_(sae.W_dec.T)
    metrics = AllMetrics(sae, families(), context=CONTEXT, seed=0)  # pyright: ignore[reportArgumentType]
    times: dict[str, list[float]] = {"encode_and_decode": [], "read_sparsely": [], "all_metrics": []}
    for at in range(asked.batches):
        batch = batch_of(asked.rows, at * asked.rows, asked.width, asked.device)
        times["encode_and_decode"].append(milliseconds(lambda batch=batch: sae(batch.x_BTD), asked.device))
        out = sae(batch.x_BTD)
        read = lambda z=out.features, batch=batch: ActiveEntries.from_dense(z, batch.valid_BT)  # noqa: E731
        times["read_sparsely"].append(milliseconds(read, asked.device))
        active = read()
        update = lambda out=out, b=batch, active=active: metrics.update(b, active, out.reconstruction)  # noqa: E731
        times["all_metrics"].append(milliseconds(update, asked.device))
    held = held_bytes(metrics, set())
    closing = milliseconds(metrics.result, asked.device) / 1000
    record = {
        "what": "measures",
        **{key: value for key, value in vars(asked).items() if key != "batches"},
        "tokens_per_batch": asked.rows * CONTEXT,
        **{f"{name}_ms": round(statistics.median(values[1:]), 1) for name, values in times.items()},
        "closing_s": round(closing, 1),
        "held_mb": round(held / 1e6),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
