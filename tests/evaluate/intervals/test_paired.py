"""Who is compared with whom: a TC-SAE with its twin, a pruned run with its original, on the same tokens."""

import pytest
from synthetic import paired, synthetic_report
from tcsae.evaluate import run as run_module
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.report.page import render_page
from tcsae.evaluate.report.panels.registry import sections
from tcsae.evaluate.report.sweep import Sweep, in_reading_order
from tcsae.evaluate.report.verdict import first_sentences, verdicts
from tcsae.evaluate.report.wording import outcomes_of_changes
from tcsae.evaluate.results import NO_INTERVAL
from tcsae.train.sae.activation import Activation
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run, random_sae

SMALL = {"batches": 3, "batch_rows": 4, "device": "cpu", "dtype": "float32", "references": ("mean",), "quick": True}
PRUNED = "l5-topk64-none-s0-pruned"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A pair, and what was pruned of its twin, listed first as `pipeline evaluate` may find it."""
    folder = tmp_path_factory.mktemp("pairs")
    model, text = tiny_model("llama", folder / "model"), tiny_corpus(folder / "text", documents=60, words=40)
    manifest = make_manifest(model, text, 1)
    fewer = random_sae(manifest.d_model, 24, Activation("relu"), 3)
    fewer.metadata["pruned_from"] = "b-twin"
    paths = [
        make_run(folder / "runs", "a-pruned", manifest, sae=fewer, role="twin"),
        make_run(folder / "runs", "b-tc", manifest, twin="b-twin"),
        make_run(folder / "runs", "b-twin", manifest, role="twin", twin="b-tc", seed=1),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
        (outcome,) = run_module.evaluate(
            EvaluateConfig(runs=tuple(map(str, paths)), out=str(folder / "reports"), **SMALL)
        )
    return outcome.report


def test_a_pruned_run_is_compared_with_its_original(report):
    found = {pair.kind: pair for pair in report.paired}
    assert set(found) == {"twin", "pruned"}
    pair, record = found["pruned"], report.record("a-pruned", 1)
    assert (pair.first, pair.second) == ("a-pruned", "b-twin")
    assert (record.role, record.pair, record.sae.settings["pruned_from"]) == ("pruned", "b-twin", "b-twin")
    for key in ("kl", "explained_variance", "temporal_variation"):
        difference = record.metrics[key].value - report.record("b-twin", 1).metrics[key].value
        assert pair.metrics[key].value == pytest.approx(difference), key
    assert (pair.warning or "").startswith("pruning took L0 from 6.0 to ")
    assert (found["twin"].first, found["twin"].second) == ("b-tc", "b-twin")


def test_what_the_jackknife_measured_is_paired_too(report):
    for pair in report.paired:
        one, other = (report.record(name, 1) for name in (pair.first, pair.second))
        for key in (
            "lag1_autocorrelation",
            "same_token",
            "eta_squared",
            "temporal_variation_refit",
            "run_length_excess",
        ):
            found = pair.metrics[key]
            assert found.value == pytest.approx(one.metrics[key].value - other.metrics[key].value, abs=1e-12), key
            assert found.low is not None, key
        assert not {"ce_clean", "kl_noise_floor", "activation_adjacent_cosine", "same_token_activation"} & set(
            pair.metrics
        )


def test_every_number_has_an_interval_or_a_reason(report):
    for record in report.records:
        for name, metric in record.metrics.items():
            told = report.definitions[metric.definition].interval
            if told.startswith(NO_INTERVAL):
                assert (metric.low, metric.high) == (None, None), name
            elif metric.value is not None:
                assert metric.low is not None, name


def test_pruned_saes_follow_in_the_order_of_their_originals():
    report = with_pruned(families=("none", "pairwise0.1-w5"))
    order = [Sweep(report).label(record) for record in in_reading_order(report).records if record.kind == "sae"]
    assert order[:4] == ["TC-SAE", "twin", "TC-SAE, pruned", "twin, pruned"]


def test_its_label_names_the_original_and_it_stands_below(report):
    order = [record for record in in_reading_order(report).records if record.kind == "sae"]
    assert [record.name for record in order] == ["b-tc", "b-twin", "a-pruned"]
    assert [Sweep(report).label(record) for record in order] == ["TC-SAE", "twin", "twin, pruned"]


def with_pruned(families=("none",)):
    """The synthetic report with pruned SAEs at layer 5, listed first."""
    base = synthetic_report(layers=(5,), features=3)
    originals = [f"l5-topk64-{family}-s0" for family in families]
    found = [base.record(name, 5) for name in originals]
    pruned = [
        one.model_copy(update={"name": f"{one.name}-pruned", "role": "pruned", "pair": one.name}) for one in found
    ]
    pairs = [paired(f"{name}-pruned", name, 5).model_copy(update={"kind": "pruned"}) for name in originals]
    return base.model_copy(update={"records": [*pruned, *base.records], "paired": [*base.paired, *pairs]})


def test_the_page_shows_both_comparisons_under_their_own_names():
    page = render_page(with_pruned())
    assert page.index('<section id="twins">') < page.index('<section id="pruned">') < page.index('<section id="table">')
    part = page[page.index('<section id="pruned">') : page.index('<section id="table">')]
    assert f'<b class="ink-pruned" title="{PRUNED}">twin, pruned</b> against <b class="ink-twin"' in part
    assert "the pruned SAE is" in part
    assert "TC-SAE" not in part
    assert f"Layer 5, {PRUNED} minus its original: " in page
    assert "Pruned against the original" not in render_page(synthetic_report(layers=(5,), features=3))


def test_pruned_alone_says_nothing_of_the_temporal_term():
    report = with_pruned()
    alone = report.model_copy(update={"paired": [pair for pair in report.paired if pair.kind == "pruned"]})
    assert "nothing can be said of the temporal term" in first_sentences(verdicts(alone))[0]
    assert PRUNED in outcomes_of_changes(alone)[0]


def test_charts_join_a_pruned_sae_with_its_original_and_leave_it_out_of_the_sweep():
    report = with_pruned()
    panels = {panel.key: panel for group in sections(in_reading_order(report)).values() for panel in group}
    plane = panels["plane-zoomed-5"]
    joined = [{plane.marks[at].label for at in link} for link in plane.links]
    assert {"twin", "twin, pruned"} in joined
    assert not any(key.startswith("weight") for key in panels)
