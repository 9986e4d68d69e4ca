"""Other sites than the residual stream, from extraction to report."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from tcsae.cache.store import ActivationStore
from tcsae.errors import RunError, StoreError
from tcsae.evaluate import run as run_module
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.model.heldout_text import HeldOutText
from tcsae.evaluate.results import read_results
from tcsae.evaluate.subjects import gather_subjects
from tcsae.extract.config import ExtractConfig, ModelSource, TextSource, command_line
from tcsae.extract.model.load import load_language_model
from tcsae.extract.run import extract
from tcsae.extract.text.rows import row_blocks
from tcsae.pipeline import main
from tcsae.sites import Location
from tcsae.train.formats.export import export
from tcsae.train.formats.locate import load_external
from tcsae.train.run_folder.record import load_run
from tiny import tiny_corpus, tiny_model

SITES = ("resid_post", "mlp_out")
SMALL = {"batches": 3, "batch_rows": 4, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Gemma 2 with stores of two sites of layer 1, and an SAE with its twin trained on each."""
    folder = tmp_path_factory.mktemp("sites")
    model, text = tiny_model("gemma2", folder / "model"), tiny_corpus(folder / "text", documents=60, words=40)
    what = ["--model", str(model), "--dataset", str(text), "--context", "16", "--held-out", "0.5", "--device", "cpu"]
    what += ["--tokens", "1k", "--out", str(folder / "cache"), "--dtype", "float32"]
    assert main(["extract", "--layers", "1", "--site", *SITES, *what]) == 0
    for name in ("l1", "l1.mlp_out"):
        small = ["--steps", "5", "--batch-size", "60", "--width", "32", "--k", "4", "--device", "cpu"]
        assert main(["train", "--store", f"{folder}/cache/{name}.zarr", *small, "--out", str(folder / "runs")]) == 0
    return folder


@pytest.fixture(scope="module")
def report(place):
    config = EvaluateConfig(runs_folder=str(place / "runs"), out=str(place / "reports"), **SMALL)
    (outcome,) = run_module.evaluate(config)
    return outcome.report


def test_stores_and_runs_say_their_site(place):
    stores = [ActivationStore.open(place / "cache" / name) for name in ("l1.zarr", "l1.mlp_out.zarr")]
    assert [store.location for store in stores] == [Location(1, site) for site in SITES]
    assert (stores[0].tokens(0, 9) == stores[1].tokens(0, 9)).all()
    assert not torch.equal(stores[0].rows(0, 9), stores[1].rows(0, 9))
    names = sorted(path.name for path in (place / "runs").iterdir())
    assert [name.split("-")[0] for name in names] == ["l1", "l1", "l1.mlp_out", "l1.mlp_out"]
    record = load_run(place / "runs" / names[2])
    assert record.location == Location(1, "mlp_out")
    assert main(["verify", f"{place}/cache/l1.mlp_out.zarr", "--model", str(place / "model")]) == 0


def test_rows_at_two_sites_of_a_layer_are_never_mixed(place, report):
    assert report.layers == [1]
    assert report.sites == list(SITES)
    assert len(report.records) == 2 * len(report.of_site("mlp_out").records) == 2 * (7 + 2 + 1)
    assert {pair.site for pair in report.paired} == set(SITES)
    assert all("l1.mlp_out" in pair.first for pair in report.paired if pair.site == "mlp_out")
    ce = {site: report.record("mean", 1, site).metrics["ce"].value for site in SITES}
    assert ce["mlp_out"] != ce["resid_post"]
    for site in SITES:
        sae = next(one for one in report.of_site(site).records if one.role == "tc")
        value = {key: metric.value for key, metric in sae.metrics.items()}
        expected = (ce[site] - value["ce"]) / (ce[site] - value["ce_clean"])
        assert value["ce_score_mean"] == pytest.approx(expected)
    assert read_results(place / "reports" / "model") == report


def test_the_page_and_the_figures_say_the_site(place, report):
    page = (place / "reports" / "model" / "index.html").read_text()
    for words in (
        "Layer 1 mlp_out",
        "Fidelity against sparsity, layer 1, mlp_out",
        "autoencoders at layers 1 and 1 mlp_out of ",
    ):
        assert words in page
    figures = {path.name for path in (place / "reports" / "model" / "figures").iterdir()}
    assert {"plane-1.svg", "plane-1-mlp_out.svg"} <= figures


def test_a_reference_at_a_site_is_a_full_run_with_a_hook(place, report):
    """Zero at every position but the special ones, by a hook of our own on the module that adds."""
    lm = load_language_model(ModelSource(str(place / "model"), device="cpu", dtype="float32"))
    config = EvaluateConfig(runs_folder=str(place / "runs"), **SMALL)
    (group,), _ = gather_subjects(config)
    blocks = row_blocks(group.text, lm, held_out=True, rows_per_block=config.batch_rows)
    text = HeldOutText.gather((block for block, _ in blocks), config.rows)
    tokens, real = torch.from_numpy(text.tokens_RT), torch.from_numpy(text.real_RT)
    norm = lm.model.get_submodule("model.layers.1.post_feedforward_layernorm")
    handle = norm.register_forward_hook(lambda _m, _i, out: torch.where(real[..., None], 0, out))
    logits = lm.model(input_ids=tokens, use_cache=False).logits[:, :-1]
    handle.remove()
    counted = (real[:, :-1] & real[:, 1:]).flatten()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    found = report.record("zero", 1, "mlp_out").metrics["ce"]
    assert found.value == pytest.approx(float(losses[counted].mean()), rel=1e-5)


