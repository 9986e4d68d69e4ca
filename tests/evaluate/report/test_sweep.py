"""Sweeps are named, ordered and drawn by their settings, whatever their runs are called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page import Page
from rich.cells import cell_len
from synthetic import synthetic_report
from synthetic_sweep import FIFTY, FIVE, sweep_report
from tcsae.evaluate.finished import Outcome
from tcsae.evaluate.report.chart import RAMP, STYLES
from tcsae.evaluate.report.page import render_page
from tcsae.evaluate.report.panels.registry import sections
from tcsae.evaluate.report.svg import render
from tcsae.evaluate.report.sweep import Sweep, in_reading_order
from tcsae.evaluate.report.tables import difference_tables, main_tables
from tcsae.evaluate.report.terminal import print_outcomes


@pytest.fixture(scope="module")
def five():
    return in_reading_order(sweep_report(FIVE))


@pytest.fixture(scope="module")
def fifty():
    return in_reading_order(sweep_report(FIFTY))


@pytest.fixture(scope="module")
def rivals():
    return in_reading_order(sweep_report({"run.seed": ("0", "1", "2")}, rivals=True))


def saes(report):
    return [record for record in report.records if record.kind == "sae"]


def panel(report, key):
    (found,) = (one for group in sections(report).values() for one in group if one.key == key)
    return found


def test_one_number_is_an_ordered_ramp_with_the_twin_marked_after_it(five):
    sweep = Sweep(five)
    labels = [sweep.label(record) for record in saes(five)]
    assert labels == ["λ2 = 0.01", "λ2 = 0.03", "λ2 = 0.1", "λ2 = 0.3", "twin"]
    styles = [sweep.style(record) for record in saes(five)]
    assert styles[-1] == "twin"
    steps = list(RAMP)
    places = [steps.index(style) for style in styles[:-1]]
    assert (places[0], places[-1], len(set(places))) == (0, len(steps) - 1, 4)
    assert places == sorted(places)


def test_names_of_the_runs_play_no_part(five):
    names = {record.name: f"run-{n}" for n, record in enumerate(reversed(saes(five)))}
    records = [
        r.model_copy(update={"name": names.get(r.name, r.name), "pair": names.get(r.pair or "")}) for r in five.records
    ]
    other = in_reading_order(five.model_copy(update={"records": list(reversed(records)), "paired": [], "training": {}}))
    was, now = Sweep(five), Sweep(other)
    assert [now.label(record) for record in saes(other)] == [was.label(record) for record in saes(five)]
    assert [now.style(record) for record in saes(other)] == [was.style(record) for record in saes(five)]


def test_seeds_of_one_configuration_share_a_style_and_settings_in_a_grid_are_small_charts(fifty):
    sweep = Sweep(fifty)
    groups = sweep.groups(saes(fifty))
    assert len(saes(fifty)) == 50
    assert [len(group) for _, group in groups] == [5] * 10
    assert [series.label for series, _ in groups][:4] == [
        "λ2 = 0.03, partner next", "λ2 = 0.1, partner next", "λ2 = 0.3, partner next", "λ2 = 0.03, partner l2",
    ]  # fmt: skip
    assert groups[-1][0].label == "twin"
    assert {series.facet for series, _ in groups} == {"", "partner next", "partner l2", "partner shuffled"}
    assert len({series.style for series, _ in groups}) == 4
    parts = [one for one in sections(fifty)["time"] if one.key.startswith("lag-autocorrelation")]
    assert [one.part for one in parts] == ["partner next", "partner l2", "partner shuffled"]
    assert len({one.ends() for one in parts}) == 1, "common axes"
    assert all([line.label for line in one.lines][-1] == "twin" for one in parts)
    assert all(len(one.lines) == 4 for one in parts)


def test_architectures_have_colours_of_their_own_and_are_told_apart_by_the_fewest_settings(rivals):
    sweep = Sweep(rivals)
    groups = sweep.groups(saes(rivals))
    labels = [series.label for series, _ in groups]
    assert {"topk, pairwise", "batchtopk, contrastive", "tfa", "txc", "topk, twin"} <= set(labels)
    of_baselines = {series.style for series, _ in groups if series.is_baseline}
    assert of_baselines == {"twin"}
    others = [series.style for series, _ in groups if not series.is_baseline]
    assert len(set(others)) == len(others)
    looks = {(STYLES[style].marker, STYLES[style].dash) for style in [*others, "twin", "reference"]}
    assert len(looks) == len(others) + 2, "told apart without colour"


def test_one_pair_is_called_and_drawn_as_ever():
    report = synthetic_report(layers=(5,), features=0)
    sweep = Sweep(report)
    runs = [record for record in report.records if record.role]
    assert [(sweep.label(r), sweep.style(r)) for r in runs] == [("TC-SAE", "tc"), ("twin", "twin")]
    assert not sweep.several


def test_runs_without_a_difference_in_settings_go_by_their_names(five):
    alike = [record.model_copy(update={"sae": five.records[0].sae, "role": "tc"}) for record in saes(five)]
    report = five.model_copy(update={"records": alike})
    sweep = Sweep(report)
    labels = [sweep.label(record) for record in alike]
    assert labels == [record.name.removeprefix("l12-") for record in alike]


def test_the_twin_is_a_level_beside_the_weights_and_not_a_point_of_them(five, fifty):
    for report, said in ((five, "twin"), (fifty, "mean of 5 twins")):
        drawn = panel(report, "weight-ce-score-mean-12")
        assert all(x > 0 for line in drawn.lines for x in line.x)
        assert [rule.label for rule in drawn.rules] == [said]
        assert drawn.x.log
    assert [line.label for line in drawn.lines] == ["partner next", "partner l2", "partner shuffled"]


def test_of_many_members_tables_have_a_row_for_each_series_and_each_member_below(fifty):
    (table,) = main_tables(fifty)
    assert (len(table.series), len(table.saes)) == (10, 50)
    keys = [column.key for column in table.columns]
    kl = [record.metrics["kl"].value for record in Sweep(fifty).groups(saes(fifty))[0][1]]
    cell = table.series[0].cells[keys.index("kl")]
    assert float(cell.text) == pytest.approx(sum(kl) / 5, abs=1e-3)
    assert [float(end) for end in cell.interval.split(" … ")] == pytest.approx([min(kl), max(kl)], abs=1e-3)
    (differences,) = difference_tables(fifty)
    assert len(differences.series) == 9
    assert difference_tables(sweep_report(FIVE)) == []
    page = Page(text := render_page(fifty))
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert "λ2 = 0.3, partner shuffled" in page.text
    head = text[text.index('id="verdict"') : text.index('id="verdict-each"')]
    assert head.count("<tr>") == 10
    assert "harms 4, undecided 1" in head


@pytest.mark.parametrize("key", ["ce-12", "kl-12", "position-specific-share-12"])
def test_names_of_rows_are_whole_and_cover_no_number(fifty, key):
    """Names above their lines: nothing is cut, and no two words of the chart lie on one another."""
    drawn = panel(fifty, key)
    svg = str(render(drawn))
    assert all(f">{name}<" in svg for name in drawn.y.categories)
    boxes = []
    for x, y, anchor, words in re.findall(
        r'<text class="(?:tick|label)" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]*)', svg
    ):
        wide = 6.0 * len(words)
        start = float(x) - {"start": 0, "end": wide, "middle": wide / 2}[anchor]
        boxes.append((start, float(y) - 9, start + wide, float(y) + 1))
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


@pytest.mark.parametrize("grid", [FIVE, FIFTY])
def test_the_closing_table_fits_80_columns(grid, monkeypatch, capsys):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", "80")
    report = sweep_report(grid)
    print_outcomes([Outcome(report, Path(report.name), None)], as_json=False)
    plain = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    table = plain[plain.index("demo, demo") : plain.index("uniform guess")].splitlines()
    assert max(map(cell_len, table)) <= 80
    assert "topk64" not in plain
    assert len(table) < 50
    assert ("partner l2 ×5" in plain) is (grid is FIFTY)
    assert sum("− its twin" in line for line in table) == (4 if grid is FIVE else 9)
