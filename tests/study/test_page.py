"""A study's page: the verdict first, a chart per outcome with margin, controls and seeds, every number in a table."""

from __future__ import annotations

import re

import pytest
from synthetic_study import World, make_members, study_file
from tcsae.study.analysis import analyse
from tcsae.study.findings import Analysis, read_analysis
from tcsae.study.page import PAGE, all_panels, render_page, write_page
from tcsae.study.panels import curve_panels, effect_panels, level_panels, summary_panel, sweep_panels

WORLD = World(effects={"next": {"topic": 0.05}}, places=("l5", "l12"))


@pytest.fixture(scope="module")
def analysis(tmp_path_factory) -> Analysis:
    return analyse(study_file(WORLD), make_members(tmp_path_factory.mktemp("study"), WORLD))


@pytest.fixture(scope="module")
def page(analysis) -> str:
    return render_page(analysis)


def test_the_verdict_is_the_first_sentence(page):
    assert re.search(r"<h1>(.*?)</h1>", page)[1] == "Next against None: it helps."
    assert page.index("it helps") < page.index("<section")


def test_the_order_is_verdict_questions_cost_tables_limits(page):
    places = [page.index(f'<section id="{key}"') for key in ("the-term", "cost", "training", "tables", "limits")]
    assert places == sorted(places)


def test_a_chart_shows_effect_places_controls_twin_seeds_and_margin(analysis):
    kl, topic, _ = effect_panels(analysis.comparisons[0], analysis)
    assert topic.y.categories == ("Next", "l5", "l12", "Shuffled", "beyond untrained")
    assert kl.y.categories == ("Next", "l5", "l12", "Shuffled"), "fidelity asks for no twin"
    assert [rule.x for rule in kl.rules] == [0.0, 0.02]
    assert [rule.x for rule in topic.rules] == [0.0]
    large = [mark for mark in topic.marks if not mark.small]
    assert all(mark.x_interval for mark in large)
    assert len([mark for mark in topic.marks if mark.small]) == 3 * len(large)
    assert "dot" in page_of(analysis)


def page_of(analysis):
    return render_page(analysis)


def test_every_number_of_the_decision_is_on_the_page(analysis, page):
    for reason in analysis.decisions[0].reasons:
        assert reason.sentence in page
    assert f"{analysis.tests} tests, {analysis.estimates} effects estimated" in page
    assert analysis.fingerprint in page
    for text in ("2 cores, 2 threads", "pipeline study studies/made_up.toml --scale small", "made-up study"):
        assert text in page


def test_the_page_loads_nothing_and_is_always_the_same(analysis, page):
    assert "default-src 'none'" in page
    assert not re.search(r"(?:src|href)=\"(?!#|analysis\.json)", page)
    assert render_page(analysis) == page


def test_what_names_say_is_text(tmp_path):
    study = study_file(WORLD, question="<script>alert(1)</script>?")
    study = study.model_copy(
        update={"variants": tuple(one.model_copy(update={"label": "<b>x</b> & y"}) for one in study.variants)}
    )
    page = render_page(analyse(study, make_members(tmp_path, WORLD)))
    assert "<script>" not in page
    assert "<b>x" not in page
    assert "&lt;b&gt;x" in page


def test_it_is_written_with_its_figures_and_numbers(analysis, tmp_path):
    path = write_page(analysis, tmp_path / "study")
    assert path == tmp_path / "study" / PAGE
    assert read_analysis(tmp_path / "study") == analysis
    drawn = {file.stem for file in (tmp_path / "study" / "figures").glob("*.svg")}
    assert drawn == {panel.key for panel in all_panels(analysis)}


def test_curves_are_means_over_seeds(analysis):
    loss = next(panel for panel in curve_panels(analysis) if panel.key == "curve-loss")
    assert [line.label for line in loss.lines] == ["Next", "None", "Shuffled"]
    assert loss.lines[0].y[0] == pytest.approx(10 / 10**0.3)
    share = next(panel for panel in curve_panels(analysis) if panel.key == "curve-temporal-share")
    assert max(share.lines[0].y) == pytest.approx(15)


