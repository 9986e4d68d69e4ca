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


# --- train: one whole step by autograd in float64, every pair written out -------------------------------------------------------


def step_terms_and_gradients(sae, x, objective, partner=None, dead=None):
    """Terms of the loss and the gradients of the four weights, for relu, topk and batchtopk; ``x`` [windows, positions, width]."""
    import torch

    weights = {name: getattr(sae, name).detach().double().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    x = x.double()
    n, w, _ = x.shape
    pre = (x - weights["b_dec"] if sae.subtract_b_dec else x) @ weights["W_enc"] + weights["b_enc"]
    z = _step_codes(pre, sae.activation)
    residual = x - (z @ weights["W_dec"] + weights["b_dec"])
    terms = {"reconstruction": (residual**2).sum() / (n * w)}
    norms = (weights["W_dec"] ** 2).sum(1).sqrt() if objective.decoder_norms else 1.0
    terms["sparsity"] = (z * norms).sum() / (n * w)
    term = objective.temporal
    if term.active:
        pairs = [((a, b), (c, d)) for (a, b), (c, d) in loss_pairs(n, w, term.lag, partner)]
        terms["temporal"] = _step_temporal(z[..., : term.n_features], term, pairs)
    if objective.aux_weight > 0 and dead is not None and dead.any():
        columns = [f for f in range(len(dead)) if dead[f]]
        strongest = pre[..., columns].topk(min(objective.aux_k, len(columns)), dim=-1)
        aux = torch.zeros_like(pre[..., columns]).scatter(-1, strongest.indices, strongest.values.clamp(min=0))
        terms["auxiliary"] = ((residual.detach() - aux @ weights["W_dec"][columns]) ** 2).sum() / (n * w)
    shares = {"reconstruction": 1.0, "sparsity": objective.sparsity_weight}
    shares |= {"temporal": term.weight, "auxiliary": objective.aux_weight}
    total = sum(shares[name] * value for name, value in terms.items())
    gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    return terms | {"total": total}, dict(zip(weights, gradients, strict=True)), (z > 0).sum((0, 1))


def _step_codes(pre, activation):
    if activation.kind == "relu":
        return pre.clamp(min=0)
    flat = pre.reshape(1, -1) if activation.kind == "batchtopk" else pre.flatten(0, 1)
    k = activation.k * pre[..., 0].numel() if activation.kind == "batchtopk" else activation.k
    bound = flat.detach().sort(1, descending=True).values[:, k - 1 : k]
    return (flat * ((flat >= bound) & (flat > 0))).view_as(pre)


def _step_temporal(z, term, pairs):
    if term.form == "window_mean":
        return ((z - z.mean(1, keepdim=True)) ** 2).sum() / z[..., 0].numel()
    both = [(z[a], z[b]) for a, b in pairs]
    if not both:
        return z.sum() * 0
    if term.partner == "l2":
        return sum((a**2).sum() + (b**2).sum() for a, b in both) / len(both)
    if term.form == "l1":
        return sum((a - b).abs().sum() for a, b in both) / len(both)
    if term.form == "cosine":
        return sum(1 - (a * b).sum() / ((a**2).sum() * (b**2).sum() + 1e-24).sqrt() for a, b in both) / len(both)
    squared = sum(((a - b) ** 2).sum() for a, b in both) / len(both)
    return squared if term.form == "pairwise" else squared / ((z**2).sum() / z[..., 0].numel()).clamp(min=1e-12)
