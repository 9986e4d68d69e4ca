"""Which of torch's operations is fastest for each part of the sparse step, as chosen in ``train/step/``.

    python benchmarks/products.py --l0 50 400

All candidates for a part give the same numbers (this is checked); the first one is the one in use. Times are in
milliseconds, the best of many repetitions, with the candidates in turns. Prints one JSON record.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable

import torch
from tcsae.train.step.active_entries import SparseCodes
from tcsae.train.step.matmul import product
from tcsae.train.step.top_k import largest, true_positions
from torch import Tensor

Parts = dict[str, dict[str, Callable[[], Tensor]]]


def parts(n: int, d: int, f: int, l0: int) -> Parts:
    """The candidates for each part, at random weights with about ``l0`` of ``f`` features active per token."""
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(n, f, generator=generator)
    pre -= pre[:64].flatten().sort(descending=True).values[64 * l0]
    W, a, z, bias = (
        torch.randn(f, d, generator=generator),
        torch.randn(n, d, generator=generator),
        pre.relu(),
        torch.zeros(f),
    )
    mask = pre > 0
    codes = SparseCodes(pre, mask, true_positions(mask), all_positive=True)
    csr = z.to_sparse_csr()
    transposed = z.t().contiguous().to_sparse_csr()
    row, column = mask.nonzero(as_tuple=True)
    offset_of = torch.ops.aten._embedding_bag_per_sample_weights_backward
    kept = min(l0, f)
    return {
        "encoder product": {
            "products.product": lambda: product(a, W, bias),
            "linear": lambda: torch.nn.functional.linear(a, W, bias),
        },
        "active positions": {
            "codes.true_positions": lambda: true_positions(mask),
            "nonzero": lambda: mask.view(-1).nonzero().view(-1),
        },
        "k largest of a row": {
            "codes.largest": lambda: pre * largest(pre, kept, over_batch=False)[0],
            "topk": lambda: _scattered(pre, pre.topk(kept, sorted=False)),
        },
        "decode": {
            "embedding_bag": lambda: codes.decode(W),
            "csr product": lambda: csr @ W,
            "dense product": lambda: z @ W,
        },
        "gradient to z": {
            "sampled_addmm": lambda: codes.sampled(a, W),
            "embedding_bag's own gradient": lambda: offset_of(a, W, column, codes._row_starts.long(), row, 0),
            "dense product": lambda: (a @ W.t())[mask],
        },
        "weight gradient": {
            "sort and embedding_bag": lambda: _anew(codes).accumulate(codes.value, a),
            "csr product, transposed before": lambda: transposed @ a,
            "index_add": lambda: torch.zeros(f, d).index_add_(0, column, a[row] * codes.value.unsqueeze(1)),
            "dense product": lambda: z.t() @ a,
        },
    }


def _scattered(pre: Tensor, kept: torch.return_types.topk) -> Tensor:
    return torch.zeros_like(pre).scatter_(1, kept.indices, kept.values.clamp_(min=0))


def _anew(codes: SparseCodes) -> SparseCodes:
    """The same codes without the stored order by columns."""
    codes.__dict__.pop("_by_column", None)
    return codes


def best_ms(candidates: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    results = {name: function() for name, function in candidates.items()}
    expected = next(iter(results.values()))
    for name, result in results.items():
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-2, msg=f"{name} differs")
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(rounds):
        for name, function in candidates.items():
            begun = time.perf_counter()
            function()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - begun))
    return {name: round(value, 2) for name, value in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--width", type=int, default=4608)
    parser.add_argument("--l0", type=int, nargs="+", default=[32, 64, 400])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="Sparse CSR")
    record: dict[str, object] = {"settings": vars(args), "torch": torch.__version__, "load": os.getloadavg()[0]}
    for l0 in args.l0:
        table = parts(args.tokens, args.d_model, args.width, l0)
        record[f"l0 {l0}"] = {part: best_ms(candidates, args.rounds) for part, candidates in table.items()}
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