def test_failed_members_and_limits_are_told(tmp_path):
    world = World(seeds=(0,), documents=20)
    members = make_members(tmp_path, world)
    members[2] = type(members[2])(**(vars(members[2]) | {"failure": "out of disk"}))
    page = render_page(analyse(study_file(world), members))
    assert "out of disk" in page
    assert "One seed: no interval over seeds exists" in page
    assert "fewer than 30 documents" in page
    assert "No control stands beside" not in page
    alone = [{"name": "the term", "treatment": "next", "baseline": "none"}]
    page = render_page(analyse(study_file(world, comparisons=alone), members))
    assert "No control stands beside the term: what is found there may have another reason" in page


def test_a_study_of_one_failed_side_has_a_page(tmp_path):
    members = [one for one in make_members(tmp_path, WORLD) if one.variant != "none"]
    analysis = analyse(study_file(WORLD), members)
    page = render_page(analysis)
    assert "was not measured of both next and none" in page
    assert not effect_panels(analysis.comparisons[0], analysis)


def swept_world(folder):
    settings = {
        name: {"temporal.form": "pairwise", "temporal.weight": weight}
        for name, weight in (("a", 0.03), ("b", 0.1), ("c", 0.3))
    }
    settings |= {"other": {"temporal.form": "cosine", "temporal.weight": 0.2}}
    world = World(variants=("a", "b", "c", "other", "none"), settings=settings, effects={"c": {"kl": 0.1}})
    comparisons = [{"name": "c", "treatment": "c", "baseline": "none"}]
    return analyse(study_file(world, comparisons=comparisons), make_members(folder, world))


def test_variants_that_differ_in_the_weight_alone_are_drawn_over_it(tmp_path, analysis):
    found = {panel.key: panel for panel in sweep_panels(swept_world(tmp_path))}
    kl = found["sweep-kl"]
    (line,) = kl.lines
    assert line.x == (0.03, 0.1, 0.3)
    assert line.y[2] - line.y[0] == pytest.approx(0.1, abs=0.02)
    assert len(line.low) == len(line.high) == 3
    assert [rule.label for rule in kl.rules] == ["None"]
    assert not sweep_panels(analysis)


def test_levels_stand_beside_the_untrained_twin(analysis):
    found = {panel.key: panel for panel in level_panels(analysis)}
    assert found["level-topic"].y.categories == ("Next", "None", "Shuffled", "untrained:sae")
    assert {mark.role for mark in found["level-topic"].marks} == {"tc", "twin", "external", "reference"}
    assert {mark.label for mark in found["level-plane"].marks} == {"Next", "None", "Shuffled"}


def test_paths_of_somebodys_disk_are_not_published(tmp_path):
    world = World(models=("/home/somebody/models/Small-1B", "org/other"))
    analysis = analyse(study_file(world), make_members(tmp_path, world))
    assert "/home/somebody" not in render_page(analysis)
    assert [one.model for one in analysis.comparisons] == [None, "Small-1B", "org/other"]


def test_a_question_has_one_picture_where_its_outcomes_have_a_scale(analysis, page):
    panel = summary_panel(analysis.comparisons[0], analysis)
    assert panel.y.categories == ("KL ↓", "document topic ↑", "boundaries ↑")
    kl, topic = (mark for mark in panel.marks if not mark.small and mark.y in (0, 1))
    effects = analysis.comparisons[0].outcomes
    assert kl.x == pytest.approx(-effects[0].effect.value / 0.02), "lower is better"
    assert kl.x_interval[0] == pytest.approx(-effects[0].effect.high / 0.02)
    assert topic.x == pytest.approx(effects[1].effect.value / 0.02)
    controls = [mark for mark in panel.marks if mark.role == "external"]
    assert len(controls) == 3
    assert page.index(panel.key) < page.index("Outcome by outcome")


def test_without_a_scale_every_outcome_has_its_picture(tmp_path):
    outcomes = [{"metric": "topic", "better": "higher", "kind": "utility"}]
    analysis = analyse(study_file(WORLD, outcomes=outcomes), make_members(tmp_path, WORLD))
    assert summary_panel(analysis.comparisons[0], analysis) is None
    assert "Outcome by outcome" not in render_page(analysis)
    assert {panel.key for panel in all_panels(analysis)} >= {"the-term-topic"}
