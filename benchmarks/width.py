"""What closing the metrics costs at a width, over the time of the products among decoder rows alone.

    python benchmarks/width.py                          # 4k, 16k and 65k features, width 576
    python benchmarks/width.py --features 4096 --profile

Each line is one width in JSON: seconds of every family's ``result()`` and of all together, seconds of the bare products
(the cosines of all pairs of decoder rows, in blocks, each pair once), both in CPU time, since machines are shared; and
their ratio in one run.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from measures import CONTEXT, batch_of
from tcsae.evaluate.metrics.active_entries import ActiveEntries
from tcsae.evaluate.metrics.all import families
from tcsae.evaluate.metrics.redundancy import BLOCK
from tcsae.system.dense_product import linear
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.temporal_sae import TemporalSAE
from torch import Tensor


def products(W_dec: Tensor) -> float:
    """CPU seconds of the products alone."""
    start = time.process_time()
    for first in range(0, len(W_dec), BLOCK):
        for other in range(first, len(W_dec), BLOCK):
            linear(W_dec[first : first + BLOCK], W_dec[other : other + BLOCK])
    return time.process_time() - start


@torch.no_grad()
def measured(features: int, width: int, active: int, rows: int) -> dict[str, object]:
    """One width's record."""
    torch.manual_seed(0)
    sae = TemporalSAE(width, features, Activation("topk", k=active)).eval()
    sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(features, width), dim=1))
    sae.W_enc.copy_(sae.W_dec.T)
    parts = {
        name: family.accumulator(sae, context=CONTEXT, seed=0)
        for name, family in families().items()
        if family.accumulator is not None
    }
    for first in range(0, rows, 8):
        batch = batch_of(8, first, width, "cpu")
        z_BTF = sae.encode(batch.x_BTD)
        entries, x_hat_BTD = ActiveEntries.from_dense(z_BTF, batch.valid_BT), sae.decode(z_BTF)
        for part in parts.values():
            part.update(batch, entries, x_hat_BTD)
    seconds = {}
    for name, part in parts.items():
        start = time.process_time()
        part.result()
        seconds[name] = round(time.process_time() - start, 3)
    alone = products(sae.W_dec)
    total = sum(seconds.values())
    return {
        "features": features,
        "seconds": seconds,
        "all": round(total, 3),
        "products": round(alone, 3),
        "ratio": round(total / alone, 2),
    }


def main() -> None:
    """Measure every width asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--active", type=int, default=32)
    parser.add_argument("--rows", type=int, default=96, help="of text that the features are active on")
    parser.add_argument("--profile", action="store_true", help="also print where the CPU time goes")
    args = parser.parse_args()
    import sklearn.linear_model  # noqa: F401 - what is loaded once for all SAEs is not what closing one costs

    for features in args.features:
        if args.profile:
            import cProfile
            import pstats

            profile = cProfile.Profile(time.process_time)
            print(json.dumps(profile.runcall(measured, features, args.width, args.active, args.rows)))
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        else:
            print(json.dumps(measured(features, args.width, args.active, args.rows)), flush=True)


if __name__ == "__main__":
    main()
