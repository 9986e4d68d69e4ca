"""What members measured is read from kept rows; members without numbers are rows with their sentences."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from synthetic_study import World, make_members, study_file
from tcsae.errors import RunError
from tcsae.evaluate.results import RESULTS_FILE
from tcsae.study.analysis import analyse
from tcsae.study.statistics.observations import Observations, place_order


@pytest.fixture
def members(tmp_path):
    return make_members(tmp_path, World(places=("l12", "l5"), variants=("next", "none")))


def change_report(folder, change):
    content = json.loads((folder / RESULTS_FILE).read_text())
    content.pop("checksum")
    change(content)
    (folder / RESULTS_FILE).write_text(json.dumps(content))


def test_sums_are_those_of_the_kept_rows(members):
    found = Observations(members)
    assert not found.failures
    assert found.places == [("toy", "l5"), ("toy", "l12")]
    assert found.seeds("next", ("toy", "l5")) == [0, 1, 2]
    row = found.rows["next", 1, "toy", "l5"]
    one = found.observed("next", 1, ("toy", "l5"), "topic")
    assert len(one.numerator_U) == len(row.text.documents_U) == 120
    assert one.value == pytest.approx(one.numerator_U.sum() / one.denominator_U.sum())
    assert one.value == pytest.approx(row.record.metrics["topic"].value)


def test_scores_against_references_are_combined_as_in_a_report(members):
    found = Observations(members)
    at = ("toy", "l5")
    ce, clean, score = (found.observed("none", 0, at, name) for name in ("ce", "ce_clean", "ce_score_mean"))
    folder = next(member.report for member in members)
    mean = found.reader.row(folder, "mean", "l5").metrics["ce"]
    assert score.value == pytest.approx((mean.value - ce.value) / (mean.value - clean.value))


def test_a_jackknifed_metric_brings_its_groups_and_a_plain_one_nothing(members):
    found = Observations(members)
    eta, share = (found.observed("none", 0, ("toy", "l5"), name) for name in ("eta", "share"))
    assert list(eta.left_out) == list(range(8))
    assert eta.numerator_U is None
    assert not share.left_out
    assert found.observed("none", 0, ("toy", "l5"), "unheard_of") is None


def test_untrained_twins_are_shared_or_own(tmp_path):
    world = World(untrained={"next": {"topic": 0.1}})
    found = Observations(make_members(tmp_path, world))
    at = ("toy", "l5")
    assert found.share_a_twin("none", "shuffled", 0, at)
    assert not found.share_a_twin("next", "none", 0, at)
    own = found.observed("next", 0, at, "topic", untrained=True)
    assert own.value > found.observed("none", 0, at, "topic", untrained=True).value + 0.05


def test_failed_and_missing_members_are_told_and_the_others_go_on(members, tmp_path):
    failed = dataclasses.replace(members[0], failure="the loss is not finite at step 3")
    gone = dataclasses.replace(members[1], row="no such row")
    nowhere = dataclasses.replace(members[2], report=tmp_path / "nowhere")
    found = Observations([failed, gone, nowhere, *members[3:]])
    assert [one.member for one in found.failures] == [failed, gone, nowhere]
    said = [one.message for one in found.failures]
    assert said[0] == "the loss is not finite at step 3"
    assert "has no row 'no such row' at l12: evaluate again" in said[1]
    assert "no results at" in said[2]
    assert len(found.rows) == len(members) - 3


def test_a_member_without_its_sums_is_told(members):
    change_report(members[0].report, lambda content: [one.update(kept="") for one in content["records"]])
    found = Observations(members)
    assert not found.rows
    assert "has no sums per unit of text for" in found.failures[0].message


@pytest.mark.parametrize("where", ["../../etc/passwd", "rows/../x.npz", "/etc/passwd"])
def test_kept_rows_lie_in_the_report_alone(members, where):
    change_report(members[0].report, lambda content: [one.update(kept=where) for one in content["records"]])
    assert "has no sums per unit of text" in Observations(members).failures[0].message


def test_members_measured_on_another_text_are_not_paired(tmp_path):
    one = make_members(tmp_path / "a", World(variants=("next", "none")))
    other = make_members(tmp_path / "b", World(variants=("next", "none"), documents=50))
    found = Observations([*one[:3], *other[3:]])
    assert len(found.failures) == 3
    assert "was measured on another text or by other code" in found.failures[0].message


def test_a_study_without_any_numbers_says_why(members):
    study = study_file(World(variants=("next", "none", "shuffled")))
    failed = [dataclasses.replace(one, failure="out of memory") for one in members]
    with pytest.raises(RunError, match="study 'made_up' has no member with numbers: out of memory"):
        analyse(study, failed)


def test_seeds_that_lack_a_side_or_a_place_are_left_out_and_named(tmp_path):
    world = World(places=("l5", "l12"), effects={"next": {"topic": 0.05}})
    members = make_members(tmp_path, world)
    lost = next(one for one in members if (one.variant, one.seed, one.place) == ("next", 1, "l12"))
    study = study_file(world)
    analysis = analyse(study, [one for one in members if one is not lost])
    effects = analysis.comparisons[0]
    assert effects.seeds == [0, 2]
    assert "topic: seeds 1 lack a place and are left out of the mean" in effects.notes
    topic = next(one for one in effects.outcomes if one.metric == "topic")
    assert [(one.place, one.effect.seeds) for one in topic.places] == [("l5", [0, 1, 2]), ("l12", [0, 2])]


def test_a_place_without_the_pair_is_left_out_and_named(tmp_path):
    world = World(places=("l5", "l12"))
    members = make_members(tmp_path, world)
    kept = [one for one in members if (one.variant, one.place) != ("none", "l12")]
    effects = analyse(study_file(world), kept).comparisons[0]
    assert "kl: nothing to compare at toy l12, which is left out" in effects.notes


def test_places_are_sorted_by_layer():
    assert sorted(["l12", "l5.mlp_out", "l5"], key=place_order) == ["l5", "l5.mlp_out", "l12"]


def test_documents_survive_in_the_row(members):
    found = Observations(members)
    assert np.array_equal(found.text("toy", "l5").documents_U, np.repeat(np.arange(60), 2))
