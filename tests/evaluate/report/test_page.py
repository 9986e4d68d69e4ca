import json
import re

import pytest
from page import Page, data_of
from synthetic import metric, paired, synthetic_report
from tcsae.evaluate.features.page_data import embedded, payload, visible
from tcsae.evaluate.report.page import render_page, write_report
from tcsae.evaluate.report.sweep import in_reading_order
from tcsae.evaluate.report.tables import comparisons, main_tables, published
from tcsae.evaluate.report.wording import decimals, evaluated, outcomes_of_changes, show, verdict
from tcsae.evaluate.results import Definition, EvaluationReport, Metric
from tcsae.sites import Location


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return synthetic_report()


@pytest.fixture(scope="module")
def text(report) -> str:
    return render_page(report)


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_page_is_well_formed(page):
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("h1") == 1
    assert page.tags[:2] == ["html", "head"]


def test_every_link_inside_the_page_leads_somewhere(page):
    inside = [link[1:] for link in page.links if link.startswith("#")]
    assert len(inside) >= 8
    assert set(inside) <= set(page.ids)


def test_page_loads_nothing(page, text):
    assert page.loads == []
    assert [link for link in page.links if not link.startswith("#")] == ["results.json"]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    assert set(re.findall(r"https?://[^\"' ]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_every_record_and_every_metric_is_on_the_page(page, report, text):
    for record in report.records:
        assert (
            text.count(f'data-record="{record.name.replace("<", "&lt;").replace(">", "&gt;")}"') >= 2
        )  # main and full table
    for definition in report.definitions.values():
        assert definition.text in page.text
    assert report.failures[0].message in page.text


def test_sections_follow_the_data():
    bare = synthetic_report(layers=(5,), features=0, paired=[], training={}, failures=[], notes=[])
    bare = bare.model_copy(
        update={"features": {}, "records": [r.model_copy(update={"curves": {}}) for r in bare.records]}
    )
    text = render_page(bare)
    page = Page(text)
    assert {"twins", "browse", "training", "features", "notes"}.isdisjoint(page.ids)
    assert {"table", "fidelity", "published", "everything"} <= set(page.ids)
    assert "nothing can be said of the temporal term" in page.text
    assert "<script" not in text


def test_a_report_without_records_still_is_a_page():
    empty = synthetic_report(layers=(), records=[], paired=[], training={}, features={})
    page = Page(render_page(empty))
    assert not page.open
    assert "0 sparse autoencoders" in page.text


def test_columns_stand_in_groups_whatever_their_report_says_of_them(report):
    """A report of before, whose definitions name no group; and a plug-in's metric in a group of its own."""
    assert not any(one.group for one in report.definitions.values())
    groups = [column.group for column in main_tables(report)[0].columns]
    assert list(dict.fromkeys(groups)) == ["sparsity", "fidelity", "features", "time", "position"]
    assert groups == sorted(groups, key=groups.index), "each group once"
    new = Definition(text="a metric of a plug-in", unit="1", label="mine", group="mine")
    records = [r.model_copy(update={"metrics": {"new": metric("kl", 1.0), **r.metrics}}) for r in report.records]
    more = report.model_copy(update={"records": records, "definitions": {"new": new, **report.definitions}})
    columns = main_tables(more)[0].columns
    assert (columns[-1].label, columns[-1].group) == ("mine", "mine")
    assert [column.group for column in columns[:-1]] == groups


def test_undefined_is_a_dash_with_its_reason(report):
    table = main_tables(report)[-1]
    keys = [column.key for column in table.columns]
    zero = next(row for row in table.references if row.full_name == "zero_sae").cells[keys.index("cosine")]
    assert (zero.text, zero.reason) == ("—", "b")
    identity = next(row for row in table.references if row.full_name == "identity_bf16").cells[keys.index("l0")]
    assert (identity.text, identity.reason) == ("—", "a")
    assert set(table.reasons()) == {"a", "b"}


def test_a_reference_without_features_has_no_l0_rather_than_an_undefined_one(report):
    null = {"l0": metric("l0", None)}
    records = [r.model_copy(update={"metrics": r.metrics | null}) if r.name == "mean" else r for r in report.records]
    table = main_tables(report.model_copy(update={"records": records}))[0]
    mean = next(row for row in table.references if row.full_name == "mean")
    assert mean.cells[[column.key for column in table.columns].index("l0")].reason == "a"


def test_hostile_tokens_stay_text(report, text, page):
    assert "<img" not in text
    assert page.handlers == []
    assert "<script>alert" not in text
    data = data_of(text)
    shown = {
        w for sae in data["saes"] for f in sae["features"] for p in f["p"] for w in (data["words"][i] for i in p["t"])
    }
    assert {"<script>", "</script>", "<img src=x onerror=alert(2)>", "‹U+202E›", "‹U+2028›", "‹U+0000›", "\n"} <= shown
    assert "\u202e" not in text
    assert "\u2028" not in text
    assert "\x00" not in text


def test_hostile_names_stay_text():
    nasty = synthetic_report(
        layers=(5,), features=2, name='"><script>alert(3)</script>', notes=["<img src=x onerror=alert(4)>"]
    )
    page = Page(text := render_page(nasty))
    assert page.tags.count("script") == 2  # the data and the program
    assert page.tags.count("img") == 0
    assert "<script>alert(3)" not in text


def test_same_evaluation_same_bytes(report, text):
    assert render_page(report) == text


def test_embedded_json_cannot_leave_its_element():
    data = {"a": "</script><!--<script>&\u2028"}
    out = str(embedded(data))
    assert not set(out) & set("<>&\u2028\u2029")
    assert json.loads(out) == data


def test_payload_keeps_values_and_nulls(report):
    data = payload(report)
    card = report.features[report.records[0].name][1]
    found = next(f for f in data["saes"][0]["features"] if f["id"] == card.feature)
    assert len(found["p"]) == len(card.passages)
    passage, shown = card.passages[0], found["p"][0]
    assert [data["words"][i] for i in shown["t"]] == passage.tokens
    for value, level in zip(passage.activations, shown["a"], strict=True):
        assert (level == 0) == (value == 0)
        assert level / 100 * found["top"] == pytest.approx(value, abs=0.011 * found["top"])
    assert found["pos"]["y"][:3] == [None, None, None]
    assert "eta_squared" not in next(f for f in data["saes"][0]["features"] if f["id"] == 3)["n"]


@pytest.mark.parametrize("bound", [400_000, 120_000, 60_000])
def test_payload_is_bounded_and_gives_up_passages_before_features(report, bound):
    data = payload(report, max_bytes=bound)
    assert len(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()) <= bound
    sizes = {len(sae["features"]) for sae in data["saes"]}
    assert len(sizes) == 1
    assert min(sizes) >= 10
    if bound == 400_000:
        assert sizes == {30}


def test_visible_writes_out_what_acts_or_hides():
    assert visible("a b\n\té—") == "a b\n\té—"
    assert visible("\u202eabc\ufeff\u200b\x07") == "‹U+202E›abc‹U+FEFF›‹U+200B›‹U+0007›"


def test_headline_says_what_was_evaluated(report):
    sentence = evaluated(report)
    for part in ("5 sparse autoencoders", "layers 5 and 12", "24,384", "12 documents", "seed 0", "cpu"):
        assert part in sentence


@pytest.mark.parametrize(
    ("value", "low", "high", "word"),
    [
        (-0.2, -0.3, -0.1, "lower"),
        (0.2, 0.1, 0.3, "higher"),
        (0.2, -0.1, 0.5, "undecided"),
        (0.2, 0.0, 0.4, "undecided"),
    ],
)
def test_verdict_is_no_stronger_than_the_interval(value, low, high, word):
    found = verdict(Metric(value=value, unit="1", n=5, low=low, high=high, definition="kl"))
    assert found is not None
    assert found.word == word


def test_no_interval_decides_nothing():
    bare = verdict(Metric(value=-3.0, unit="1", n=5, definition="kl"))
    assert bare is not None
    assert not bare.decided
    assert verdict(Metric(value=None, unit="1", n=0, definition="kl")) is None
    same = verdict(metric("l0", 0.0))
    assert same is not None
    assert same.word == "equal"


def test_many_pruned_pairs_are_counted():
    many = [paired(f"a{i}", f"b{i}", 5).model_copy(update={"kind": "pruned"}) for i in range(6)]
    sentences = outcomes_of_changes(synthetic_report(layers=(5,), features=0, paired=many))
    assert "6 pairs, pruned SAE minus original: KL 6 higher." in sentences


def test_unequal_sparsity_is_said_beside_the_comparison(report, page):
    assert comparisons(report, "twin")[0].warning == ""
    assert "78.2" in comparisons(report, "twin")[1].warning
    assert "not compared at equal sparsity" in page.text
    records = [
        r.model_copy(update={"metrics": r.metrics | {"l0": metric("l0", 90.0)}}) if r.role == "twin" else r
        for r in report.records
    ]
    silent = report.model_copy(
        update={"records": records, "paired": [paired(*names, 5) for names in [(records[0].name, records[1].name)]]}
    )
    assert "64.0 and 90.0" in comparisons(silent, "twin")[0].warning


def test_better_and_worse_follow_the_definition(report):
    found = {d.column.key: d for d in comparisons(report, "twin")[0].differences}
    assert found["kl"].word == "higher: worse"
    assert found["temporal_variation"].word == "lower"
    assert found["explained_variance"].word == "undecided"
    assert "<svg" in found["kl"].glyph


def test_rows_come_in_reading_order(report):
    shuffled = report.model_copy(update={"records": sorted(report.records, key=lambda r: r.name)})
    names = [record.name for record in in_reading_order(shuffled).records]
    tc, twin = names.index("l5-topk64-pairwise0.1-w5-s0"), names.index("l5-topk64-none-s0")
    assert twin == tc + 1
    kinds = [record.kind for record in in_reading_order(shuffled).records]
    assert kinds == sorted(kinds, reverse=True)


def test_side_metrics_do_not_crowd_the_comparison(report):
    more = report.paired[0].metrics | {"kl_without_outliers": metric("kl", 0.2, 0.1)}
    pair = report.paired[0].model_copy(update={"metrics": more})
    found = comparisons(report.model_copy(update={"paired": [pair]}), "twin")[0]
    assert [d.column.key for d in found.others] == ["kl_without_outliers"]
    assert "kl" in [d.column.key for d in found.differences]


def test_published_table_sets_the_paper_beside_untrained_rows(report):
    found = published(report)
    assert found is not None
    layer, rows = found
    by_name = {row.quantity: row for row in rows}
    assert layer == Location(12)
    assert by_name["CE (nats)"].here[0].text == "10.80"
    assert by_name["L0 / d"].here[2].text == "0.501"
    assert by_name["cosine(x, x̂)"].here[1].text == "—"
    assert (
        published(synthetic_report(layers=(5,), features=0, records=[r for r in report.records if r.kind == "sae"]))
        is None
    )


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 2, "0.00"),
        (-0.001, 2, "−0.001"),
        (1234.5, 1, "1,234.5"),
        (-0.25, 2, "−0.25"),
        (3e-7, 3, "3·10⁻⁷"),
        (0.0004, 3, "0.0004"),
    ],
)
def test_numbers_keep_a_figure_and_a_true_minus(value, digits, text):
    assert show(value, digits) == text


def test_digits_follow_the_interval():
    assert decimals(0.97123, 0.967, 0.975) == 4
    assert decimals(3.58, 3.55, 3.61) == 3
    assert decimals(1138.52) == 0


def test_written_page_and_figures(tmp_path):
    small = synthetic_report(layers=(5,), features=2, training={})
    path = write_report(small, tmp_path)
    assert path == tmp_path / "index.html"
    assert path.read_text() == render_page(small)
    names = {p.name for p in (tmp_path / "figures").iterdir()}
    assert {"plane-5.png", "plane-5.svg", "kl-5.png", "density-5.svg"} <= names
    assert not list(tmp_path.glob("*.partial"))
