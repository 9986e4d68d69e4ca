"""Time: how much features persist and change from token to token, each beside what chance alone would give.

Shapes: B rows, T positions, N tokens, F features, L lags, D model width, G jackknife groups. A pair is valid when both
tokens lie in one row and one document, neither special, padding nor an outlier. Memory O(F·L), and a bounded sample of
tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ...train.sae.protocol import SparseCoder
from ..intervals.jackknife import GROUPS, group_of, jackknife, jackknife_band, jackknife_over_features
from ..protocol import Findings, State, SumsByUnit, TokenBatch, UnitSums, add_held, held, plain_metric
from ..results import BOOTSTRAP, JACKKNIFE, Curve, Definition
from .active_entries import ActiveEntries, Matches, matches, pair_masks
from .gain_refit import refit_gains
from .lag_correlation import LagSums, autocorrelation, variation
from .registry import metric
from .run_lengths import RunCounts, followed, geometric_survival, survival
from .similarity import AdjacentPairs, adjacent_cosine, chance, same_token, sample_similarity
from .smoothness import smoothness
from .token_sample import TokenSample

LAGS = 9
"""Lags 1 … 9: what a window of ten tokens, the longest of the study, can see."""
MIN_ACTIVE = 30
"""Active tokens from which a feature's autocorrelation and run length enter an average."""
SAMPLE_TOKENS = 1024
"""Tokens that are compared with one another, far apart or in different documents."""

_PARTS = ("_sums", "_runs", "_sample", "_by_unit")
_GAINS = f"{JACKKNIFE}, the gains held fixed"
_SAMPLE = f"{JACKKNIFE}, leaving a group out of the sample"
_PAIRS = "over valid pairs: both tokens in one row and one document, neither special, padding nor an outlier"

DEFINITIONS = {
    "temporal_variation": Definition(
        text=f"Σ ‖z_t − z_t+1‖² / Σ ½(‖z_t‖² + ‖z_t+1‖²) {_PAIRS}; 0: constant, 2: nothing in common. The same for z "
        "and c·z.",
        unit="1",
        better="lower",
        label="temporal variation",
        group="time",
    ),
    "temporal_variation_refit": Definition(
        text="temporal variation of g_i ‖W_dec,i‖ z_i with the gains g that reconstruct a sample of tokens best "
        "(least squares, all features together; features absent from the sample left out): invariant to rescaling any "
        "feature, so that shrinkage cannot lower it.",
        unit="1",
        better="lower",
        label="variation, refitted",
        group="time",
        interval=_GAINS,
    ),
    "refit_gain": Definition(
        text="mean of those gains, weighted by the features' Σ z² ‖W_dec‖²; above 1: the SAE shrinks its features",
        unit="1",
        interval=_GAINS,
    ),
    "refit_coverage": Definition(
        text="share of Σ z² ‖W_dec‖² on features that have a refitted gain", unit="share", interval=_GAINS
    ),
    "lag_autocorrelation": Definition(
        text="Pearson correlation of z_i at t and t + τ over the valid pairs of that lag, mean over features with at "
        f"least {MIN_ACTIVE} active tokens",
        unit="1",
        label="autocorrelation",
        interval=JACKKNIFE,
    ),
    "lag_autocorrelation_uncentred": Definition(
        text="Σ z_t z_t+τ / √(Σ z_t² Σ z_t+τ²) over the valid pairs of that lag, mean over features with at least "
        f"{MIN_ACTIVE} active tokens",
        unit="1",
        label="autocorrelation, uncentred",
        interval=JACKKNIFE,
    ),
    "lag1_autocorrelation": Definition(
        text="lag_autocorrelation at τ = 1, of adjacent tokens",
        unit="1",
        label="lag-1 correlation",
        group="time",
        interval=JACKKNIFE,
    ),
    "lag1_autocorrelation_uncentred": Definition(
        text="lag_autocorrelation_uncentred at τ = 1, of adjacent tokens",
        unit="1",
        label="lag-1 correlation, uncentred",
        interval=JACKKNIFE,
    ),
    "adjacent_cosine": Definition(
        text="mean cosine of the codes at t and t + 1, corrected for chance: (mean − chance) / (1 − chance); 0: as "
        "alike as tokens of different documents.",
        unit="1",
        label="adjacent cosine",
        interval=f"{BOOTSTRAP}, chance taken as known",
    ),
    "adjacent_cosine_raw": Definition(
        text=f"mean cosine of z_t and z_t+1 {_PAIRS}; pairs with an all-zero code left out", unit="1"
    ),
    "adjacent_cosine_chance": Definition(
        text="mean cosine of the codes of tokens from different documents (a sample)", unit="1", interval=_SAMPLE
    ),
    "adjacent_jaccard": Definition(
        text="mean Jaccard index of the sets of features active at t and t + 1, corrected for chance like "
        "adjacent_cosine",
        unit="1",
        label="adjacent Jaccard",
        group="time",
        interval=f"{BOOTSTRAP}, chance taken as known",
    ),
    "adjacent_jaccard_raw": Definition(
        text=f"mean of |A_t ∩ A_t+1| / |A_t ∪ A_t+1| {_PAIRS}; pairs of empty sets left out", unit="1"
    ),
    "adjacent_jaccard_chance": Definition(
        text="mean Jaccard index of tokens from different documents (a sample)", unit="1", interval=_SAMPLE
    ),
    "activation_adjacent_cosine": Definition(
        text=f"mean cosine of the raw activations x_t and x_t+1 {_PAIRS}", unit="1", label="adjacent cosine of x"
    ),
    "reconstruction_adjacent_cosine": Definition(
        text=f"mean cosine of the reconstructions x̂_t and x̂_t+1 {_PAIRS}; not to be mixed up with the cosine of x "
        "and x̂",
        unit="1",
        label="adjacent cosine of x̂",
    ),
    "run_length": Definition(
        text="mean number of tokens that a feature stays active, all features together: active tokens whose successor "
        "counts, divided by those of them where the run ends; runs cut by the edge of a row bias it in no direction",
        unit="tokens",
        label="run length",
    ),
    "run_length_geometric": Definition(
        text="the run length if every feature fired independently from token to token, at its own density",
        unit="tokens",
        interval=JACKKNIFE,
    ),
    "run_length_excess": Definition(text="run_length / run_length_geometric", unit="1", interval=JACKKNIFE),
    "run_length_curve": Definition(
        text="share of runs lasting longer than so many tokens (Kaplan–Meier, runs seen to begin; cut runs count "
        "while seen)",
        unit="share",
        interval=JACKKNIFE,
    ),
    "run_length_geometric_curve": Definition(
        text="the same if features fired independently from token to token at their own densities",
        unit="share",
        interval=JACKKNIFE,
    ),
    "smoothness": Definition(
        text="S of Temporal SAE (arXiv 2511.05541, section 4.3): per row the mean over features active in it of max_t "
        "|z_t − z_t−1| / ‖x_t − x_t−1‖, then the mean over rows; valid pairs only",
        unit="1",
        better="lower",
        label="smoothness S",
    ),
    "same_token": Definition(
        text="mean cosine of the codes of one token at two places in different rows, at least half a context apart; "
        "mean over kinds of token (a sample)",
        unit="1",
        better="higher",
        label="same token, far position",
        interval=_SAMPLE,
    ),
    "same_token_near": Definition(
        text="the same at most an eighth of a context apart: what other words around cost when the position stays",
        unit="1",
        interval=_SAMPLE,
    ),
    "same_token_activation": Definition(
        text="same_token for the raw activations, centred: the ceiling", unit="1", interval=_SAMPLE
    ),
    "same_token_activation_near": Definition(
        text="same_token_near for the raw activations, centred", unit="1", interval=_SAMPLE
    ),
}


