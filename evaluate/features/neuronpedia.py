"""Features as SAEDashboard writes them for Neuronpedia: ``batch-0.json`` …, one file for some features.

The keys are those of ``NeuronpediaDashboardBatch`` in sae_dashboard 0.8 (``neuronpedia/neuronpedia_dashboard.py``).
What the codes do not say is an empty list: correlated neurons and features, and the histogram over all logits.

Shapes: F features, B bars of a histogram.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...cache.public_names import hub_name, text_in_words
from ...console import format_bytes, note, progress
from ...errors import UsageError
from ...system.atomic_files import PARTIAL, plain_errors, write_file
from ...train.sae.protocol import SparseAutoencoder
from ..codes.store import CodeStore
from .catalogue import CodedRun, open_run
from .look import Stretch, places_of, stretches

FOLDER = "neuronpedia"
"""Inside a run's folder."""
SETTINGS, SKIPPED = "run_settings.json", "skipped_indexes.json"
FEATURES_PER_FILE, BARS, INTERVALS = 128, 50, 5
_FEATURES_AT_ONCE = 4096  # whose passages are in memory
_NEURONS = 3  # of a decoder row


@dataclass(frozen=True)
class NeuronpediaFolder:
    """What was written."""

    folder: Path
    features: int
    skipped: int
    """Features that are never active."""
    files: int
    n_bytes: int

    def facts(self, *, as_json: bool) -> dict[str, Any]:
        """For the summary."""
        plain = {"folder": str(self.folder), "features": self.features, "never active": self.skipped}
        plain |= {"files": self.files}
        return plain | ({"bytes": self.n_bytes} if as_json else {"disk": format_bytes(self.n_bytes)})


def write_neuronpedia(
    run: str, *, out: str | None = None, codes: str | None = None, report: str | None = None
) -> NeuronpediaFolder:
    """Write every feature that is ever active as Neuronpedia's import takes it.

    Args:
        run: folder of a run whose codes are written.
        out: the folder; None: ``neuronpedia`` in the run's.
        codes: the codes, where they are not in the run's folder.
        report: folder of an evaluation, for its logit effects.

    Raises:
        StoreError: the run has no codes, or they are damaged.
        UsageError: the folder holds other things.

    """
    folder = Path(out) if out is not None else Path(run) / FOLDER
    _clear(folder)
    opened = open_run(run, codes=codes, report=report)
    if not opened.effects:
        note("without top and bottom logits: `pipeline features RUN --logit-effects` computes them once")
    alive = np.flatnonzero(opened.survey.density_F > 0)
    n_bytes, at = 0, 0
    with progress("neuronpedia", len(alive), unit="features") as bar:
        for at, features in enumerate(_features(opened, alive)):
            n_bytes += _write(folder / f"batch-{at}.json", _head(opened) | {"features": features})
            bar.advance(len(features))
    dead = np.flatnonzero(opened.survey.density_F == 0)
    head = _head(opened)
    skipped = {"model_id": head["model_id"], "layer": str(head["layer"]), "sae_set": head["sae_set"]}
    n_bytes += _write(folder / SKIPPED, skipped | {"log_sparsity": None, "skipped_indexes": dead.tolist()})
    n_bytes += _write(folder / SETTINGS, _settings(opened))  # last: the folder is complete
    return NeuronpediaFolder(folder, len(alive), len(dead), (at + 1 if len(alive) else 0) + 2, n_bytes)


