"""The whole job: on a tiny random model for its moving parts, on the real small one for its meaning."""

import json
import math
import os

import pytest
from tcsae import pipeline
from tcsae.demo import DemoConfig, run_demo
from tcsae.extract.assets import MODEL, TEXT, cache_folder, demo_model, demo_text


def test_the_demo_runs_from_text_to_page_and_a_second_run_reuses_all(tiny_llama, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [
        "demo",
        "--model",
        str(tiny_llama),
        "--dataset",
        str(corpus),
        "--layers",
        "1",
        "2",
        "--tokens",
        "6k",
        "--steps",
        "4",
    ]
    assert pipeline.main([*args, "--batches", "2"]) == 0
    out = capsys.readouterr().out
    page = tmp_path / "reports/demo/index.html"
    assert str(page.relative_to(tmp_path)) in out
    for row in ("identity (bf16)", "zero, every position", "zero", "mean", "untrained SAE"):
        assert row in out
    written = (
        page.stat().st_mtime_ns,
        {p: p.stat().st_mtime_ns for p in (tmp_path / "demo_output").rglob("*.safetensors")},
    )
    assert len(written[1]) == 4, "a TC-SAE and its twin at each of two layers"
    assert pipeline.main([*args, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["reports"]) == 1
    assert written[1] == {p: p.stat().st_mtime_ns for p in (tmp_path / "demo_output").rglob("*.safetensors")}


@pytest.fixture(scope="module")
def real_assets():
    """The demo's model and text: fetched in CI, elsewhere only used where they already are."""
    at_hand = all((cache_folder() / f"{asset.package}-{asset.version}").is_dir() for asset in (MODEL, TEXT))
    if not at_hand and not os.environ.get("CI"):
        pytest.skip("the demo's model is not cached here: run `make demo` once")
    return demo_model(), demo_text()


@pytest.mark.real_model
@pytest.mark.timeout(1200)
def test_on_a_real_model_the_numbers_mean_something(real_assets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run_demo(DemoConfig(layers=(3,), tokens=40_000, steps=60, batches=1)).report
    rows = {record.name: {key: metric.value for key, metric in record.metrics.items()} for record in report.records}
    saes = [record for record in report.records if record.kind == "sae"]
    assert {record.role for record in saes} == {"tc", "twin"}
    for record in saes:
        found = rows[record.name]
        assert found["l0"] == pytest.approx(32, abs=0.5)
        assert found["ce_score_mean"] > 0.8, "sixty steps at layer 3 recover most of what mean ablation loses"
        assert 0.5 < found["explained_variance_without_outliers"] < 1
        assert rows["identity_bf16"]["kl"] <= found["kl"] < rows["mean"]["kl"] < rows["zero_all"]["kl"]
    assert rows["zero_all"]["ce"] == pytest.approx(math.log(49152), abs=1e-3)
    assert 2.5 < rows["identity_bf16"]["ce"] < 4.5, "a real language model on real text"
    assert rows["untrained"]["ce_score_mean"] < 0.5
    assert rows["zero"]["ce"] != pytest.approx(rows["zero_all"]["ce"], abs=0.01)
