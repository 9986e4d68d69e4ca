"""The paper's claims are looked for by settings, and say "not measured" where a study lacks them."""

from __future__ import annotations

import pytest
from synthetic_study import LEVELS, World, make_members, study_file
from tcsae.study import claims as claims_module
from tcsae.study.alone import AloneCost
from tcsae.study.analysis import analyse
from tcsae.study.claims import CLAIMS

PAPER = {"temporal.form": "pairwise", "temporal.partner": "next", "temporal.weight": 0.1, "data.window": 5}
SETTINGS = {
    "tc": PAPER | {"cost.trained_together": 1, "cost.training_memory": 1.2e9},
    "plain": PAPER | {"temporal.weight": 0.0, "cost.trained_together": 1},
    "window3": PAPER | {"data.window": 3},
    "heavy": PAPER | {"temporal.weight": 1.0},
}


def make(folder, variants=("tc", "plain", "window3", "heavy"), preset="paper", **changes):
    metrics = ("ce", "ce_clean", "kl", "cosine", "l0", "l1", "mse_per_token", "explained_variance", "topic", "alive")
    effects = {"tc": {"kl": 0.1, "cosine": 0.05}, "plain": {}, "window3": {"cosine": -0.1}, "heavy": {"alive": -0.6}}
    world = World(variants=variants, effects=effects, settings=SETTINGS, metrics=metrics, by_document=0.002, **changes)
    study = study_file(
        world,
        variants=[{"name": name, "preset": preset} for name in variants],
        comparisons=[],
        outcomes=[],
    )
    return study, make_members(folder, world)


@pytest.fixture(autouse=True)
def alive_level(monkeypatch):
    monkeypatch.setitem(LEVELS, "alive", 0.9)


@pytest.fixture
def rows(tmp_path):
    return {one.key: one for one in analyse(*make(tmp_path)).claims}


def test_every_claim_is_a_row(rows):
    assert list(rows) == [claim.key for claim in CLAIMS]


def test_a_higher_kl_is_no_improvement(rows):
    one = rows["kl"]
    assert (one.verdict, one.variants) == ("does not hold", ["tc", "plain"])
    assert one.estimate.value == pytest.approx(0.1, abs=0.01)
    assert one.measured.startswith("0.293 against 0.193: +0.0996 [")


def test_ratios_and_shares(rows):
    assert (rows["kl_without"].verdict, rows["kl_without"].variants) == ("does not hold", ["plain", "tc"])
    assert rows["kl_without"].estimate.value == pytest.approx(0.2 / 0.3 - 1, abs=0.02)
    assert (rows["window"].verdict, rows["window"].variants) == ("holds", ["window3", "tc"])
    assert rows["l0"].verdict == "holds", "32 of 64 features"
    assert rows["l0_baseline"].verdict == "does not hold"
    assert (rows["collapse"].verdict, rows["collapse"].variants) == ("holds", ["heavy", "tc"])


def alone(variant, seed, megabytes):
    """Training alone added so much."""
    about = {"variant": variant, "seed": seed, "model": "toy", "place": "l5", "repeats": 3, "steps": 50}
    about |= {"tokens": 1000, "seconds": 1.0}
    return AloneCost(held_bytes=400_000_000, peak_bytes=400_000_000 + int(1e6 * megabytes), **about)