@metric("temporal")
class TemporalStatistics:
    """All temporal metrics of one SAE in one pass."""

    definitions = DEFINITIONS
    by_part = (
        *("temporal_variation", "temporal_variation_refit", "lag1_autocorrelation"),
        *("adjacent_cosine", "adjacent_jaccard", "run_length", "run_length_excess", "smoothness", "same_token"),
    )

    def __init__(self, sae: SparseCoder, *, context: int, seed: int, lags: int = LAGS):
        device = sae.W_dec.device
        self._sae, self._context, self._lags = sae, context, min(lags, context - 1)
        self._sums = LagSums(sae.n_features, self._lags, device)
        self._runs = RunCounts(sae.n_features, context, device)
        self._sample = TokenSample(SAMPLE_TOKENS, sae.d_model, seed, device)
        self._by_unit = SumsByUnit()
        self._tokens_G = torch.zeros(GROUPS, dtype=torch.float64, device=device)
        self._active_GF = torch.zeros(GROUPS, sae.n_features, dtype=torch.float64, device=device)

    def update(self, batch: TokenBatch, active: ActiveEntries, x_hat_BTD: Tensor) -> None:
        """Take one batch in."""
        group_N = group_of(batch.units_BT)
        self._tokens_G += torch.bincount(group_N[active.valid_N], minlength=GROUPS)
        self._active_GF += active.per_group(group_N, GROUPS)
        self._sample.update(batch, active)
        masks = pair_masks(batch.valid_BT, batch.documents_BT, self._lags)
        found = matches(active, masks)
        self._sums.update(active, masks, found, group_N)
        next_E, previous_E = followed(active, found)
        chances_N, ends_N = self._runs.update(active, masks, group_N, next_E, previous_E)
        units_N, first_N = batch.units_BT.reshape(-1), masks.earlier_LN[1]
        self._by_unit.add(units_N[first_N], run_chances=chances_N[first_N], run_ends=ends_N[first_N])
        self._record_pairs(units_N[first_N], first_N, batch, active, found, x_hat_BTD)
        x_ND = batch.x_BTD.reshape(active.n_tokens, -1)
        self._record_rows(batch, *smoothness(active, masks, found, next_E, x_ND))

    def _record_pairs(
        self,
        units_P: Tensor,
        first_N: Tensor,
        batch: TokenBatch,
        active: ActiveEntries,
        found: Matches,
        x_hat_BTD: Tensor,
    ) -> None:
        """Everything that is an average over pairs of adjacent tokens."""
        pairs = AdjacentPairs.of(active, found, first_N)
        self._by_unit.add(units_P, variation=pairs.variation(), energy=pairs.energy())
        for name, values in (
            ("cosine", pairs.cosine()),
            ("jaccard", pairs.jaccard()),
            ("activation_cosine", adjacent_cosine(batch.x_BTD, first_N)),
            ("reconstruction_cosine", adjacent_cosine(x_hat_BTD, first_N)),
        ):
            defined = torch.isfinite(values)
            self._by_unit.add(
                units_P[defined], **{name: values[defined], f"{name}_n": torch.ones_like(values[defined])}
            )

    def _record_rows(self, batch: TokenBatch, change_B: Tensor, features_B: Tensor) -> None:
        """The smoothness of every row, counted for the unit of its first token that counts."""
        unit_B = batch.units_BT.gather(1, batch.valid_BT.int().argmax(1, keepdim=True)).squeeze(1)
        some = features_B > 0
        self._by_unit.add(unit_B[some], smoothness=change_B[some], smoothness_n=torch.ones_like(change_B[some]))

    def state(self) -> State:
        """What it holds."""
        parts = {name: getattr(self, name).state() for name in _PARTS}
        return held(self, ("_tokens_G", "_active_GF")) | parts

    def merge(self, later: State) -> None:
        """Take in the state of other rows."""
        add_held(self, later, ("_tokens_G", "_active_GF"))
        for name in _PARTS:
            getattr(self, name).merge(later[name])

    def result(self) -> Findings:
        """All temporal metrics, the curves over the lag and over the run length, and the numbers of every feature."""
        findings = Findings(sums=self._plain_sums())
        self._similarities(findings)
        self._autocorrelations(findings)
        self._refitted(findings)
        self._run_lengths(findings)
        return findings

    def _plain_sums(self) -> dict[str, UnitSums]:
        ratio = self._by_unit.ratio
        return {
            "temporal_variation": replace(
                ratio("variation", "energy", "1"), definition="temporal_variation", n=self._pairs()
            ),
            "activation_adjacent_cosine": self._mean("activation_cosine", "activation_adjacent_cosine"),
            "reconstruction_adjacent_cosine": self._mean("reconstruction_cosine", "reconstruction_adjacent_cosine"),
            "smoothness": self._mean("smoothness", "smoothness"),
            "run_length": replace(ratio("run_chances", "run_ends", "tokens"), definition="run_length"),
        }

    def _mean(self, name: str, definition: str, *, offset: float = 0.0, scale: float = 1.0) -> UnitSums:
        unit = DEFINITIONS[definition].unit
        return replace(self._by_unit.ratio(name, f"{name}_n", unit, offset=offset, scale=scale), definition=definition)

    def _pairs(self) -> int:
        return int(self._sums.pairs_GL[:, 0].sum())

    def _similarities(self, findings: Findings) -> None:
        """Adjacent cosine and Jaccard corrected for chance; the same token far away."""
        sample = self._sample.taken()
        cosine_MM, jaccard_MM, activation_MM = sample_similarity(sample)
        for name, similarity_MM in (("cosine", cosine_MM), ("jaccard", jaccard_MM)):
            key = f"adjacent_{name}"
            findings.sums[f"{key}_raw"] = self._mean(name, f"{key}_raw")
            level = chance(sample, similarity_MM, definition=f"{key}_chance")
            findings.metrics[level.definition], expected = level, level.value
            if expected is not None and expected < 1:
                findings.sums[key] = self._mean(name, key, offset=-expected / (1 - expected), scale=1 / (1 - expected))
            else:
                findings.metrics[key] = plain_metric(DEFINITIONS, key, None, 0)
        for prefix, similarity_MM in (("same_token", cosine_MM), ("same_token_activation", activation_MM)):
            keys = (prefix, f"{prefix}_near")
            found = same_token(sample, similarity_MM, self._context, far=keys[0], near=keys[1])
            findings.metrics |= dict(zip(keys, found, strict=True))

    def _enough(self) -> Tensor:
        return self._active_GF.sum(0) >= MIN_ACTIVE

    def _autocorrelations(self, findings: Findings) -> None:
        sums, enough = self._sums, self._enough()
        for suffix, centred in (("", True), ("_uncentred", False)):

            def of_lag(sums_FSL: Tensor, pairs_L: Tensor, centred: bool = centred) -> Tensor:
                return autocorrelation(pairs_L, sums_FSL.transpose(0, 1), centred=centred).squeeze(1)

            per_lag = []
            for at in range(self._lags):
                lag = slice(at, at + 1)
                found, _ = jackknife_over_features(
                    of_lag,
                    sums.pairs_GL[:, at],  # says which groups have pairs
                    [sums.sums(lag, enough).transpose(1, 2)],
                    [sums.pairs_GL[:, lag]],
                    unit="1",
                    definition=f"lag_autocorrelation{suffix}",
                )
                per_lag.append(found)
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
        every = sums.autocorrelations(centred=True)
        findings.per_feature["lag_autocorrelation"] = every.cpu().numpy()

    def _refitted(self, findings: Findings) -> None:
        """Temporal variation after refitting gains, and how large the gains are."""
        sae = self._sae
        gain_F = refit_gains(self._sample.taken(), sae.W_dec.detach(), sae.b_dec.detach())
        norm_F, fitted = vector_norm(sae.W_dec.detach(), dim=1, dtype=torch.float64), torch.isfinite(gain_F)
        weight_F = gain_F * norm_F

        def refitted(_: Tensor, sums_SFL: Tensor) -> float:
            top_F, bottom_F = variation(sums_SFL, weight_F)
            return float(top_F.sum() / bottom_F.sum())

        lag1 = (self._sums.pairs_GL[:, 0], self._sums.sums(slice(0, 1)))
        key = "temporal_variation_refit"
        findings.metrics[key] = jackknife(refitted, *lag1, unit="1", definition=key, n=self._pairs())

        def gain(_: Tensor, sums_SFL: Tensor) -> float:
            energy_F = variation(sums_SFL, norm_F)[1][fitted]
            return float((energy_F * gain_F[fitted]).sum() / energy_F.sum())

        def covered(_: Tensor, sums_SFL: Tensor) -> float:
            energy_F = variation(sums_SFL, norm_F)[1]
            return float(energy_F[fitted].sum() / energy_F.sum())

        for key, statistic, n in (("refit_gain", gain, int(fitted.sum())), ("refit_coverage", covered, len(gain_F))):
            findings.metrics[key] = jackknife(statistic, *lag1, unit=DEFINITIONS[key].unit, definition=key, n=n)

    def _run_lengths(self, findings: Findings) -> None:
        runs = self._runs

        def geometric(tokens: Tensor, active_F: Tensor, chances_F: Tensor, _: Tensor) -> float:
            return float(chances_F.sum() / (chances_F * (1 - active_F / tokens)).sum())

        def excess(tokens: Tensor, active_F: Tensor, chances_F: Tensor, ends_F: Tensor) -> float:
            return float(chances_F.sum() / ends_F.sum()) / geometric(tokens, active_F, chances_F, ends_F)

        sums = (self._tokens_G, self._active_GF, runs.chances_GF, runs.ends_GF)
        for key, statistic, counted_GF in (
            ("run_length_geometric", geometric, runs.chances_GF),
            ("run_length_excess", excess, runs.ends_GF),
        ):
            n = int(counted_GF.sum())
            findings.metrics[key] = jackknife(statistic, *sums, unit=DEFINITIONS[key].unit, definition=key, n=n)
        length_F = runs.chances_GF.sum(0) / runs.ends_GF.sum(0)
        findings.per_feature["run_length"] = torch.where(self._enough(), length_F, torch.nan).cpu().numpy()
        self._survival(findings)

    def _survival(self, findings: Findings) -> None:
        """How long runs last, and would last by chance: curves from 1 at no token to where next to none is left."""
        runs, context = self._runs, self._context
        seen = jackknife_band(lambda _, *sums: survival(*sums), self._tokens_G, runs.ended_GT, runs.cut_GT)
        by_chance = jackknife_band(
            lambda tokens, active_F, starts_F: geometric_survival(starts_F, active_F / tokens, context),
            *(self._tokens_G, self._active_GF, runs.starts_GF),
        )
        for key, (y, low, high) in (("run_length", seen), ("run_length_geometric", by_chance)):
            shown = sum((value or 0.0) > 1e-4 for value in y) + 1
            findings.curves[key] = Curve(
                x=[float(length) for length in range(len(y[:shown]) + 1)],
                y=[1.0, *y[:shown]],
                low=[1.0, *(None if end is None else max(end, 0.0) for end in low[:shown])],
                high=[1.0, *(None if end is None else min(end, 1.0) for end in high[:shown])],
                x_label="tokens",
                y_label="share of runs that last longer",
                definition=f"{key}_curve",
            )
