"""The slow, obviously right version of everything fast: plain loops, float64, no cleverness. One section per stage."""

from __future__ import annotations

import math

import torch

# --- train: losses as loops over tokens, pairs and features, in float64 -------------


def loss_pairs(n: int, w: int, lag: int = 1, partner=None) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Which (window, position) is compared with which; ``partner`` [n][w − 1] holds flat token indices, −1 for none."""
    if partner is None:
        return [((i, t), (i, t + lag)) for i in range(n) for t in range(w - lag)]
    return [((i, t), divmod(int(partner[i][t]), w)) for i in range(n) for t in range(w - 1) if partner[i][t] >= 0]


def feature_weights(z, fired, tokens: int, rule: str) -> list[float]:
    """a_i of METHOD.md from codes ``z`` [windows, positions, features] and on how many of ``tokens`` each fired."""
    density, wanted, known = [count / tokens for count in fired], [], []
    for i, count in enumerate(fired):
        if rule == "density":
            wanted.append(density[i] ** -0.5 if count else 0.0)
            known.append(count >= 20)
            continue
        before = [float(window[t][i]) for window in z for t in range(len(window) - 1)]
        after = [float(window[t + 1][i]) for window in z for t in range(len(window) - 1)]
        means = sum(before) / len(before), sum(after) / len(after)
        top = sum((a - means[0]) * (b - means[1]) for a, b in zip(before, after, strict=True))
        bottom = sum((a - means[0]) ** 2 for a in before) * sum((b - means[1]) ** 2 for b in after)
        wanted.append(max(0.0, top / math.sqrt(bottom)) if bottom > 0 else 0.0)
        known.append(sum(v > 0 for v in before + after) >= 20 and bottom > 0)
    shares = [p if k else 0.0 for p, k in zip(density, known, strict=True)]
    mean = sum(p * w for p, w in zip(shares, wanted, strict=True)) / max(sum(shares), 1e-12)
    if mean <= 0:
        return [1.0] * len(fired)
    return [min(10.0, max(0.1, w / mean)) if k else 1.0 for w, k in zip(wanted, known, strict=True)]


def loss_temporal(
    form: str, z, pairs, *, temperature: float = 0.1, similarity: str = "cosine", group=None, weights=None
) -> float:
    """L_temp of codes ``z`` [windows, positions, features], one Python number at a time.

    ``weights``: λ2 of every feature in units of the term's, for terms that are sums over features.
    """
    if weights is not None:
        alone = (loss_temporal(form, z[..., i : i + 1], pairs) for i in range(z.shape[-1]))
        return sum(float(weight) * loss for weight, loss in zip(weights, alone, strict=True))
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
    if form == "squared_norms":
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
        total += math.log(sum(math.exp(s - own) for s in forwards)) + math.log(
            sum(math.exp(s - own) for s in backwards)
        )
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
        best = sorted(((v, n, i) for n, row in enumerate(rows) for i, v in enumerate(row)), reverse=True)[
            : k * len(rows)
        ]
        kept = [{i for _, m, i in best if m == n} for n in range(len(rows))]
    return [
        [max(v, 0.0) if i in keep else 0.0 for i, v in enumerate(row)] for row, keep in zip(rows, kept, strict=True)
    ]


def aux_k_loss(residual, pre, decoder, dead, k: int) -> float:
    """AuxK: every token's residual rebuilt by its k strongest dead features; mean squared error summed over width."""
    dead = [i for i, flag in enumerate(dead.tolist()) if flag]
    total = 0.0
    for error, row in zip(residual.double().tolist(), pre.double().tolist(), strict=True):
        chosen = sorted(dead, key=lambda i: -row[i])[:k]
        rebuilt = [sum(max(row[i], 0.0) * float(decoder[i][d]) for i in chosen) for d in range(len(error))]
        total += sum((e - r) ** 2 for e, r in zip(error, rebuilt, strict=True))
    return total / len(residual) if dead else 0.0


# --- train: one whole step by autograd in float64, every pair written out ---------------------------------------------


