"""Metrics of several seeds of a variant together: whether the same features are found again.

They compare pairs of seeds, so a seed has no value of its own. What stands for it is its jackknife pseudo-value:
S times the mean over all pairs, less S − 1 times the mean over the pairs without it. The mean of these is the mean over
all pairs, and their spread over √S is its standard error, as if they were values of independent seeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
from torch import Tensor

from ...errors import TcsaeError
from ...evaluate.report.wording import listed
from ...evaluate.results import Definition
from ...train.sae.protocol import SparseAutoencoder
from .observations import Observations, Observed
from .stability import MATCHED, stability

_INTERVAL = "over seeds, by leaving out one at a time"
DEFINITIONS = {
    "stability": Definition(
        text="mean over features of the largest cosine of the decoder row with one of another seed of the same "
        "variant, mean over pairs of seeds",
        unit="1",
        better="higher",
        label="stability over seeds",
        interval=_INTERVAL,
    ),
    "stability_matched": Definition(
        text=f"share of features that have a partner of their own at a cosine above {MATCHED} in another seed of the "
        "same variant, mean over pairs of seeds",
        unit="share",
        better="higher",
        label="features found again",
        interval=_INTERVAL,
    ),
}


def add_between_seeds(observations: Observations, metrics: Iterable[str]) -> list[str]:
    """Measure those of ``metrics`` that this file defines, of every variant with three seeds or more at a place.

    Returns:
        A sentence for every variant and place that was left out.

    """
    wanted = [name for name in metrics if name in DEFINITIONS]
    notes: list[str] = []
    if not wanted:
        return notes
    for at in observations.places:
        for variant in dict.fromkeys(name for name, *_ in observations.rows):
            seeds = observations.seeds(variant, at)
            if not seeds:
                continue
            keys = [(variant, seed, *at) for seed in seeds]
            where = f"{listed(wanted)} of {variant} at {' '.join(at)}"
            if len(seeds) < 3:
                notes.append(f"{where} is not measured: it needs three seeds, there are {len(seeds)}")
                continue
            try:
                weights: list[Tensor] = [SparseAutoencoder.load(observations.members[key].run).W_dec for key in keys]
            except TcsaeError as failure:
                notes.append(f"{where} is not measured: {failure}")
                continue
            found = {(a, b): stability(weights[a], weights[b]) for a, b in combinations(range(len(seeds)), 2)}
            values = {
                "stability": {pair: one.mean_max_cosine for pair, one in found.items()},
                "stability_matched": {pair: one.matched_share for pair, one in found.items()},
            }
            for name in wanted:
                for key, value in zip(keys, pseudo_values(values[name], len(seeds)), strict=True):
                    observations.rows[key].metrics[name] = Observed(value, DEFINITIONS[name].unit)
    return notes


def pseudo_values(pairs: dict[tuple[int, int], float], n: int) -> list[float]:
    """The jackknife's, of the mean over the pairs of ``n`` ≥ 3 seeds."""
    everything = float(np.mean(list(pairs.values())))
    without = [float(np.mean([value for pair, value in pairs.items() if seed not in pair])) for seed in range(n)]
    return [n * everything - (n - 1) * left for left in without]
