"""The slow, obviously right version of everything fast: plain loops, float64, no cleverness. One section per stage."""

from __future__ import annotations

import math

# --- train: losses as loops over tokens, pairs and features, in float64 -------------


def loss_pairs(n: int, w: int, lag: int = 1, partner=None) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Which (window, position) is compared with which; ``partner`` [n][w − 1] holds flat token indices, −1 for none."""
    if partner is None:
        return [((i, t), (i, t + lag)) for i in range(n) for t in range(w - lag)]
    return [((i, t), divmod(int(partner[i][t]), w)) for i in range(n) for t in range(w - 1) if partner[i][t] >= 0]


def loss_temporal(form: str, z, pairs, *, temperature: float = 0.1, similarity: str = "cosine", group=None) -> float:
    """L_temp of codes ``z`` [windows, positions, features], one Python number at a time."""
    z = z.double().tolist()
    windows, positions = len(z), len(z[0])

    def code(place):
        return z[place[0]][place[1]]

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    def cosine(a, b):
        norms = math.sqrt(dot(a, a) * dot(b, b))
        return dot(a, b) / norms if norms > 0 else 0.0

    if form == "window_mean":
        total = 0.0
        for window in z:
            mean = [sum(column) / positions for column in zip(*window, strict=True)]
            total += sum((x - m) ** 2 for token in window for x, m in zip(token, mean, strict=True))
        return total / (windows * positions)
    if not pairs:
        return 0.0
    both = [(code(a), code(b)) for a, b in pairs]
    squared = sum((x - y) ** 2 for a, b in both for x, y in zip(a, b, strict=True)) / len(both)
    if form == "pairwise":
        return squared
    if form == "normalised":
        return squared / (sum(dot(token, token) for window in z for token in window) / (windows * positions))
    if form == "l2":
        return sum(dot(a, a) + dot(b, b) for a, b in both) / len(both)
    if form == "l1":
        return sum(abs(x - y) for a, b in both for x, y in zip(a, b, strict=True)) / len(both)
    if form == "cosine":
        return sum(1 - cosine(a, b) for a, b in both) / len(both)
    compare = cosine if similarity == "cosine" else dot
    total = 0.0
    for i in range(len(both)):
        negatives = [j for j in range(len(both)) if j == i or group is None or group[i] != group[j]]
        forwards = [compare(both[i][0], both[j][1]) / temperature for j in negatives]
        backwards = [compare(both[j][0], both[i][1]) / temperature for j in negatives]
        own = compare(*both[i]) / temperature
        total += math.log(sum(math.exp(s - own) for s in forwards)) + math.log(sum(math.exp(s - own) for s in backwards))
    return total / (2 * len(both))


def sae_codes(pre, kind: str, k: int | None = None, threshold=None) -> list[list[float]]:
    """Codes [tokens, features] of pre-activations, by sorting. ``threshold``: one number per feature (jumprelu)."""
    rows = pre.double().tolist()
    if kind == "relu":
        return [[max(v, 0.0) for v in row] for row in rows]
    if kind == "jumprelu":
        return [[v if v > max(t, 0.0) else 0.0 for v, t in zip(row, threshold.tolist(), strict=True)] for row in rows]
    if kind == "topk":
        kept = [{i for i, _ in sorted(enumerate(row), key=lambda e: -e[1])[:k]} for row in rows]
    else:
        best = sorted(((v, n, i) for n, row in enumerate(rows) for i, v in enumerate(row)), reverse=True)[: k * len(rows)]
        kept = [{i for _, m, i in best if m == n} for n in range(len(rows))]
    return [[max(v, 0.0) if i in keep else 0.0 for i, v in enumerate(row)] for row, keep in zip(rows, kept, strict=True)]


def aux_k_loss(residual, pre, decoder, dead, k: int) -> float:
    """AuxK: every token's residual rebuilt by its k strongest dead features; mean squared error summed over width."""
    dead = [i for i, flag in enumerate(dead.tolist()) if flag]
    total = 0.0
    for error, row in zip(residual.double().tolist(), pre.double().tolist(), strict=True):
        chosen = sorted(dead, key=lambda i: -row[i])[:k]
        rebuilt = [sum(max(row[i], 0.0) * float(decoder[i][d]) for i in chosen) for d in range(len(error))]
        total += sum((e - r) ** 2 for e, r in zip(error, rebuilt, strict=True))
    return total / len(residual) if dead else 0.0