def step_terms_and_gradients(sae, x, objective, partner=None, dead=None):
    """Terms of the loss and the gradients of the weights, thresholds of jumprelu included; ``x`` [windows, tokens,
    width].
    """
    weights = {
        name: getattr(sae, name).detach().double().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    }
    x = x.double()
    n, w, _ = x.shape
    pre = (x - weights["b_dec"] if sae.subtract_b_dec else x) @ weights["W_enc"] + weights["b_enc"]
    jumps = sae.activation.kind == "jumprelu"
    z = pre * (pre > sae.threshold.detach().double()) if jumps else _step_codes(pre, sae.activation)
    codes = z
    if objective.current_only:  # of pairs: the earlier tokens have codes, by a choice of their own, and nothing else
        codes = torch.cat([_step_codes(pre[:, at : at + 1], sae.activation) for at in range(2)], 1)
        z, pre, x, w = codes[:, 1:], pre[:, 1:], x[:, 1:], 1
    residual = x - (z @ weights["W_dec"] + weights["b_dec"])
    terms = {"reconstruction": (residual**2).sum() / (n * w), "error": (residual**2).sum().detach() / (n * w)}
    if objective.groups:
        terms["reconstruction"] = 0.0
        for size, weight in objective.groups:
            prefix = sum(z[..., i : i + 1] * weights["W_dec"][i] for i in range(size)) + weights["b_dec"]
            terms["reconstruction"] = terms["reconstruction"] + weight * ((x - prefix) ** 2).sum() / (n * w)
    norms = (weights["W_dec"] ** 2).sum(1).sqrt() if objective.decoder_norms else 1.0
    terms["sparsity"] = (z > 0).sum().double() / (n * w) if jumps else (z * norms).sum() / (n * w)
    l0, aim = (z > 0).sum(-1).flatten().tolist(), objective.l0_aim
    if jumps and aim:
        terms["sparsity"] = z.new_tensor(sum(2 / aim * (count - aim) ** 2 for count in l0) / (n * w))
    term = objective.temporal
    if term.active:
        pairs = [((a, b), (c, d)) for (a, b), (c, d) in loss_pairs(n, codes.shape[1], term.lag, partner)]
        seen, weights_of = range(term.n_features), term.feature_weights
        if weights_of is None:
            terms["temporal"] = _step_temporal(codes[..., : term.n_features], term, pairs)
        else:
            alone = [_step_temporal(codes[..., i : i + 1], term, pairs) for i in seen]
            terms["temporal"] = sum(weights_of[i] * alone[i] for i in seen)
    if objective.aux_weight > 0 and dead is not None and dead.any():
        columns = [f for f in range(len(dead)) if dead[f]]
        strongest = pre[..., columns].topk(min(objective.aux_k, len(columns)), dim=-1)
        aux = torch.zeros_like(pre[..., columns]).scatter(-1, strongest.indices, strongest.values.clamp(min=0))
        left = residual.detach()
        terms["auxiliary"] = ((left - aux @ weights["W_dec"][columns]) ** 2).sum() / (n * w)
        if objective.aux_normalised:
            mean = left.sum((0, 1)) / (n * w)
            terms["auxiliary"] = terms["auxiliary"] / (
                sum(((e - mean) ** 2).sum() for e in left.flatten(0, 1)) / (n * w)
            )
    shares = {"reconstruction": 1.0, "sparsity": objective.sparsity_weight}
    shares |= {"temporal": term.weight, "auxiliary": objective.aux_weight}
    total = sum(shares[name] * terms[name] for name in shares if name in terms)
    found = torch.autograd.grad(total, [*weights.values(), z], allow_unused=True)
    gradients = dict(zip(weights, found[:-1], strict=True))
    if jumps:
        pulls = [objective.sparsity_weight * (4 / aim * (count - aim) if aim else 1.0) for count in l0]
        gradients["threshold"] = _to_thresholds(sae, pre.detach().flatten(0, 1), found[-1].flatten(0, 1), pulls)
    return terms | {"total": total}, gradients, (z > 0).sum((0, 1))