def test_memory_is_that_of_trainings_alone_where_members_shared_a_process(tmp_path):
    shared = {name: one | {"cost.trained_together": 8} for name, one in SETTINGS.items()}
    study, _ = make(tmp_path / "shared")
    members = make_members(tmp_path / "other", World(variants=tuple(shared), settings=shared))
    for factor, verdict in ((1.2, "holds"), (1.0, "does not hold")):
        costs = [
            alone(name, seed, (50 + 0.1 * seed) * (factor if name == "tc" else 1))
            for name in ("tc", "plain")
            for seed in (0, 1, 2)
        ]
        analysis = analyse(study, members, alone=costs)
        (one,) = (claim for claim in analysis.claims if claim.key == "memory")
        assert (one.verdict, one.variants) == (verdict, ["tc", "plain"])
        assert one.estimate.value == pytest.approx(factor - 1, abs=1e-6)
        assert one.estimate.seeds == [0, 1, 2]
        assert "of what 50 steps in a process of their own add" in one.meaning
        assert one.measured.startswith(f"{50.1 * factor:.1f} MB against 50.1 MB: ")
        cost = {row.variant: row for row in analysis.costs}
        assert cost["tc"].alone_memory_bytes == pytest.approx(50.1e6 * factor)
        assert cost["window3"].alone_memory_bytes is None
    (one,) = (claim for claim in analyse(study, members, alone=costs[:3]).claims if claim.key == "memory")
    assert one.verdict == "not measured", "of the baseline there is none"


def test_memory_needs_processes_of_their_own(rows, tmp_path):
    assert rows["memory"].verdict == "holds"
    shared = {name: one | {"cost.trained_together": 8} for name, one in SETTINGS.items()}
    study, _ = make(tmp_path / "shared")
    world = World(variants=tuple(shared), settings=shared)
    found = {one.key: one for one in analyse(study, make_members(tmp_path / "other", world)).claims}
    assert found["memory"].verdict == "not measured"
    assert "whose memory cannot be told apart" in found["memory"].measured


def test_numbers_of_the_training_come_from_the_run(rows, tmp_path, monkeypatch):
    assert rows["temporal_share"].verdict == "not measured", "these runs have no record"
    logged = {"temporal_share": 0.15, "grad_norm": 0.1}
    monkeypatch.setattr("tcsae.study.analysis._trained", lambda member: logged)
    found = {one.key: one for one in analyse(*make(tmp_path / "again")).claims}
    assert found["temporal_share"].verdict == "holds"
    assert found["gradient"].verdict == "does not hold"
    assert found["gradient"].estimate.levels == "3 seeds alone: a number of the training varies by seed alone"


def test_what_the_study_lacks_is_not_measured(tmp_path):
    found = {one.key: one for one in analyse(*make(tmp_path, variants=("tc",))).claims}
    assert found["l0"].verdict == "holds"
    for key in ("kl", "window", "collapse"):
        assert found[key].verdict == "not measured"
        assert found[key].measured.startswith("needs the")


def test_one_seed_leaves_claims_undecided(tmp_path):
    found = {one.key: one for one in analyse(*make(tmp_path, seeds=(0,))).claims}
    assert found["kl"].verdict == "undecided"
    assert "one seed: no interval over seeds exists" in found["kl"].measured


def test_the_published_table_stands_beside_ours(tmp_path):
    analysis = analyse(*make(tmp_path))
    table = analysis.published
    assert (table.tc, table.baseline, table.place, table.width) == ("tc", "plain", "l5", 64)
    assert table.forensic == ["zero_all", "untrained", "mean"]
    kl = table.rows[0]
    assert (kl.paper_baseline, kl.paper_tc) == ("10.06", "17.75")
    assert kl.tc.value - kl.baseline.value == pytest.approx(0.1, abs=0.01)
    assert kl.forensic[0] == pytest.approx(3.2, abs=0.1)
    assert "Of the paper's 13 claims " in analysis.headline


def test_other_studies_make_no_claims_of_the_paper(tmp_path):
    analysis = analyse(*make(tmp_path, preset="modern"))
    assert (analysis.claims, analysis.published) == ([], None)


def test_claims_are_judged_by_the_whole_interval():
    claim = claims_module.Claim("x", "x", "metric", "x", lambda one: True, low=0.1, high=0.2)
    estimate = claims_module.Estimate
    about = {"value": 0.15, "seeds": [], "by_seed": [], "positive": 0, "negative": 0, "levels": ""}
    found = [
        claims_module._found(estimate(low=low, high=high, **about), claim)
        for low, high in ((0.11, 0.19), (0.05, 0.15), (0.3, 0.4), (None, None))
    ]
    assert found == ["holds", "undecided", "does not hold", "undecided"]
