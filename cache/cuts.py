"""Where windows begin: cutting runs of usable tokens, and shuffling what was cut. Pure; knows numbers only."""

from __future__ import annotations

import numpy as np


def cut_windows(
    usable_RT: np.ndarray, documents_RT: np.ndarray, window: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Cut every run of usable tokens of one document in one row into windows, from a random offset.

    A run of n tokens gives n // window windows side by side; where among its n % window spare tokens they begin is uniform.

    Args:
        usable_RT: bool, rows × positions.
        documents_RT: document of every token.
        window: tokens per window.
        rng: decides the offsets.

    Returns:
        Flat index (row · T + position) of every window's first token, in order; and the usable tokens in no window.

    """
    first_RT = usable_RT.copy()
    first_RT[:, 1:] &= ~usable_RT[:, :-1] | (documents_RT[:, 1:] != documents_RT[:, :-1])
    begins = first_RT.reshape(-1).nonzero()[0]
    # A run's length: the usable tokens from its beginning to the next one's.
    before = np.concatenate([[0], np.cumsum(usable_RT.reshape(-1))])
    lengths = np.diff(np.append(before[begins], before[-1]))
    counts = lengths // window
    offsets = rng.integers(0, lengths % window + 1)
    at_run = np.repeat(begins + offsets, counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return at_run + within * window, int((lengths - counts * window).sum())


def shuffle_windows(
    at: np.ndarray, documents_RT: np.ndarray, together: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Put windows into random order, every ``together`` of them in a row from one row and document.

    Returns:
        Their first tokens in that order, and how many windows were left out for want of company.

    """
    at = rng.permutation(at)
    if together == 1:
        return at, 0
    kin = np.stack([at // documents_RT.shape[1], documents_RT.reshape(-1)[at]])
    order = np.lexsort(kin)  # stable: random among kin
    at, kin = at[order], kin[:, order]
    begins = np.append(True, (kin[:, 1:] != kin[:, :-1]).any(0)).nonzero()[0] if len(at) else np.empty(0, int)
    counts = np.diff(np.append(begins, len(at)))
    within = np.arange(len(at)) - np.repeat(begins, counts)
    whole = within < np.repeat(counts // together * together, counts)
    return rng.permutation(at[whole].reshape(-1, together)).reshape(-1), int((~whole).sum())
