"""Effects are paired, signed as the metric is, and the differences that controls and twins ask for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from synthetic_study import World, make_members, study_file
from tcsae.study.analysis import analyse
from tcsae.study.file import Comparison, Outcome, Rule
from tcsae.study.statistics.decision import decide
from tcsae.study.statistics.effects import comparison_effects
from tcsae.study.statistics.observations import Observed, ObservedText
from tcsae.study.statistics.resampling import Sampling


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    world = World(
        effects={"next": {"topic": 0.05, "kl": 0.01}, "shuffled": {"topic": 0.02}},
        untrained={"next": {"topic": 0.03}},
        places=("l5", "l12"),
        models=("one", "two"),
    )
    return analyse(study_file(world), make_members(tmp_path_factory.mktemp("effects"), world))


def topic(analysis, model=None):
    effects = next(one for one in analysis.comparisons if one.model == model)
    return next(one for one in effects.outcomes if one.metric == "topic")


def level(analysis, variant, metric):
    rows = [row for row in analysis.variants if row.variant == variant]
    return sum(row.metrics[metric].value for row in rows) / len(rows)


def test_the_effect_is_the_difference_of_levels(analysis):
    one = topic(analysis)
    expected = level(analysis, "next", "topic") - level(analysis, "none", "topic")
    assert one.effect.value == pytest.approx(expected)
    assert (one.treatment, one.baseline) == tuple(
        pytest.approx(level(analysis, name, "topic")) for name in ("next", "none")
    )
    assert sum(place.effect.value for place in one.places) / 4 == pytest.approx(one.effect.value)


def test_controls_are_differences_of_differences(analysis):
    (control,) = topic(analysis).controls
    effect = topic(analysis).effect
    assert control.effect.value + control.advantage.value == pytest.approx(effect.value)
    for seed, total in enumerate(effect.by_seed):
        assert control.effect.by_seed[seed] + control.advantage.by_seed[seed] == pytest.approx(total)


def test_twins_are_subtracted_on_both_sides(analysis):
    one = topic(analysis)
    assert one.untrained.value == pytest.approx(0.02, abs=0.01)
    assert one.over_untrained.value == pytest.approx(0.02, abs=0.01)
    assert one.untrained.low < one.untrained.value < one.untrained.high


def test_every_model_is_also_taken_alone(analysis):
    assert [one.model for one in analysis.comparisons] == [None, "one", "two"]
    assert {place.model for place in topic(analysis, "one").places} == {"one"}
    both = (topic(analysis, "one").effect.value + topic(analysis, "two").effect.value) / 2
    assert both == pytest.approx(topic(analysis).effect.value)


def test_what_was_compared_is_counted(analysis):
    assert analysis.tests == 9  # three outcomes, over both models and over each
    pooled = analysis.comparisons[0]
    per_outcome = 1 + 4 + 2  # the effect, four places, and a control's two
    assert pooled.estimates == 3 * per_outcome + 2 * 3  # and of every outcome two with the untrained twin
    assert analysis.estimates == sum(one.estimates for one in analysis.comparisons)


def test_fidelity_is_tested_at_its_margin_and_asks_for_no_twin(analysis):
    kl = analysis.comparisons[0].outcomes[0]
    assert (kl.metric, kl.wants_untrained, kl.sign) == ("kl", False, -1)
    assert kl.effect.p < 0.02, "there is an effect"
    assert kl.p_worse < 0.02, "which is not at the margin"
    assert kl.p_better_holm is None


def test_a_control_without_numbers_stops_a_benefit(tmp_path):
    world = World(effects={"next": {"topic": 0.05}})
    members = [one for one in make_members(tmp_path, world) if one.variant != "shuffled"]
    analysis = analyse(study_file(world), members)
    assert analysis.decisions[0].verdict == "undecided"
    assert "control Shuffled has no numbers to beat" in analysis.decisions[0].sentence


def test_a_variant_that_this_scale_does_not_run_is_named(tmp_path):
    world = World(effects={"next": {"topic": 0.05}}, variants=("next", "none", "shuffled"))
    study = study_file(world)
    small = study.scales["small"].model_copy(update={"variants": ("next", "none")})
    study = study.model_copy(update={"scales": {"small": small}})
    members = [one for one in make_members(tmp_path, world) if one.variant != "shuffled"]
    analysis = analyse(study, members)
    assert analysis.notes == ["'the term': scale small does not run control shuffled"]
    assert analysis.decisions[0].verdict == "helps"
    alone = small.model_copy(update={"variants": ("none",)})
    analysis = analyse(study.model_copy(update={"scales": {"small": alone}}), members)
    assert analysis.notes == ["'the term' is not compared: scale small does not run next"]
    assert not analysis.decisions
    assert analysis.headline == "The study compares nothing."


class Made:
    """Observations made up in memory: a treatment, a baseline and a control that are all alike but for ``effect``."""

    places = (("toy", "l5"),)

    def __init__(self, seed: int, metrics, effect: float, by_seed: float, by_document: float, documents: int = 50):
        rng, seeds = np.random.default_rng(seed), (0, 1, 2)
        self._text = ObservedText("a", np.arange(documents), 1000, documents, "words")
        self._found = {}
        for metric in metrics:
            common = rng.normal(0, 1, documents)
            for variant in ("treatment", "baseline", "control"):
                own = common + rng.normal(0, by_document, documents) + effect * (variant == "treatment")
                for each in seeds:
                    values = own + rng.normal(0, by_seed) + rng.normal(0, 0.02, documents)
                    self._found[variant, each, metric] = Observed(float(values.mean()), "1", values, np.ones(documents))

    def text(self, *at):
        return self._text

    def seeds(self, variant, at):
        return [0, 1, 2]

    def observed(self, variant, seed, at, metric, *, untrained=False):
        return self._found[variant, seed, metric]

    def share_a_twin(self, *which):
        return True

    def label(self, metric):
        return metric


def verdicts(effect: float, by_seed: float, by_document: float, studies: int = 60) -> Counter:
    metrics = [f"m{i}" for i in range(8)]
    outcomes = [Outcome(metric=metric, better="higher", kind="utility") for metric in metrics]
    comparison = Comparison(name="x", treatment="treatment", baseline="baseline", controls=("control",))
    found = Counter()
    for study in range(studies):
        made = Made(study, metrics, effect, by_seed, by_document)
        effects = comparison_effects(comparison, outcomes, made, Sampling(500, study, 0.05))
        found[decide(effects, Rule(resamples=500)).verdict] += 1
    return found


@pytest.mark.parametrize(("by_seed", "by_document"), [(0.1, 0.0), (0.0, 0.3), (0.05, 0.3)])
def test_without_an_effect_eight_outcomes_seldom_decide_anything(by_seed, by_document):
    found = verdicts(0.0, by_seed, by_document)
    assert found["helps"] + found["harms"] <= 0.05 * 60 + 2
    assert found["undecided"] >= 55


def test_a_large_effect_is_found():
    assert verdicts(0.3, 0.005, 0.1, studies=10) == {"helps": 10}
    assert verdicts(-0.3, 0.005, 0.1, studies=10) == {"harms": 10}


def test_too_few_resamples_for_the_family_are_named(tmp_path):
    world = World(effects={"next": {"topic": 0.5}})
    analysis = analyse(study_file(world, rule={"resamples": 100}), make_members(tmp_path, world))
    assert analysis.limits[0].startswith("100 resamples are too few for 3 outcomes: no adjusted p can be below 0.05")
    assert analysis.limits[0].endswith("give rule.resamples more than 120.")
    enough = analyse(study_file(world, rule={"resamples": 121}), make_members(tmp_path, world))
    assert not enough.limits[0].startswith("121")


@pytest.mark.parametrize(
    ("field", "message"),
    [("comparisons", "two comparisons have one name: 'the term'"), ("outcomes", "two outcomes have one metric: 'kl'")],
)
def test_names_are_single(field, message):
    twice = [one.model_dump() for one in getattr(study_file(World()), field)] * 2
    with pytest.raises(ValueError, match=message):
        study_file(World(), **{field: twice})
