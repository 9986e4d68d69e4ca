"""A made-up evaluation, rich enough to draw every part of the report; numbers from a seeded generator, no meaning."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from tcsae.evaluate.results import (
    Curve,
    Definition,
    EvaluationReport,
    Failure,
    FeatureCard,
    LogitEffect,
    Metric,
    ModelFacts,
    Neighbour,
    Paired,
    Passage,
    Record,
    SAEFacts,
    TextFacts,
    TrainingCurves,
)

TEXT = (
    "The committee met again in the spring, and again it could not agree. Its chairman, who had "
    "served for eleven years, "
    "said that the figures before them were old; the members answered that older figures had been "
    "good enough for their "
    "fathers.\nIn the end they wrote to the governor. “We have counted the bridges twice,” the "
    "letter began, “and twice we "
    "have found one more than the map allows.” The governor, a patient man, sent a surveyor. He came "
    "in June, walked the "
    "river for nine days, and reported that the map was right, the committee was right, and the "
    "ninth bridge belonged to "
    "the neighbouring county."
)
HOSTILE = [
    "<script>",
    "alert(1)",
    "</script>",
    "<img src=x onerror=alert(2)>",
    "&amp;",
    '"',
    "'",
    "</td>",
    "\u202e",
    "\u2028",
    "\x00",
    "\n",
]
REFERENCES = ("identity_bf16", "zero_all", "zero", "mean", "previous_token", "untrained", "zero_sae")
DEFINITIONS = {
    "ce": ("next-token cross-entropy with the splice, per token", "nats", "lower", "CE"),
    "ce_clean": ("next-token cross-entropy of the untouched model, per token", "nats", None, "CE clean"),
    "kl": ("KL(p_original ‖ p_spliced) of the next-token distribution, per token", "nats", "lower", "KL"),
    "kl_noise_floor": ("the KL that rounding the activations to bfloat16 causes by itself", "nats", None, "KL floor"),
    "ce_score_mean": (
        "(CE_mean − CE) / (CE_mean − CE_clean): share of the loss of mean ablation recovered",
        "1",
        "higher",
        "CE rec.",
    ),
    "explained_variance": ("1 − E‖x − x̂‖² / E‖x − μ‖²", "1", "higher", "EV"),
    "mse_per_token": ("E Σ_d (x − x̂)²", "activation units²", "lower", "MSE/token"),
    "cosine": ("E cos(x, x̂), over the tokens where x̂ is not zero", "1", "higher", "cos(x, x̂)"),
    "l0": ("E of the number of active features", "features", None, "L0"),
    "l1": ("E Σ_i z_i ‖W_dec,i‖", "activation units", None, "L1"),
    "kl_score_mean": ("(KL_mean − KL) / KL_mean", "1", "higher", "KL rec."),
    "norm_ratio": ("E ‖x̂‖ / ‖x‖", "1", None, "‖x̂‖/‖x‖"),
    "lag1_autocorrelation": ("correlation of z_t and z_{t+1}", "1", None, "lag-1 correlation"),
    "adjacent_jaccard": ("mean Jaccard index of neighbours' active sets", "1", None, "adjacent Jaccard"),
    "alive": ("share of features that fired at least once", "share", "higher", "alive"),
    "near_duplicate_share": (
        "share of features whose decoder row has cosine ≥ 0.9 with another",
        "share",
        "lower",
        "near-duplicates",
    ),
    "temporal_variation": ("Σ (z_t − z_{t+1})² / Σ z²", "1", None, "temporal variation"),
    "temporal_variation_refit": (
        "temporal variation after refitting one gain per feature",
        "1",
        None,
        "… gain refitted",
    ),
    "eta_squared": ("mean over features of Var_pos(E[z | position]) / Var(z), bias-corrected", "1", "lower", "η²"),
    "position_specific_share": (
        "share of features position-specific at FDR 5 %",
        "share",
        "lower",
        "position-specific",
    ),
}


def definition(key: str) -> Definition:
    text, unit, better, label = DEFINITIONS.get(key, (key, "1", None, key))
    return Definition(text=text, unit=unit, better=better, label=label)  # type: ignore[arg-type]


def metric(key: str, value: float | None, spread: float = 0.0, n: int = 24_384) -> Metric:
    ends = {} if value is None or not spread else {"low": value - spread, "high": value + spread}
    return Metric(
        value=value,
        unit=DEFINITIONS[key][1] if key in DEFINITIONS else "1",
        n=n if value is not None else 0,
        definition=key,
        **ends,
    )


def curves(rng: np.random.Generator, persistence: float) -> dict[str, Curve]:
    edges = np.linspace(-5, 0, 26)
    centre = np.exp(-0.5 * ((edges[:-1] + 2.6) / 0.6) ** 2)
    lags = np.arange(1, 6)
    decay = persistence**lags
    eta = np.linspace(0, 0.2, 21)
    positions = np.arange(1, 64)
    return {
        "density": Curve(
            kind="histogram",
            x=edges.tolist(),
            y=np.round(4096 * centre / centre.sum() * rng.uniform(0.8, 1.2, 25)).tolist(),
            x_label="log10 share of tokens on which the feature fires",
            y_label="features",
            definition="density",
        ),
        "lag_autocorrelation": Curve(
            x=lags.tolist(),
            y=decay.tolist(),
            low=(decay - 0.02).tolist(),
            high=(decay + 0.02).tolist(),
            x_label="lag (tokens)",
            y_label="mean autocorrelation",
            definition="lag_autocorrelation",
        ),
        "eta_squared": Curve(
            kind="histogram",
            x=eta.tolist(),
            y=np.round(3000 * np.exp(-eta[:-1] * 60)).tolist(),
            x_label="η² of position",
            y_label="features",
            definition="eta_squared",
        ),
        "norm_by_position": Curve(
            x=positions.tolist(),
            y=(70 + 10 * np.exp(-positions / 8) + rng.normal(0, 0.5, 63)).tolist(),
            x_label="position in the row",
            y_label="mean ‖x̂‖",
            definition="norm_by_position",
        ),
    }


def sae(
    name: str, layer: int, role: str | None, pair: str | None, values: dict[str, float | None], rng: np.random.Generator
) -> Record:
    spreads = {
        "ce": 0.03,
        "kl": 0.012,
        "ce_score_mean": 0.004,
        "explained_variance": 0.006,
        "l0": 0.3,
        "temporal_variation": 0.01,
        "temporal_variation_refit": 0.012,
        "lag1_autocorrelation": 0.004,
        "adjacent_jaccard": 0.003,
    }
    return Record(
        name=name,
        kind="sae",
        layer=layer,
        role=role,
        pair=pair,  # type: ignore[arg-type]
        sae=SAEFacts(
            path=f"runs/{name}" if role else "saes/public",
            source="run" if role else "saelens",
            architecture="topk",
            d_model=576,
            n_features=4096,
            settings={"k": 64, "temporal": "pairwise" if role == "tc" else "none", "temporal_weight": 0.1, "seed": 0},
        ),
        metrics={key: metric(key, value, spreads.get(key, 0.0)) for key, value in values.items()},
        curves=curves(rng, 0.75 if role == "tc" else 0.6),
        saebench_compat={"ce_loss_score": 0.981, "kl_div_score": 0.975, "mse": None},
        notes=["one token of outlying norm in 400 was left out of training"] if role == "tc" else [],
    )


def references(layer: int) -> list[Record]:
    ce = {
        "identity_bf16": 3.4312,
        "zero_all": math.log(49152),
        "zero": 9.91,
        "mean": 8.84,
        "previous_token": 6.4,
        "untrained": 9.37,
        "zero_sae": 9.91,
    }
    out = []
    for name in REFERENCES:
        kl = max(ce[name] - 3.43, 0.0004)
        values: dict[str, float | None] = {
            "ce": ce[name],
            "ce_clean": 3.431,
            "kl": kl,
            "ce_score_mean": (8.84 - ce[name]) / (8.84 - 3.431),
        }
        if name in {"untrained", "zero_sae"}:
            values |= {"l0": 288.4 if name == "untrained" else 0.0, "cosine": 0.004 if name == "untrained" else None}
            values |= {
                "l1": 2051.7 if name == "untrained" else 0.0,
                "mse_per_token": 9344.0 if name == "untrained" else 5120.0,
            }
            values |= {"explained_variance": -0.83 if name == "untrained" else -0.02}
        metrics = {
            key: metric(key, value, 0.03 if key in {"ce", "kl"} and name != "identity_bf16" else 0)
            for key, value in values.items()
        }
        out.append(Record(name=name, kind="reference", layer=layer, metrics=metrics))
    return out


def words(text: str = TEXT) -> list[str]:
    return re.findall(r"\n|\s?[\w’]+|\s?[^\w\s]", text)


def card(feature: int, rng: np.random.Generator, *, hostile: bool = False) -> FeatureCard:
    tokens = words()
    passages = []
    for document in range(5):
        start = int(rng.integers(0, len(tokens) - 64))
        shown = list(tokens[start : start + 60])
        if hostile and document == 0:
            shown[10 : 10 + len(HOSTILE)] = HOSTILE
        wave = np.maximum(0, np.cumsum(rng.normal(0, 1.2, 60)) * (rng.random() + 0.2))
        wave[rng.random(60) < 0.3] = 0
        wave[40 % len(wave)] = wave.max() + 1.5
        passages.append(
            Passage(
                tokens=shown,
                activations=[round(float(v), 3) for v in wave],
                peak=40,
                position=start,
                document=document * 7 + feature % 5,
            )
        )
    profile = rng.gamma(2, 0.2, 63)
    profile[:3] = np.nan
    return FeatureCard(
        feature=feature,
        why=str(rng.choice(["chosen at random", "most frequent", "most position-dependent", "most persistent"])),
        numbers={
            "density": float(10 ** rng.uniform(-4, -1)),
            "max_activation": float(rng.gamma(4, 4)),
            "eta_squared": None if feature == 3 else float(rng.beta(1, 30)),
            "lag1_autocorrelation": float(rng.uniform(-0.05, 0.8)),
        },
        passages=passages if feature != 4 else [],
        position_profile=Curve(
            x=list(range(63)),
            y=profile.tolist(),
            x_label="position in the row",
            y_label="mean activation",
            definition="eta_squared",
        ),
        lag_curve=Curve(
            x=[1, 2, 3, 4, 5],
            y=(0.6 ** np.arange(1, 6)).tolist(),
            x_label="lag (tokens)",
            y_label="autocorrelation",
            definition="eta_squared",
        ),
        neighbours=[Neighbour(feature=feature + 7, cosine=0.93)],
        raises=[
            LogitEffect(token=t, effect=1.9 - 0.2 * i)
            for i, t in enumerate([" bridge", " river", "\n", " county", "<b>", " map"])
        ],
        lowers=[
            LogitEffect(token=t, effect=-1.2 + 0.1 * i)
            for i, t in enumerate([" the", ",", " of", "</script>", " June"])
        ],
    )


def training(rng: np.random.Generator, temporal: bool, n: int = 120) -> TrainingCurves:
    steps = (np.arange(n) * 25).tolist()
    decay = 0.2 + 0.8 * np.exp(-np.arange(n) / 12) + rng.normal(0, 0.006, n)
    aux, pull = 0.02 * np.exp(-np.arange(n) / 30), 0.04 * (1 - np.exp(-np.arange(n) / 20))
    series = {"reconstruction": 576 * decay, "auxiliary": 576 * aux} | ({"temporal": 576 * pull} if temporal else {})
    series["total"] = sum(series.values())
    grown = np.minimum(1, np.arange(n) / 10)
    series["sparsity_weight"] = 1.5 * grown
    if temporal:
        deciles = {"": 1.0, "_p10": 0.2, "_median": 0.9, "_p90": 2.5}
        series |= {f"temporal_weight{name}": 0.03 * times * grown for name, times in deciles.items()}
    return TrainingCurves(
        steps=steps, series={name: [round(float(v), 3) for v in values] for name, values in series.items()}
    )


def paired(first: str, second: str, layer: int, *, l0_differs: bool = False) -> Paired:
    values = {
        "ce_score_mean": (-0.0021, 0.0013),
        "kl": (0.0144, 0.0061),
        "l0": (0.0, 0.0) if not l0_differs else (-14.2, 0.8),
        "temporal_variation": (-0.141, 0.012),
        "temporal_variation_refit": (-0.082, 0.011),
        "explained_variance": (-0.006, 0.007),
        "eta_squared": (0.0004, 0.0011),
    }
    warning = (
        "the twin's L0 is 78.2 and the TC-SAE's 64.0: they are not compared at equal sparsity" if l0_differs else None
    )
    return Paired(
        first=first,
        second=second,
        layer=layer,
        metrics={k: metric(k, v, s) for k, (v, s) in values.items()},
        warning=warning,
    )


def synthetic_report(layers: tuple[int, ...] = (5, 12), features: int = 30, **changes: Any) -> EvaluationReport:
    rng = np.random.default_rng(0)
    records: list[Record] = []
    for layer in layers:
        tc, twin = f"l{layer}-topk64-pairwise0.1-w5-s0", f"l{layer}-topk64-none-s0"
        base: dict[str, float | None] = {
            "ce": 3.58,
            "ce_clean": 3.431,
            "kl": 0.171,
            "kl_noise_floor": 0.0004,
            "ce_score_mean": 0.9712,
            "explained_variance": 0.871,
        }
        base |= {
            "mse_per_token": 812.4,
            "cosine": 0.931,
            "l0": 64.0,
            "l1": 410.2,
            "alive": 0.914,
            "near_duplicate_share": 0.013,
        }
        base |= {
            "temporal_variation": 0.51,
            "temporal_variation_refit": 0.49,
            "lag1_autocorrelation": 0.214,
            "adjacent_jaccard": 0.187,
            "kl_score_mean": 0.9684,
            "norm_ratio": 0.962,
            "eta_squared": 0.0112,
            "position_specific_share": 0.083,
        }
        other = base | {
            "ce": 3.571,
            "kl": 0.1566,
            "ce_score_mean": 0.9733,
            "explained_variance": 0.877,
            "temporal_variation": 0.651,
            "temporal_variation_refit": 0.572,
        }
        records += [sae(tc, layer, "tc", twin, base, rng), sae(twin, layer, "twin", tc, other, rng)]
        if layer == layers[-1]:
            public = base | {
                "ce": 3.66,
                "kl": 0.28,
                "ce_score_mean": 0.953,
                "explained_variance": 0.84,
                "l0": 31.7,
                "eta_squared": None,
            }
            records.append(sae("public <16k>", layer, None, None, public, rng))
        records += references(layer)
    names = [record.name for record in records if record.role]
    facts: dict[str, Any] = {
        "name": "synthetic",
        "created": "2026-01-02T03:04:05Z",
        "machine": {"device": "cpu", "cpu": "2 cores", "threads": 2, "memory_bytes": 8_000_000_000, "gpu": None},
        "versions": {"tcsae": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "model": ModelFacts(
            id="demo",
            revision=None,
            fingerprint="b179c9523d0e",
            architecture="LlamaForCausalLM",
            n_layers=30,
            d_model=576,
            vocab_size=49152,
            attn_implementation="sdpa",
            dtype="float32",
        ),
        "text": TextFacts(
            dataset="demo", split="train", fingerprint="9c1a", packing="document", context=128, held_out=0.05
        ),
        "n_documents": 12,
        "n_rows": 192,
        "n_tokens": 24_384,
        "seed": 0,
        "layers": list(layers),
        "resampling": "blocks of about 1000 tokens, since there are fewer than 30 documents",
        "seconds": 312.5,
        "peak_memory_bytes": 2_400_000_000,
        "definitions": {key: definition(key) for key in DEFINITIONS},
        "records": records,
        "paired": [
            paired(f"l{n}-topk64-pairwise0.1-w5-s0", f"l{n}-topk64-none-s0", n, l0_differs=n == 12) for n in layers
        ],
        "training": {name: training(rng, "pairwise" in name) for name in names},
        "features": {name: [card(f, rng, hostile=f == 0) for f in range(features)] for name in names},
        "failures": [
            Failure(path="runs/l5-broken", message="sae_weights.safetensors is truncated: <header> too short")
        ],
        "notes": ["12 documents were held out"],
    }
    return EvaluationReport(**(facts | changes))
