"""The decision rule flips where it should: helps, harms, nothing, too little text, a control, the twin, fidelity."""

from __future__ import annotations

import re

import pytest
from synthetic_study import World, make_members, study_file
from tcsae.study.analysis import analyse
from tcsae.study.statistics.decision import figures
from tcsae.study.statistics.resampling import Estimate


def decided(folder, world: World, **changes):
    """The decision of the only comparison, and its outcomes' words by metric."""
    analysis = analyse(study_file(world, **changes), make_members(folder, world))
    decision = next(one for one in analysis.decisions if one.model is None)
    return decision, {reason.metric: reason.word for reason in decision.reasons}


def test_it_helps(tmp_path):
    decision, words = decided(tmp_path, World(effects={"next": {"topic": 0.05}}))
    assert decision.verdict == "helps"
    assert words == {"kl": "kept", "topic": "better", "boundary": "unclear"}
    assert decision.sentence.startswith("Next against None: it helps. Document topic (+0.0")
    assert "KL" in decision.sentence
    assert "within the margin of 0.02 (3 seeds)." in decision.sentence


def test_it_harms(tmp_path):
    decision, words = decided(tmp_path, World(effects={"next": {"topic": -0.05}}))
    assert (decision.verdict, words["topic"]) == ("harms", "worse")
    assert decision.sentence.startswith("Next against None: it harms. Document topic (−0.0")


def test_a_harm_outweighs_a_benefit_and_both_are_told(tmp_path):
    decision, words = decided(tmp_path, World(effects={"next": {"topic": 0.05, "boundary": -0.05}}))
    assert decision.verdict == "harms"
    assert (words["topic"], words["boundary"]) == ("better", "worse")
    assert "; against that, document topic (+0.0" in decision.sentence


def test_nothing_is_no_difference_only_where_the_file_says_what_is_negligible(tmp_path):
    world = World()
    assert decided(tmp_path / "a", world)[0].verdict == "no difference"
    outcomes = [
        {"metric": "kl", "better": "lower", "kind": "fidelity", "margin": 0.02},
        {"metric": "topic", "better": "higher", "kind": "utility"},
    ]
    decision, _ = decided(tmp_path / "b", world, outcomes=outcomes)
    assert decision.verdict == "undecided"
    assert "No difference is told from chance in topic (+0.0" in decision.sentence
    assert decision.sentence.endswith("; fidelity is kept (3 seeds).")


def test_too_little_text_decides_nothing(tmp_path):
    world = World(effects={"next": {"topic": 0.5}}, documents=4)
    decision, words = decided(tmp_path, world)
    assert decision.verdict == "undecided"
    assert set(words.values()) == {"open"}
    assert "too little text for an interval" in decision.sentence


@pytest.mark.parametrize(
    ("control", "said"),
    [
        (0.05, r"its difference from control Shuffled may be zero: [+−]0\.0\d+ \[−.*\]"),
        (0.15, r"control Shuffled does better: the difference from it is −0\.\d+ \[−.*, −.*\]"),
    ],
)
def test_what_a_control_does_as_well_is_no_benefit(tmp_path, control, said):
    effects = {"next": {"topic": 0.05}, "shuffled": {"topic": control}}
    decision, words = decided(tmp_path, World(effects=effects))
    assert decision.verdict == "undecided"
    assert words["topic"] == "not more than a control"
    assert re.search(said, decision.sentence), decision.sentence
    without = [{"name": "the term", "treatment": "next", "baseline": "none"}]
    assert decided(tmp_path, World(effects=effects), comparisons=without)[0].verdict == "helps"


def test_what_the_untrained_twin_shows_is_no_benefit(tmp_path):
    effects = {"next": {"topic": 0.05}}
    world = World(effects=effects, untrained={"next": {"topic": 0.06}})
    decision, words = decided(tmp_path, world)
    assert decision.verdict == "undecided"
    assert words["topic"] == "as untrained"
    assert "not beyond what the same architectures show untrained" in decision.sentence
    less = World(effects=effects, untrained={"next": {"topic": -0.01}})
    assert decided(tmp_path, less)[0].verdict == "helps"
    ignored = [
        {"name": "the term", "treatment": "next", "baseline": "none", "controls": ["shuffled"], "untrained": False}
    ]
    assert decided(tmp_path, world, comparisons=ignored)[0].verdict == "helps"


