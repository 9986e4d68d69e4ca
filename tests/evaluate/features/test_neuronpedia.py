"""Files for Neuronpedia: what they say is what the codes say, and SAEDashboard's own classes read them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from coded_runs import WIDTH, coded
from tcsae.errors import UsageError
from tcsae.evaluate.codes.encode import EncodeConfig, encode_run
from tcsae.evaluate.codes.store import CodeStore
from tcsae.evaluate.features import catalogue
from tcsae.evaluate.features import neuronpedia as module
from tcsae.evaluate.features.catalogue import open_run
from tcsae.evaluate.features.neuronpedia import write_neuronpedia
from tcsae.evaluate.results import LogitEffect
from tcsae.pipeline import main
from tcsae.train.sae.protocol import SparseAutoencoder

# Of NeuronpediaDashboardFeature.to_dict and NeuronpediaDashboardActivation.to_dict of sae_dashboard 0.8.0.
FEATURE = [
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values",
    "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt", "dataset",
    "decoder_weights_dist", "activations", "vector",
]  # fmt: skip
ACTIVATION = ["bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"]


def text(token: int) -> str:
    return f" w{token}" if token % 7 else "</script>\u2028"


@pytest.fixture(scope="module", autouse=True)
def _words():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "TokenTexts", lambda codes: text)
        patch.setattr(catalogue, "known_effects", lambda *_: {3: ([LogitEffect(token=" up", effect=1.5)],
                                                                  [LogitEffect(token="\n", effect=-2.0)])})  # fmt: skip
        patch.setattr(module, "FEATURES_PER_FILE", 10)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder, _ = coded(tmp_path_factory.mktemp("coded"), rows=40)
    encode_run(EncodeConfig(str(folder)))
    return folder


@pytest.fixture(scope="module")
def written(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "neuronpedia"
    done = write_neuronpedia(str(run), out=str(folder))
    assert done.features + done.skipped == WIDTH
    assert done.n_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert done.files == len(list(folder.iterdir()))
    return folder


def batches(folder: Path) -> list[dict]:
    files = sorted(folder.glob("batch-*.json"), key=lambda file: int(file.stem.split("-")[1]))
    return [json.loads(file.read_text(encoding="ascii")) for file in files]


def test_every_feature_that_is_ever_active_is_there_once(run, written):
    density_F = open_run(str(run)).survey.density_F
    indices = [feature["feature_index"] for batch in batches(written) for feature in batch["features"]]
    assert indices == np.flatnonzero(density_F > 0).tolist()
    skipped = json.loads((written / "skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == np.flatnonzero(density_F == 0).tolist()
    assert [len(batch["features"]) for batch in batches(written)][:-1] == [10] * (len(batches(written)) - 1)


def test_the_keys_are_those_of_sae_dashboard(written):
    for batch in batches(written):
        assert list(batch) == ["model_id", "layer", "sae_set", "sae_id_suffix", "features"]
        assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("tiny", 3, "run")
        for feature in batch["features"]:
            assert sorted(feature) == sorted(FEATURE)
            assert all(sorted(activation) == sorted(ACTIVATION) for activation in feature["activations"])


def test_the_numbers_are_those_of_the_codes(run, written):
    (part,) = list(CodeStore.open(run / "codes.zarr"))
    z_RTF = np.stack([part.dense_row(row, np.arange(WIDTH)) for row in range(len(part.tokens_RT))])
    w_dec_FD = SparseAutoencoder.load(run).W_dec.detach().numpy()
    n_tokens = int(part.valid.sum())
    for feature in (each for batch in batches(written) for each in batch["features"]):
        f = feature["feature_index"]
        z = z_RTF[:, :, f][z_RTF[:, :, f] > 0]
        heights, edges = np.histogram(z.astype(np.float64), bins=50, range=(0, float(z.max())))
        assert feature["freq_hist_data_bar_heights"] == heights.tolist()
        np.testing.assert_allclose(feature["freq_hist_data_bar_values"], (edges[1:] + edges[:-1]) / 2, atol=6e-4)
        assert feature["frac_nonzero"] == pytest.approx(len(z) / n_tokens, rel=1e-5)
        top = feature["activations"][0]
        assert (top["bin_min"], top["bin_contains"]) == (-1, -1)
        assert top["bin_max"] == pytest.approx(z.max(), abs=6e-4)
        assert max(top["values"]) == top["values"][top["qualifying_token_index"]] == pytest.approx(z.max(), abs=6e-4)
        assert len(top["tokens"]) == len(top["values"])
        for other in (each for each in feature["activations"] if each["bin_min"] >= 0):
            peak = other["values"][other["qualifying_token_index"]]
            assert other["bin_min"] - 1e-3 <= peak <= other["bin_max"] + 1e-3
            inside = (z >= other["bin_min"] - 1e-3) & (z <= other["bin_max"] + 1e-3)
            assert other["bin_contains"] == pytest.approx(inside.sum() / n_tokens, abs=2 / n_tokens)
        best = np.argsort(-w_dec_FD[f])[:3]
        assert feature["neuron_alignment_indices"] == best.tolist()
        np.testing.assert_allclose(feature["neuron_alignment_values"], w_dec_FD[f][best], atol=6e-4)
    third = next(each for batch in batches(written) for each in batch["features"] if each["feature_index"] == 3)
    assert (third["pos_str"], third["pos_values"], third["neg_str"], third["neg_values"]) == (
        [" up"],
        [1.5],
        ["\n"],
        [-2],
    )


def test_their_own_code_reads_it(written):
    dashboard = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    for batch in batches(written):
        assert dashboard.NeuronpediaDashboardBatch(**batch).to_dict() == batch


def test_only_an_earlier_export_is_replaced(run, tmp_path, capsys):
    out = tmp_path / "n"
    assert main(["features", str(run), "--neuronpedia", "--out", str(out), "--json"]) == 0
    (out / "batch-99.json").write_text("of a wider SAE")
    assert main(["features", str(run), "--neuronpedia", "--out", str(out), "--json", "--quiet"]) == 0
    assert not (out / "batch-99.json").exists()
    (out / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds other things \(mine.txt\): choose another --out"):
        write_neuronpedia(str(run), out=str(out))
    with pytest.raises(UsageError, match="is a file: choose another --out"):
        write_neuronpedia(str(run), out=str(out / "mine.txt"))
    capsys.readouterr()
    assert main(["features", str(run), "--neuronpedia", "--html"]) == 2
    assert "say one of them at a time" in capsys.readouterr().err
