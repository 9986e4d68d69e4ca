"""Probes without scikit-learn, for tests of everything else: its many small fits take four fifths of a tiny evaluation,
and have tests of their own (tests/evaluate/metrics/probing, tests/evaluate/test_outcomes.py).
"""

from __future__ import annotations

import numpy as np
import pytest
from tcsae.evaluate.metrics.probing.one_vs_rest import FOLDS


def nearest_mean(is_M, fold_M, columns, penalty=1.0):
    """As ``says`` of the probes: which of the two means is nearer, every column in units of its spread."""
    says_M = np.zeros(len(is_M), dtype=bool)
    for fold in range(FOLDS):
        test_M, x_MK = fold_M == fold, columns(fold)
        if x_MK is None or not test_M.any():
            continue
        x_MK = x_MK.astype(np.float64)
        inside_K, outside_K = x_MK[~test_M & is_M].mean(0), x_MK[~test_M & ~is_M].mean(0)
        slope_K = (inside_K - outside_K) / (x_MK[~test_M].var(0) + 1e-6)
        says_M[test_M] = (x_MK[test_M] - (inside_K + outside_K) / 2) @ slope_K > 1e-9
    return says_M


def quick_probes(patch: pytest.MonkeyPatch) -> None:
    """From now on, in this process."""
    patch.setattr("tcsae.evaluate.metrics.probing.one_vs_rest.says", nearest_mean)