def test_exported_saes_say_their_site_in_both_formats(place, tmp_path):
    (run,) = (place / "runs").glob("l1.mlp_out-*-none-*")
    for name in ("saelens", "dictionary-learning"):
        found = load_external(str(export(run, name, tmp_path / name)))
        assert (found.layer, found.site) == (1, "mlp_out")
    assert "blocks.1.hook_mlp_out" in (tmp_path / "saelens" / "README.md").read_text()


def evaluate_external(place, folder, tmp_path, **said):
    config = EvaluateConfig(
        saes=(str(folder),), model=str(place / "model"), dataset=str(place / "text"), out=str(tmp_path / "reports"),
        quick=True, references=("mean",), **said, **SMALL,
    )  # fmt: skip
    return run_module.evaluate(config)[0].report


def external(place, tmp_path, hook):
    """A run's folder in SAELens' format with another hook name in it."""
    (run,) = (place / "runs").glob("l1.mlp_out-*-none-*")
    shutil.copytree(run, tmp_path / "sae", ignore=lambda *_: ["train.json"])
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    config["metadata"] = {"hook_name": hook} if hook else {}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    return tmp_path / "sae"


def test_an_sae_from_elsewhere_is_measured_where_it_says(place, tmp_path):
    report = evaluate_external(place, external(place, tmp_path, "blocks.2.hook_attn_out"), tmp_path)
    assert {(one.layer, one.site) for one in report.records} == {(2, "attn_out")}


def test_what_it_was_made_for_is_said_in_its_row(place, tmp_path, capsys):
    folder = external(place, tmp_path, "blocks.2.hook_attn_out")
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] |= {"model_name": "gpt2-small", "prepend_bos": False, "context_size": 4}
    (folder / "cfg.json").write_text(json.dumps(config))
    (row,) = (one for one in evaluate_external(place, folder, tmp_path).records if one.kind == "sae")
    said = capsys.readouterr().err
    for words in ("made for gpt2-small", "(prepend_bos)", "rows of 4 tokens"):
        assert words in " ".join(row.notes)
        assert words in " ".join(said.split())


def test_a_module_path_counts_only_where_it_is_the_module_that_adds(place, tmp_path):
    """Gemma 2's MLP is followed by a norm: the output of the MLP itself is not what is added."""
    with pytest.raises(RunError, match=r"reads the output of model\.layers\.1\.mlp, but mlp_out of Gemma2ForCausalLM"):
        evaluate_external(place, external(place, tmp_path, "model.layers.1.mlp"), tmp_path)
    folder = external(place, tmp_path / "b", "model.layers.1.post_feedforward_layernorm")
    report = evaluate_external(place, folder, tmp_path)
    assert {(one.layer, one.site) for one in report.records} == {(1, "mlp_out")}


def test_the_user_says_the_site_where_the_file_does_not(place, tmp_path):
    folder = external(place, tmp_path, None)
    report = evaluate_external(place, folder, tmp_path, layers=(3,), sites=("resid_mid",))
    assert {(one.layer, one.site) for one in report.records} == {(3, "resid_mid")}
    folder = external(place, tmp_path / "b", "blocks.1.hook_resid_post")
    with pytest.raises(RunError, match=r"--site mlp_out was given for .* belongs to site resid_post"):
        evaluate_external(place, folder, tmp_path, sites=("mlp_out",))


def test_a_site_beside_finished_ones_is_extracted_by_itself(place, tmp_path):
    text = TextSource(str(place / "text"), context=16, held_out=0.5)
    model = ModelSource(str(place / "model"), device="cpu", dtype="float32")
    both = ExtractConfig((1, 2), model, text, tokens=500, out=str(tmp_path), sites=("resid_post", "attn_out"))
    extract(ExtractConfig((1,), model, text, tokens=500, out=str(tmp_path)))
    with pytest.raises(StoreError, match="by itself: ") as said:
        extract(both)
    first, second = str(said.value).split("by itself: ")[1].split("; then ")
    assert "--layers 1 --site attn_out" in first
    assert "--layers 2 --site resid_post attn_out" in second
    for line in (first, second):
        assert main(shlex.split(line)[1:]) == 0
    assert extract(both).already_complete
    names = {path.name for path in Path(tmp_path).glob("*.zarr")}
    assert names == {"l1.zarr", "l2.zarr", "l1.attn_out.zarr", "l2.attn_out.zarr"}
    assert command_line(both).startswith("pipeline extract --layers 1 2 --site resid_post attn_out --model")


def test_a_store_of_one_site_is_not_taken_for_another(place, tmp_path):
    shutil.copytree(place / "cache" / "l1.mlp_out.zarr", tmp_path / "l1.attn_out.zarr")
    what = ["--model", str(place / "model"), "--dataset", str(place / "text"), "--context", "16", "--held-out", "0.5"]
    asked = ExtractConfig(
        (1,), ModelSource(what[1], device="cpu", dtype="float32"), TextSource(what[3], context=16, held_out=0.5),
        tokens=1000, out=str(tmp_path), sites=("attn_out",),
    )  # fmt: skip
    with pytest.raises(StoreError, match=r"l1.attn_out.zarr holds other rows \(it holds layer 1 mlp_out, you"):
        extract(asked)