def test_lost_fidelity_is_a_harm(tmp_path):
    decision, words = decided(tmp_path, World(effects={"next": {"topic": 0.05, "kl": 0.08}}))
    assert (decision.verdict, words["kl"], words["topic"]) == ("harms", "lost", "better")
    assert "is worse by more than the margin of 0.02" in decision.sentence


def test_fidelity_that_may_be_lost_stops_a_benefit(tmp_path):
    decision, words = decided(tmp_path, World(effects={"next": {"topic": 0.05, "kl": 0.019}}))
    assert (decision.verdict, words["kl"], words["topic"]) == ("undecided", "open", "better")
    assert "may be worse by more than the margin of 0.02" in decision.sentence


def test_better_fidelity_alone_is_no_benefit(tmp_path):
    decision, words = decided(tmp_path, World(effects={"next": {"kl": -0.1}}))
    assert (decision.verdict, words["kl"]) == ("undecided", "kept")


def test_one_seed_decides_nothing(tmp_path):
    decision, words = decided(tmp_path, World(effects={"next": {"topic": 0.5}}, seeds=(0,)))
    assert decision.verdict == "undecided"
    assert set(words.values()) == {"open"}
    assert "one seed: no interval over seeds exists" in decision.sentence


def test_seeds_that_disagree_decide_nothing(tmp_path):
    world = World(effects={"next": {"topic": 0.05}}, by_seed=0.05)
    assert decided(tmp_path, world)[0].verdict == "undecided"


def test_more_outcomes_ask_for_a_smaller_p(tmp_path):
    """One real effect among many outcomes that are nothing: Holm's adjusted p decides, not the p alone."""
    world = World(effects={"next": {"topic": 0.05}})
    few = [{"metric": name, "better": "higher", "kind": "utility"} for name in ("topic", "boundary")]
    many = [{"metric": name, "better": "higher", "kind": "utility"} for name in ("topic", "ce", "l0", "cosine", "l1")]
    rule = {"resamples": 100, "alpha": 0.045}  # the least p of 100 resamples is 2/101
    assert decided(tmp_path, world, outcomes=few, rule=rule)[1]["topic"] == "better"
    decision, words = decided(tmp_path, world, outcomes=many, rule=rule)
    assert (decision.verdict, words["topic"]) == ("undecided", "open")
    assert "is better taken alone, not with p = 0.099 over all outcomes" in decision.sentence


def test_more_benefits_can_be_asked_for(tmp_path):
    world = World(effects={"next": {"topic": 0.05}})
    assert decided(tmp_path, world, rule={"resamples": 400, "least_benefits": 2})[0].verdict == "undecided"
    both = World(effects={"next": {"topic": 0.05, "boundary": 0.05}})
    assert decided(tmp_path, both, rule={"resamples": 400, "least_benefits": 2})[0].verdict == "helps"


def test_an_outcome_nobody_measured_decides_nothing(tmp_path):
    outcomes = [{"metric": "gone", "better": "higher", "kind": "utility"}]
    decision, words = decided(tmp_path, World(), outcomes=outcomes)
    assert (decision.verdict, words) == ("undecided", {"gone": "not measured"})


@pytest.mark.parametrize(
    ("value", "ends", "unit", "said"),
    [
        (0.0123, (0.0021, 0.0224), "nats", "+0.012 nats [0.002, 0.022]"),
        (-1.5, (None, None), "share", "−1.50"),
        (None, (None, None), "1", "undefined"),
    ],
)
def test_figures(value, ends, unit, said):
    estimate = Estimate(
        value=value, low=ends[0], high=ends[1], seeds=[], by_seed=[], positive=0, negative=0, levels=""
    )  # fmt: skip
    assert figures(estimate, unit) == said


def test_a_study_of_several_comparisons_counts_them(tmp_path):
    world = World(effects={"next": {"topic": 0.05}, "shuffled": {"topic": -0.05}})
    comparisons = [
        {"name": name, "treatment": name, "baseline": "none", "controls": controls}
        for name, controls in (("next", ["shuffled"]), ("shuffled", []))
    ]
    members = make_members(tmp_path, world)
    study = study_file(world, comparisons=comparisons)
    assert analyse(study, members).headline == "Of 2 comparisons 1 helps (next) and 1 harms."
    again = comparisons[1] | {"name": "again"}
    study = study_file(world, comparisons=[comparisons[1], again])
    assert analyse(study, members).headline == "Of 2 comparisons none helps and 2 harm."
