"""Trainings in processes of their own: what is kept of them, when it is reused, and how they fail."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from stores import make_store
from tcsae.errors import RunError
from tcsae.sites import Location
from tcsae.study import alone, alone_process
from tcsae.study.alone import alone_costs, measure_alone
from tcsae.study.plan import AloneStage, PlannedMember
from tcsae.train.options import train_config

MACHINE = {"device": "cpu", "cores": 2}
NUMBERS = {"steps": 2, "tokens": 120, "seconds": 0.5, "held_bytes": 10**8, "peak_bytes": 3 * 10**8}
SMALL = {"steps": 2, "batch_size": 60, "width": 16, "k": 4, "device": "cpu", "dtype": "float32", "baseline": False}


@pytest.fixture
def stage(tmp_path):
    store = str(make_store(tmp_path / "cache", rows=16, d_model=8))
    members = tuple(
        PlannedMember("text", Location(3), name, 0, train_config(
            store=store, out=tmp_path / "cost/text", name=f"l3-{name}-s0", temporal_weight=weight, **SMALL
        )) for name, weight in (("none", 0.0), ("next", 0.1))
    )  # fmt: skip
    return AloneStage("text", Location(3), store, members)


@pytest.fixture
def asked(monkeypatch):
    """Names of the members that a process is started for; none is."""
    names = []
    monkeypatch.setattr(alone, "_train_in_a_process", lambda each: names.append(each.variant) or NUMBERS)
    return names


def test_a_training_has_a_process_of_its_own(stage):
    one = replace(stage, members=stage.members[1:])
    assert measure_alone(one, MACHINE) == 1
    (cost,) = alone_costs(one, "tiny")
    assert (cost.variant, cost.seed, cost.model, cost.place) == ("next", 0, "tiny", "l3")
    assert (cost.steps, cost.tokens) == (2, 120)
    assert cost.seconds > 0
    assert cost.microseconds_per_token == 1e6 * cost.seconds / 120
    assert cost.held_bytes > 5e7, "Python and torch"
    assert 0 < cost.memory_bytes == cost.peak_bytes - cost.held_bytes < 1e9
    assert [path.name for path in one.members[0].folder.parent.iterdir()] == ["l3-next-s0.json"], "nothing else is kept"


def test_of_several_tries_the_least_counts(stage, monkeypatch):
    tries = iter([(5.0, 300), (7.0, 200), (6.0, 250)] * 2)

    def trained(each):
        seconds, peak = next(tries)
        return NUMBERS | {"seconds": seconds, "peak_bytes": peak * 10**6}

    monkeypatch.setattr(alone, "_train_in_a_process", trained)
    assert measure_alone(replace(stage, repeats=3), MACHINE) == 2
    assert [(one.seconds, one.memory_bytes, one.repeats) for one in alone_costs(stage, "tiny")] == [(5.0, 10**8, 3)] * 2


def test_what_fits_is_not_measured_again(stage, asked, capsys):
    assert measure_alone(stage, MACHINE) == 2
    assert measure_alone(stage, MACHINE) == 0
    assert measure_alone(stage, MACHINE | {"cores": 4}) == 2, "another machine"
    assert measure_alone(stage, MACHINE | {"cores": 4}) == 0
    first, second = stage.members
    run = second.config.run.model_copy(update={"steps": 3})
    longer = replace(second, config=second.config.model_copy(update={"run": run}))
    asked.clear()
    assert measure_alone(replace(stage, members=(first, longer)), MACHINE | {"cores": 4}) == 1
    assert asked == ["next"], "another configuration"
    moved = second.config.run.model_copy(update={"device": "auto"})
    elsewhere = replace(second, config=second.config.model_copy(update={"run": moved}))
    measure_alone(stage, MACHINE)
    assert measure_alone(replace(stage, members=(first, elsewhere)), MACHINE) == 0, "the machine says the device"
    stage.file(first).write_text(stage.file(first).read_text()[:40])
    asked.clear()
    assert len(alone_costs(stage, "tiny")) == 1
    assert measure_alone(stage, MACHINE) == 1
    assert asked == ["none"]
    assert "l3-none-s0.json is damaged: it does not count" in capsys.readouterr().err


@pytest.mark.parametrize(("child", "sentence"), [
    ("raise SystemExit('gone wrong')", r"l3-none-s0 could not be .* \(status 1: gone wrong\); the same command tries"),
    ("print('{\"failure\": \"too small\"}')", "l3-none-s0 could not be trained in a process of its own: too small"),
    ("print('no JSON')", "status 0: it said nothing"),
])  # fmt: skip
def test_a_process_that_fails_is_one_sentence(stage, monkeypatch, child, sentence):
    monkeypatch.setattr(alone, "_CHILD", child)
    with pytest.raises(RunError, match=sentence) as failed:
        measure_alone(stage, MACHINE)
    assert "\n" not in str(failed.value)


def test_the_process_says_its_failure_and_ends_with_its_parent(stage, monkeypatch, capsys):
    end_with = alone_process._end_with
    monkeypatch.setattr(alone_process, "_end_with", lambda parent: None)
    config = stage.members[0].config.model_dump(mode="json")
    config["data"]["store"] = "nowhere.zarr"
    alone_process.train_alone({"parent": os.getppid(), "config": config})
    assert "nowhere.zarr" in json.loads(capsys.readouterr().out)["failure"]

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(SystemExit):
        end_with(-1)