def _to_thresholds(sae, pre, to_z, pulls):
    """JumpReLU, arXiv 2407.14435, eq 11 and 12: the rectangle of width ε in the place of the step's derivative.

    ``pulls``: the slope of the penalty in the L0 of every token.
    """
    n_tokens, width, gradient = len(pre), sae.activation.bandwidth, torch.zeros(sae.n_features, dtype=torch.float64)
    for token in range(n_tokens):
        for feature in range(sae.n_features):
            threshold = float(sae.threshold.detach()[feature])
            if abs(float(pre[token, feature]) - threshold) < width / 2:
                gradient[feature] -= (threshold * float(to_z[token, feature]) + pulls[token] / n_tokens) / width
    return gradient


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
    if term.form == "squared_norms":
        return sum((a**2).sum() + (b**2).sum() for a, b in both) / len(both)
    if term.form == "l1":
        return sum((a - b).abs().sum() for a, b in both) / len(both)
    if term.form == "cosine":
        return sum(1 - (a * b).sum() / ((a**2).sum() * (b**2).sum() + 1e-24).sqrt() for a, b in both) / len(both)
    if term.form == "contrastive":
        return _step_contrastive(both, term, [a for (a, _), _ in pairs], [b for _, (b, _) in pairs])
    squared = sum(((a - b) ** 2).sum() for a, b in both) / len(both)
    return squared if term.form == "pairwise" else squared / ((z**2).sum() / z[..., 0].numel()).clamp(min=1e-12)


def _step_contrastive(both, term, windows, other_windows):
    """Symmetric InfoNCE, one pair at a time; pairs within one window are no negatives of each other."""

    def similar(a, b):
        if term.similarity == "dot":
            return (a * b).sum() / term.temperature
        return (a * b).sum() / (((a**2).sum() + 1e-12) * ((b**2).sum() + 1e-12)).sqrt() / term.temperature

    total = 0.0
    for i in range(len(both)):
        inside = windows[i] == other_windows[i]
        among = [j for j in range(len(both)) if j == i or not (inside and windows[j] == windows[i])]
        own = similar(*both[i])
        total = total - own + torch.stack([similar(both[i][0], both[j][1]) for j in among]).logsumexp(0)
        total = total - own + torch.stack([similar(both[j][0], both[i][1]) for j in among]).logsumexp(0)
    return total / (2 * len(both))


def txc_window(sae, x_WD):
    """Code [F] and reconstruction [W, D] of one window by a crosscoder, position by position and feature by feature."""
    w, d = x_WD.shape
    pre = []
    for f in range(sae.n_features):
        total = sae.b_enc[f]
        for p in range(w):
            for i in range(d):
                total = total + x_WD[p, i] * sae.W_enc[p * d + i, f]
        pre.append(total)
    largest = sorted(range(len(pre)), key=lambda f: pre[f].item(), reverse=True)[: sae.k]
    z = [pre[f] if f in largest and pre[f].item() > 0 else 0 * pre[f] for f in range(len(pre))]
    x_hat = [sae.b_dec[i] + sum(z[f] * sae.W_dec[f, i] for f in largest) for i in range(w * d)]
    return torch.stack(z), torch.stack(x_hat).view(w, d), pre


def txc_loss(sae, x_NWD, dead, aux_k: int, aux_weight: float):
    """Mean over tokens of the squared error, and AuxK: the strongest dead features on what is left of each window."""
    n, w, _ = x_NWD.shape
    error = auxiliary = 0
    for x_WD in x_NWD:
        _, x_hat_WD, pre = txc_window(sae, x_WD)
        error = error + ((x_WD - x_hat_WD) ** 2).sum() / (n * w)
        left = (x_WD - x_hat_WD).detach().flatten()
        strongest = sorted(dead, key=lambda f: pre[f].item(), reverse=True)[:aux_k]
        guess = sum(torch.clamp(pre[f], min=0) * sae.W_dec[f] for f in strongest)
        auxiliary = auxiliary + ((left - guess) ** 2).sum() / (n * w)
    return error + aux_weight * auxiliary


