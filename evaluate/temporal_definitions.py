"""What the temporal metrics mean, in the words that the report prints."""

from __future__ import annotations

from .results import BOOTSTRAP, JACKKNIFE, Definition

_GAINS = f"{JACKKNIFE}, the gains held fixed"
_SAMPLE = f"{JACKKNIFE}, leaving a group out of the sample"
_PAIRS = "over valid pairs: both tokens in one row and one document, neither special, padding nor an outlier"

DEFINITIONS = {
    "temporal_variation": Definition(
        text=f"Σ ‖z_t − z_t+1‖² / Σ ½(‖z_t‖² + ‖z_t+1‖²) {_PAIRS}; 0: constant, 2: nothing in common. The same for z and c·z.",
        unit="1",
        better="lower",
        label="temporal variation",
    ),
    "temporal_variation_refit": Definition(
        text="temporal variation of g_i ‖W_dec,i‖ z_i with the gains g that reconstruct a sample of tokens best (least "
        "squares, all features together; features absent from the sample left out): invariant to rescaling any "
        "feature, so that shrinkage cannot lower it.",
        unit="1",
        better="lower",
        label="variation, refitted",
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
        text="Pearson correlation of z_i at t and t + τ over the valid pairs of that lag, mean over features with at least 30 "
        "active tokens",
        unit="1",
        label="autocorrelation",
        interval=JACKKNIFE,
    ),
    "lag_autocorrelation_uncentred": Definition(
        text="Σ z_t z_t+τ / √(Σ z_t² Σ z_t+τ²) over the valid pairs of that lag, mean over features with at least 30 "
        "active tokens",
        unit="1",
        label="autocorrelation, uncentred",
        interval=JACKKNIFE,
    ),
    "lag1_autocorrelation": Definition(
        text="lag_autocorrelation at τ = 1, of adjacent tokens", unit="1", label="lag-1 correlation", interval=JACKKNIFE
    ),
    "lag1_autocorrelation_uncentred": Definition(
        text="lag_autocorrelation_uncentred at τ = 1, of adjacent tokens",
        unit="1",
        label="lag-1 correlation, uncentred",
        interval=JACKKNIFE,
    ),
    "adjacent_cosine": Definition(
        text="mean cosine of the codes at t and t + 1, corrected for chance: (mean − chance) / (1 − chance); 0: as alike as "
        "tokens of different documents.",
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
        text="mean Jaccard index of the sets of features active at t and t + 1, corrected for chance like adjacent_cosine",
        unit="1",
        label="adjacent Jaccard",
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
        text=f"mean cosine of the reconstructions x̂_t and x̂_t+1 {_PAIRS}; not to be mixed up with the cosine of x and x̂",
        unit="1",
        label="adjacent cosine of x̂",
    ),
    "run_length": Definition(
        text="mean number of tokens that a feature stays active, all features together: active tokens whose successor counts, "
        "divided by those of them where the run ends; runs cut by the edge of a row bias it in no direction",
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
        text="share of runs lasting longer than so many tokens (Kaplan–Meier, runs seen to begin; cut runs count while seen)",
        unit="share",
        interval=JACKKNIFE,
    ),
    "run_length_geometric_curve": Definition(
        text="the same if features fired independently from token to token at their own densities",
        unit="share",
        interval=JACKKNIFE,
    ),
    "smoothness": Definition(
        text="S of Temporal SAE (arXiv 2511.05541, section 4.3): per row the mean over features active in it of "
        "max_t |z_t − z_t−1| / ‖x_t − x_t−1‖, then the mean over rows; valid pairs only",
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
