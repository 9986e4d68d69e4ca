"""Time: how features persist, vary and jump from token to token, each against the chance level that it must beat.

Shapes: B rows, T positions, N tokens, F features, L lags, D model width, G jackknife groups. A pair is valid when both tokens
lie in one row and one document, neither special, padding nor an outlier. Memory O(F·L), and a bounded sample of tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .codes import Codes, Matches, matches, pair_masks
from .gain import refit_gains
from .jackknife import GROUPS, group_of, jackknife
from .lags import LagSums, autocorrelation, variation
from .protocol import Findings, Ledger, TokenBatch, UnitSums
from .results import Curve, Metric
from .runs import RunCounts, followed, smoothness
from .sample import TokenSample
from .similarity import adjacent_cosine, adjacent_similarity, chance, same_token, sample_similarity
from .temporal_definitions import DEFINITIONS

LAGS = 9
"""Lags 1 … 9: what a window of ten tokens, the longest of the study, can see."""
MIN_ACTIVE = 30
"""Active tokens from which a feature's autocorrelation and run length enter an average."""
SAMPLE_TOKENS = 1024


class TemporalStatistics:
    """All temporal metrics of one SAE in one pass."""

    definitions = DEFINITIONS

    def __init__(self, sae, *, context: int, seed: int, lags: int = LAGS):
        device = sae.W_dec.device
        self._sae, self._context, self._lags = sae, context, min(lags, context - 1)
        self._sums = LagSums(sae.n_features, self._lags, device)
        self._runs = RunCounts(sae.n_features, context, device)
        self._sample = TokenSample(SAMPLE_TOKENS, sae.d_model, seed, device)
        self._ledger = Ledger()
        self._tokens_G = torch.zeros(GROUPS, dtype=torch.float64, device=device)
        self._active_F = torch.zeros(sae.n_features, dtype=torch.float64, device=device)

    def update(self, batch: TokenBatch, codes: Codes, x_hat_BTD: Tensor) -> None:
        """Take one batch in."""
        group_N = group_of(batch.units_BT)
        self._tokens_G += torch.bincount(group_N[codes.valid_N], minlength=GROUPS)
        self._active_F += codes.per_feature()
        self._sample.update(batch, codes)
        masks = pair_masks(batch.valid_BT, batch.documents_BT, self._lags)
        found = matches(codes, masks)
        self._sums.update(codes, masks, found, group_N)
        next_E, previous_E = followed(codes, found)
        chances_N, ends_N = self._runs.update(codes, masks, next_E, previous_E)
        units_N, first_N = batch.units_BT.reshape(-1), masks.earlier_LN[1]
        self._ledger.add(units_N[first_N], run_chances=chances_N[first_N], run_ends=ends_N[first_N])
        self._record_pairs(units_N[first_N], first_N, batch, codes, found, x_hat_BTD)
        x_ND = batch.x_BTD.reshape(codes.n_tokens, -1)
        self._record_rows(batch, *smoothness(codes, masks, found, next_E, x_ND))

    def _record_pairs(
        self, units_P: Tensor, first_N: Tensor, batch: TokenBatch, codes: Codes, found: Matches, x_hat_BTD: Tensor
    ) -> None:
        """Everything that is an average over pairs of adjacent tokens."""
        adjacent = found.lag_M == 1
        earlier, later = found.earlier_M[adjacent], found.later_M[adjacent]
        product = codes.value_E[earlier] * codes.value_E[later]
        dot_N = torch.zeros(codes.n_tokens, dtype=torch.float64, device=first_N.device)
        dot_N.index_add_(0, codes.token_E[earlier], product)
        square_N = codes.per_token(codes.value_E**2)
        t = first_N.nonzero().squeeze(1)
        energy = (square_N[t] + square_N[t + 1]) / 2
        self._ledger.add(units_P, variation=(2 * energy - 2 * dot_N[t]).clamp(min=0), energy=energy)
        cosine, jaccard = adjacent_similarity(codes, found, first_N)
        for name, values in (
            ("cosine", cosine),
            ("jaccard", jaccard),
            ("activation_cosine", adjacent_cosine(batch.x_BTD, first_N)),
            ("reconstruction_cosine", adjacent_cosine(x_hat_BTD, first_N)),
        ):
            defined = torch.isfinite(values)
            self._ledger.add(units_P[defined], **{name: values[defined], f"{name}_n": torch.ones_like(values[defined])})

    def _record_rows(self, batch: TokenBatch, jump_B: Tensor, features_B: Tensor) -> None:
        """The smoothness of every row, credited to the unit of its first counted token."""
        unit_B = batch.units_BT.gather(1, batch.valid_BT.int().argmax(1, keepdim=True)).squeeze(1)
        some = features_B > 0
        self._ledger.add(unit_B[some], smoothness=jump_B[some], smoothness_n=torch.ones_like(jump_B[some]))

    def result(self) -> Findings:
        """All temporal metrics, the curves over the lag and over the run length, and the numbers of every feature."""
        findings = Findings(sums=self._plain_sums())
        self._similarities(findings)
        self._autocorrelations(findings)
        self._refitted(findings)
        self._run_lengths(findings)
        return findings

    def _plain_sums(self) -> dict[str, UnitSums]:
        ratio = self._ledger.ratio
        return {
            "temporal_variation": replace(ratio("variation", "energy", "1"), definition="temporal_variation", n=self._pairs()),
            "activation_adjacent_cosine": self._mean("activation_cosine", "activation_adjacent_cosine"),
            "reconstruction_adjacent_cosine": self._mean("reconstruction_cosine", "reconstruction_adjacent_cosine"),
            "smoothness": self._mean("smoothness", "smoothness"),
            "run_length": replace(ratio("run_chances", "run_ends", "tokens"), definition="run_length"),
        }

    def _mean(self, name: str, definition: str, *, offset: float = 0.0, scale: float = 1.0) -> UnitSums:
        unit = DEFINITIONS[definition].unit
        return replace(self._ledger.ratio(name, f"{name}_n", unit, offset=offset, scale=scale), definition=definition)

    def _pairs(self) -> int:
        return int(self._sums.pairs_GL[:, 0].sum())

    def _similarities(self, findings: Findings) -> None:
        """Adjacent cosine and Jaccard corrected for chance; the same token far away."""
        cosine_MM, jaccard_MM, activation_MM = sample_similarity(self._sample)
        for name, similarity_MM in (("cosine", cosine_MM), ("jaccard", jaccard_MM)):
            expected, n = chance(self._sample, similarity_MM)
            key = f"adjacent_{name}"
            findings.sums[f"{key}_raw"] = self._mean(name, f"{key}_raw")
            findings.metrics[f"{key}_chance"] = _metric(f"{key}_chance", expected, n)
            if math.isfinite(expected) and expected < 1:
                findings.sums[key] = self._mean(name, key, offset=-expected / (1 - expected), scale=1 / (1 - expected))
            else:
                findings.metrics[key] = _metric(key, math.nan, 0)
        expected, _ = chance(self._sample, cosine_MM)
        for prefix, similarity_MM in (("same_token", cosine_MM), ("same_token_activation", activation_MM)):
            kinds = same_token(self._sample, similarity_MM, self._context)
            (near, n), (far, _) = kinds["near"], kinds["far"]
            findings.metrics[prefix] = _metric(prefix, far, n)
            findings.metrics[f"{prefix}_near"] = _metric(f"{prefix}_near", near, n)

    def _enough(self) -> Tensor:
        return self._active_F >= MIN_ACTIVE

    def _autocorrelations(self, findings: Findings) -> None:
        sums, enough = self._sums, self._enough()
        for suffix, centred in (("", True), ("_uncentred", False)):
            per_lag = []
            for at in range(self._lags):

                def mean(pairs_L: Tensor, sums_SFL: Tensor, at: int = at, centred: bool = centred) -> float:
                    found_F = autocorrelation(pairs_L[at : at + 1], sums_SFL[:, :, at : at + 1], centred=centred)
                    return float(found_F[enough].nanmean())

                definition = f"lag_autocorrelation{suffix}"
                metric = _jackknife_first(mean, sums.pairs_GL, sums.sums_GSFL, at, "1", definition, int(enough.sum()))
                per_lag.append(metric)
            name = f"lag1_autocorrelation{suffix}"
            findings.metrics[name] = per_lag[0].model_copy(update={"definition": name})
            findings.curves[f"lag_autocorrelation{suffix}"] = Curve(
                x=[float(lag) for lag in range(1, self._lags + 1)],
                y=[m.value for m in per_lag],
                low=[m.low for m in per_lag],
                high=[m.high for m in per_lag],
                x_label="lag in tokens",
                y_label="autocorrelation, mean over features",
                definition=f"lag_autocorrelation{suffix}",
            )
        every = autocorrelation(sums.pairs_GL.sum(0), sums.sums_GSFL.sum(0), centred=True)
        findings.per_feature["lag_autocorrelation"] = every.cpu().numpy()

    def _refitted(self, findings: Findings) -> None:
        """Temporal variation after refitting gains, and how large the gains are."""
        sae = self._sae
        gain_F = refit_gains(self._sample, sae.W_dec.detach(), sae.b_dec.detach())
        weight_F = gain_F * sae.W_dec.detach().double().norm(dim=1)

        def refitted(_: Tensor, sums_SFL: Tensor) -> float:
            top_F, bottom_F = variation(sums_SFL, weight_F)
            return float(top_F.sum() / bottom_F.sum())

        key = "temporal_variation_refit"
        findings.metrics[key] = jackknife(
            refitted, self._sums.pairs_GL[:, 0], self._sums.sums_GSFL, unit="1", definition=key, n=self._pairs()
        )
        _, energy_F = variation(self._sums.sums_GSFL.sum(0), sae.W_dec.detach().double().norm(dim=1))
        fitted = torch.isfinite(gain_F)
        gain = float((energy_F * gain_F)[fitted].sum() / energy_F[fitted].sum()) if bool(fitted.any()) else math.nan
        findings.metrics["refit_gain"] = _metric("refit_gain", gain, int(fitted.sum()))
        covered = float(energy_F[fitted].sum() / energy_F.sum())
        findings.metrics["refit_coverage"] = _metric("refit_coverage", covered, len(gain_F))

    def _run_lengths(self, findings: Findings) -> None:
        runs, density_F = self._runs, self._active_F / self._tokens_G.sum()
        length_F = runs.chances_F / runs.ends_F
        expected = float(runs.chances_F.sum() / (runs.chances_F * (1 - density_F)).sum())
        findings.metrics["run_length_geometric"] = _metric("run_length_geometric", expected, int(runs.chances_F.sum()))
        observed = float(runs.chances_F.sum() / runs.ends_F.sum())
        findings.metrics["run_length_excess"] = _metric("run_length_excess", observed / expected, int(runs.ends_F.sum()))
        findings.per_feature["run_length"] = torch.where(self._enough(), length_F, torch.nan).cpu().numpy()
        for key, survival_T in (("run_length", runs.survival()), ("run_length_geometric", runs.geometric_survival(density_F))):
            shown = int((survival_T > 1e-4).sum()) + 1
            y = [1.0, *survival_T[:shown].tolist()]
            findings.curves[key] = Curve(
                x=[float(length) for length in range(len(y))],
                y=y,
                x_label="tokens",
                y_label="share of runs that last longer",
                definition=f"{key}_curve",
            )


def _jackknife_first(statistic, pairs_GL: Tensor, sums_GSFL: Tensor, at: int, unit: str, definition: str, n: int) -> Metric:
    """Jackknife with the pairs of one lag as the groups' weight."""
    metric = jackknife(
        lambda _, pairs_L, sums_SFL: statistic(pairs_L, sums_SFL), pairs_GL[:, at], pairs_GL, sums_GSFL, unit=unit,
        definition=definition, n=n,
    )  # fmt: skip
    return metric


def _metric(key: str, value: float, n: int) -> Metric:
    return Metric(value=value, unit=DEFINITIONS[key].unit, n=n, definition=key)