def tfa_sequence(sae, x_LD):
    """Predicted and novel codes [L, F] and reconstruction [L, D] of one sequence, token by token and head by head."""
    features, heads = sae.n_features, sae.heads
    encoder = sae.W_dec.T if sae.tied else sae.encoder
    zero = torch.zeros(features, dtype=x_LD.dtype)
    codes = [torch.clamp(sae.scale * (x - sae.b_dec) @ encoder, min=0) for x in x_LD]
    seen = [zero, *codes[:-1]]  # what stands at each place
    keys = [sae.keys.weight @ c + sae.keys.bias for c in seen]
    values = [sae.values.weight @ c + sae.values.bias for c in seen]
    predicted, novel, x_hat = [], [], []
    for t, x in enumerate(x_LD):
        query = sae.queries.weight @ codes[t] + sae.queries.bias
        narrow, wide = len(query) // heads, features // heads
        mixed = []
        for h in range(heads):
            mine = slice(h * narrow, (h + 1) * narrow)
            scores = [(query[mine] @ keys[j][mine]).item() / math.sqrt(narrow) for j in range(t + 1)]
            shares = [torch.exp(query[mine] @ keys[j][mine] / math.sqrt(narrow) - max(scores)) for j in range(t + 1)]
            own = slice(h * wide, (h + 1) * wide)
            mixed.append(sum(share * values[j][own] for j, share in enumerate(shares)) / sum(shares))
        direction = torch.clamp(sae.output.weight @ torch.cat(mixed) + sae.output.bias, min=0)
        explained, centred = direction @ sae.W_dec, x - sae.b_dec
        times = (explained @ centred) / (torch.sqrt((explained**2).sum()) + 1e-6) ** 2
        rest = torch.clamp(sae.scale * (centred - times * explained) @ encoder, min=0)
        if sae.k is not None:
            largest = sorted(range(features), key=lambda f: rest[f].item(), reverse=True)[: sae.k]
            rest = torch.stack([rest[f] if f in largest else 0 * rest[f] for f in range(features)])
        predicted.append(times * direction)
        novel.append(rest)
        x_hat.append((predicted[-1] + rest) @ sae.W_dec + sae.b_dec)
    return torch.stack(predicted), torch.stack(novel), torch.stack(x_hat)