def _clear(folder: Path) -> None:
    """Remove what an earlier export wrote; refuse anything else.

    Raises:
        UsageError: the folder holds other things, or is a file.

    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another --out")
    there = sorted(folder.iterdir())
    ours = [file for file in there if file.match("batch-*.json") or file.name in (SETTINGS, SKIPPED)]
    other = next((file for file in there if file not in ours and not file.name.endswith(PARTIAL)), None)
    if other is not None:
        raise UsageError(f"{folder} holds other things ({other.name}): choose another --out")
    with plain_errors(f"empty {folder}"):
        for file in ours:
            file.unlink()


def _write(file: Path, content: dict[str, Any]) -> int:
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))  # ASCII: whatever the tokens hold
    write_file(file, text)
    return len(text)


def _head(run: CodedRun) -> dict[str, Any]:
    """Neuronpedia calls models by the last part of their names: gemma-2-2b."""
    store = run.codes.manifest.of_store
    model = (hub_name(store.model.id) or store.model.id).rstrip("/").split("/")[-1]
    return {"model_id": model, "layer": store.location.layer, "sae_set": run.record.name, "sae_id_suffix": None}


def _settings(run: CodedRun) -> dict[str, Any]:
    store = run.codes.manifest.of_store
    return {
        "sae_set": run.record.name,
        "hook_name": store.hook_name,
        "model_id": _head(run)["model_id"],
        "layer": store.location.layer,
        "huggingface_dataset_path": text_in_words(store.text.dataset),
        "n_prompts_total": run.codes.n_rows,
        "n_tokens_in_prompt": run.codes.context,
        "n_features_at_a_time": FEATURES_PER_FILE,
        "written_by": f"tcsae {__version__}",
    }


def _features(run: CodedRun, alive: np.ndarray) -> Iterator[list[dict[str, Any]]]:
    """The features of each file."""
    w_dec_FD = SparseAutoencoder.load(run.path).token_coder().W_dec.detach().float().numpy()
    bars_FB = linear_histograms(run.codes, run.survey.max_activation_F)
    for first in range(0, len(alive), _FEATURES_AT_ONCE):
        some = alive[first : first + _FEATURES_AT_ONCE].tolist()
        found = stretches(run.codes, {feature: places_of(run.survey, feature, run.codes.context) for feature in some})
        for start in range(0, len(some), FEATURES_PER_FILE):
            of_file = some[start : start + FEATURES_PER_FILE]
            yield [_feature(run, f, found[f], bars_FB[f], w_dec_FD[f]) for f in of_file]


def linear_histograms(codes: CodeStore, max_F: np.ndarray) -> np.ndarray:
    """Active tokens of every feature in :data:`BARS` equal parts of 0 … its largest activation: int64 [F, B]."""
    bars_FB = np.zeros((codes.n_features, BARS), np.int64)
    for part in codes:
        positive = part.value_E > 0
        feature_E, value_E = part.feature_E[positive], part.value_E[positive].astype(np.float64)
        bar_E = np.minimum((value_E / max_F[feature_E] * BARS).astype(np.int64), BARS - 1)
        np.add.at(bars_FB, (feature_E, bar_E), 1)
    return bars_FB


def _feature(
    run: CodedRun, feature: int, found: Sequence[Stretch], bars_B: np.ndarray, w_dec_D: np.ndarray
) -> dict[str, Any]:
    survey = run.survey
    top = float(survey.max_activation_F[feature])
    raises, lowers = run.effects.get(feature, ([], []))
    neurons = np.argsort(-w_dec_D, kind="stable")[:_NEURONS]
    length = float(np.abs(w_dec_D).sum()) or 1.0
    return {
        "feature_index": feature,
        "neuron_alignment_indices": neurons.tolist(),
        "neuron_alignment_values": _rounded(w_dec_D[neurons]),
        "neuron_alignment_l1": _rounded(np.abs(w_dec_D[neurons]) / length),
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [],
        "correlated_features_l1": [],
        "correlated_features_pearson": [],
        "neg_str": [effect.token for effect in lowers],
        "neg_values": _rounded([effect.effect for effect in lowers]),
        "pos_str": [effect.token for effect in raises],
        "pos_values": _rounded([effect.effect for effect in raises]),
        "frac_nonzero": float(survey.density_F[feature]),
        "freq_hist_data_bar_values": _rounded((np.arange(BARS) + 0.5) / BARS * top if top > 0 else []),
        "freq_hist_data_bar_heights": bars_B.tolist() if top > 0 else [],
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "n_prompts_total": run.codes.n_rows,
        "n_tokens_in_prompt": run.codes.context,
        "dataset": text_in_words(run.codes.manifest.of_store.text.dataset),
        "decoder_weights_dist": [],
        "activations": [_activation(stretch, top, bars_B, survey.n_tokens, run.text) for stretch in found],
        "vector": [],
    }


def _activation(
    stretch: Stretch, top: float, bars_B: np.ndarray, n_tokens: int, text: Callable[[int], str]
) -> dict[str, Any]:
    """A passage: of the strongest (their bin −1), else of the fifth of 0 … top that its peak is in."""
    peak = stretch.place.position - stretch.start
    if stretch.place.chosen == "strongest":
        interval = -1.0, top, -1.0
    else:
        number = min(int(float(stretch.values[peak]) / top * INTERVALS), INTERVALS - 1)
        share = bars_B.reshape(INTERVALS, -1)[number].sum() / max(n_tokens, 1)
        interval = number * top / INTERVALS, (number + 1) * top / INTERVALS, float(share)
    return {
        "bin_min": round(interval[0], 3),
        "bin_max": round(interval[1], 3),
        "bin_contains": round(interval[2], 5),
        "tokens": [text(int(token)) for token in stretch.tokens],
        "values": _rounded(stretch.values),
        "qualifying_token_index": peak,
    }


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 3) for value in values]