def row_sequences(valid, documents) -> list[list[tuple[int, int]]]:
    """The tokens (row, position) that count, by row and document, in order."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for r, row in enumerate(valid.tolist()):
        for t, counts in enumerate(row):
            if counts:
                found.setdefault((r, int(documents[r][t])), []).append((r, t))
    return list(found.values())


# --- evaluate: fidelity, token by token in float64 ----------------------------------


def eval_losses(clean_ND, spliced_ND, W_VD, softcap, targets):
    """Cross-entropy of clean and spliced final states, and KL(clean ‖ spliced), from whole rows of logits."""

    def log_probabilities(states):
        logits = states.double() @ W_VD.double().T
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        return torch.log_softmax(logits, dim=-1)

    p, q = log_probabilities(clean_ND), log_probabilities(spliced_ND)
    at = torch.arange(len(targets))
    return -p[at, targets], -q[at, targets], (p.exp() * (p - q)).sum(-1)


# --- evaluate: feature, temporal and position metrics as loops over rows, tokens and features
# ---------------------------


def metric_pairs(valid, documents, lag: int) -> list[tuple[int, int]]:
    """(row, t) of every valid pair (t, t + lag)."""
    rows, context = len(valid), len(valid[0])
    return [
        (r, t)
        for r in range(rows)
        for t in range(context - lag)
        if valid[r][t] and valid[r][t + lag] and documents[r][t] == documents[r][t + lag]
    ]


def metric_autocorrelation(z, pairs, lag: int, *, centred: bool) -> list[float]:
    """Per feature; NaN where undefined."""
    found = []
    for i in range(len(z[0][0])):
        x = [z[r][t][i] for r, t in pairs]
        y = [z[r][t + lag][i] for r, t in pairs]
        mean_x, mean_y = (sum(v) / len(v) if centred and v else 0.0 for v in (x, y))
        top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        bottom = sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)
        found.append(top / math.sqrt(bottom) if bottom > 1e-18 else math.nan)
    return found


def metric_variation(z, pairs, gain=None) -> float:
    """Σ ‖g z_t − g z_t+1‖² / Σ ½ (‖g z_t‖² + ‖g z_t+1‖²)."""
    gain = [1.0] * len(z[0][0]) if gain is None else gain
    top = bottom = 0.0
    for r, t in pairs:
        for g, a, b in zip(gain, z[r][t], z[r][t + 1], strict=True):
            top += (g * a - g * b) ** 2
            bottom += (g * a) ** 2 / 2 + (g * b) ** 2 / 2
    return top / bottom if bottom else math.nan


def metric_cosine(a, b) -> float:
    """NaN with a zero vector."""
    norms = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms > 0 else math.nan


def metric_jaccard(a, b) -> float:
    """NaN of two empty sets."""
    one, other = ({i for i, v in enumerate(values) if v != 0} for values in (a, b))
    return len(one & other) / len(one | other) if one | other else math.nan


def metric_runs(z, valid, documents) -> list[tuple[int, int, bool, bool]]:
    """(feature, length, seen to begin, seen to end) of every run of activity."""
    follows = set(metric_pairs(valid, documents, 1))
    runs = []
    for r in range(len(z)):
        for i in range(len(z[0][0])):
            t = 0
            while t < len(z[0]):
                if not (valid[r][t] and z[r][t][i] != 0):
                    t += 1
                    continue
                start = t
                while (r, t) in follows and z[r][t + 1][i] != 0:
                    t += 1
                runs.append((i, t - start + 1, (r, start - 1) in follows, (r, t) in follows))
                t += 1
    return runs


def metric_smoothness(z, x, valid, documents) -> float:
    """S of arXiv 2511.05541, section 4.3; NaN where no row has a feature with a pair."""
    rows = []
    for r in range(len(z)):
        pairs = [t for row, t in metric_pairs(valid, documents, 1) if row == r]
        jumps = []
        for i in range(len(z[0][0])):
            if not any(valid[r][t] and z[r][t][i] != 0 for t in range(len(z[0]))):
                continue
            largest = [
                abs(z[r][t][i] - z[r][t + 1][i]) / math.dist(x[r][t], x[r][t + 1])
                for t in pairs
                if (z[r][t][i] != 0 or z[r][t + 1][i] != 0) and math.dist(x[r][t], x[r][t + 1]) > 0
            ]
            if largest:
                jumps.append(max(largest))
        if jumps:
            rows.append(sum(jumps) / len(jumps))
    return sum(rows) / len(rows) if rows else math.nan


def metric_eta_squared(values_by_position) -> float:
    """Bias-corrected η² of one feature from its values at each position (lists); NaN where undefined."""
    groups = [group for group in values_by_position if group]
    everything = [v for group in groups for v in group]
    n, positions = len(everything), len(groups)
    mean = sum(everything) / n
    total = sum((v - mean) ** 2 for v in everything)
    between = sum(len(g) * (sum(g) / len(g) - mean) ** 2 for g in groups)
    if total < 1e-12 or n <= positions:
        return math.nan
    return (between - (positions - 1) * (total - between) / (n - positions)) / total


def metric_information(fires_by_position) -> float:
    """Mutual information of firing and position in nats, not corrected."""
    n = sum(len(group) for group in fires_by_position)
    total = 0.0
    for state in (True, False):
        p_state = sum(group.count(state) for group in fires_by_position) / n
        for group in fires_by_position:
            joint = group.count(state) / n
            if joint > 0:
                total += joint * math.log(joint / (p_state * len(group) / n))
    return total


# --- cache: a store's windows and statistics, one token at a time -------------------------------


def cache_runs(tokens_usable, documents):
    """Runs of consecutive usable tokens of one document, as (row, first position, length); plain loops."""
    runs = []
    for row, (usable, document) in enumerate(zip(tokens_usable, documents, strict=True)):
        start = None
        for t in range(len(usable) + 1):
            ends = t == len(usable) or not usable[t] or (start is not None and document[t] != document[t - 1])
            if start is not None and ends:
                runs.append((row, start, t - start))
                start = None
            if start is None and t < len(usable) and usable[t]:
                start = t
    return runs


def cache_statistics(x, flags, factor=10):
    """Mean, variance, norms of activations ``x`` [rows, positions, width] given as float64, tokens flagged 0 only."""
    norms = [[math.sqrt(sum(v * v for v in token)) for token in row] for row in x.tolist()]
    ordinary = sorted(n for ns, fs in zip(norms, flags, strict=True) for n, f in zip(ns, fs, strict=True) if f == 0)
    middle = len(ordinary) // 2
    median = ordinary[middle] if len(ordinary) % 2 else (ordinary[middle - 1] + ordinary[middle]) / 2
    kept = [
        token
        for row, ns, fs in zip(x.tolist(), norms, flags, strict=True)
        for token, n, f in zip(row, ns, fs, strict=True)
        if f == 0 and n <= factor * median
    ]
    mean = [sum(column) / len(kept) for column in zip(*kept, strict=True)]
    return {
        "n": len(kept),
        "median": median,
        "over": len(ordinary) - len(kept),
        "mean": mean,
        "variance": sum((v - m) ** 2 for token in kept for v, m in zip(token, mean, strict=True)) / len(kept),
        "mean_square": sum(v * v for token in kept for v in token) / len(kept),
    }


def eval_reconstruction(x_ND, sae) -> dict[str, float]:
    """Every reconstruction metric of an SAE on tokens x, one token at a time."""
    mean = x_ND.double().mean(0)
    rows = []
    for x in x_ND:
        z = sae.encode(x).detach().double()
        x_hat = sae.decode(z.float()).detach().double()
        x = x.double()
        norms = sae.W_dec.detach().double().norm(dim=1)
        rows.append({
            "error": float(((x - x_hat) ** 2).sum()), "spread": float(((x - mean) ** 2).sum()),
            "cosine": float(x @ x_hat / x.norm() / x_hat.norm()), "l0": float((z > 0).sum()), "l1": float(z @ norms),
            "ratio": float(x_hat.norm() / x.norm()), "square": float(x_hat @ x_hat), "dot": float(x_hat @ x),
        })  # fmt: skip
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    n = len(rows)
    return {
        "mse_per_token": total["error"] / n,
        "mse_per_element": total["error"] / n / x_ND.shape[1],
        "explained_variance": 1 - total["error"] / total["spread"],
        "cosine": total["cosine"] / n,
        "l0": total["l0"] / n,
        "l1": total["l1"] / n,
        "norm_ratio": total["ratio"] / n,
        "relative_reconstruction_bias": total["square"] / total["dot"],
    }


# --- extract: rows of text, one token at a time -----------------------------------------------------------------------


def rows_by_hand(documents, packing: str, context: int, bos: int | None):
    """Rows as lists of (token, document number), and the number of dropped tokens, from [(number, token ids), …]."""
    head = [] if bos is None else [bos]
    rows, dropped, row = [], 0, []
    for number, ids in documents:
        for token in ids:
            if not row:
                row = [(first, number) for first in head]
            row.append((token, number))
            if len(row) == context:
                rows.append(row)
                row = []
        if packing == "document":
            dropped += max(0, len(row) - len(head))
            row = []
    return rows, dropped


def lag_correlations(z, fresh, length: int, *, centred: bool) -> list[list[float]]:
    """Autocorrelation of codes ``z`` [tokens, streams, features] at lags 1 … length − 1, from the whole history at
    once.

    ``fresh`` [tokens, streams]: the token does not follow on the one before it. NaN where a feature never varied or no
    pair is.
    """
    tokens, streams, features = z.shape
    z, fresh = z.double().tolist(), fresh.tolist()
    found = []
    for lag in range(1, length):
        row = []
        for f in range(features):
            values = [z[t][s][f] for t in range(tokens) for s in range(streams)]
            mean = sum(values) / len(values) if centred else 0.0
            power = sum((v - mean) ** 2 for v in values) / len(values)
            products = [
                (z[t][s][f] - mean) * (z[t - lag][s][f] - mean)
                for t in range(lag, tokens)
                for s in range(streams)
                if not any(fresh[u][s] for u in range(t - lag + 1, t + 1))
            ]
            row.append(sum(products) / len(products) / power if products and power > 1e-15 else math.nan)
        found.append(row)
    return found


def study_resamples(above, below, counts, chosen, student):
    """A study's effect in every resample: with Student's t for seeds, and by the plain hierarchical bootstrap.

    ``above[side][seed][document]``, ``below`` alike; ``counts[resample][document]``; ``chosen[resample][seed]``;
    ``student[resample]``. Side 0 − side 1.
    """
    n_seeds = len(above[0])

    def difference(seed, weights):
        values = []
        for side in (0, 1):
            total = sum(w * a for w, a in zip(weights, above[side][seed], strict=True))
            values.append(total / sum(w * b for w, b in zip(weights, below[side][seed], strict=True)))
        return values[0] - values[1]

    measured = [difference(seed, [1] * len(counts[0])) for seed in range(n_seeds)]
    mean = sum(measured) / n_seeds
    error = math.sqrt(sum((v - mean) ** 2 for v in measured) / (n_seeds - 1) / n_seeds)
    careful, plain = [], []
    for weights, seeds, t in zip(counts, chosen, student, strict=True):
        effects = [difference(seed, weights) for seed in range(n_seeds)]
        careful.append(sum(effects) / n_seeds + t * error)
        plain.append(sum(effects[seed] for seed in seeds) / n_seeds)
    return careful, plain
