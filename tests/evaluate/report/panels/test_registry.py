"""What every registered panel keeps to."""

from __future__ import annotations

import pytest
from synthetic import synthetic_report
from tcsae.errors import UsageError
from tcsae.evaluate.report.chart import Axis, Mark, Panel
from tcsae.evaluate.report.panels.registry import PANELS, SECTIONS, panel, sections
from tcsae.evaluate.results import EvaluationReport, Record


def drawn(name: str, report: EvaluationReport, layer: int = 5) -> list[Panel]:
    found = PANELS.get(name).draw(report, layer)
    return [found] if isinstance(found, Panel) else list(found or ())


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    """A sweep of λ2 at one layer, so that every panel has something to show."""
    report = synthetic_report(layers=(5,), features=0)
    tc = next(record for record in report.records if record.role == "tc")

    def with_weight(weight: float) -> Record:
        assert tc.sae is not None
        settings = tc.sae.settings | {"temporal.weight": weight}
        return tc.model_copy(update={"name": f"tc-{weight:g}", "sae": tc.sae.model_copy(update={"settings": settings})})

    sweep = [with_weight(weight) for weight in (0.03, 0.3, 1.0)]
    return report.model_copy(update={"records": [*report.records, *sweep]})


@pytest.mark.parametrize("name", PANELS)
def test_every_panel_is_drawn_with_words_and_axes(name, report):
    found = drawn(name, report)
    assert found
    for one in found:
        assert one.title
        assert one.caption.endswith(".")
        assert one.marks or one.lines
        assert one.x.label
        assert one.y.label or one.y.categories
        assert "5" in one.key, "two layers must not write one file"


@pytest.mark.parametrize("name", PANELS)
def test_every_panel_is_left_out_without_its_numbers(name, report):
    def without(record: Record) -> Record:
        nulls = {key: one.model_copy(update={"value": None}) for key, one in record.metrics.items()}
        return record.model_copy(update={"metrics": nulls, "curves": {}})

    bare = report.model_copy(update={"records": [without(record) for record in report.records], "training": {}})
    assert drawn(name, bare) == []
    assert drawn(name, report.model_copy(update={"records": [], "training": {}})) == []


def test_sections_hold_every_panel_once_and_in_order(report):
    found = sections(report)
    assert tuple(found) == SECTIONS
    assert all(group for group in found.values())
    assert all(one.layer == 5 for group in found.values() for one in group)
    assert [one.key for one in found["fidelity"]] == [
        one.key for name in PANELS if PANELS.get(name).section == "fidelity" for one in drawn(name, report)
    ]


def a_panel(key: str) -> Panel:
    return Panel(key, "a title", Axis("x"), Axis("y"), (Mark(1, 2, "tc"),))


@pytest.fixture
def registered():
    """Register panels for one test only."""
    before = dict(PANELS._entries)
    yield
    PANELS._entries.clear()
    PANELS._entries.update(before)


def test_a_new_panel_comes_last_in_its_section(report, registered):
    @panel("time")
    def mine(report, layer):
        return a_panel(f"mine-{layer}")

    assert [one.key for one in sections(report)["time"]][-1] == "mine-5"


def test_what_cannot_be_shown_is_a_sentence(report, registered):
    with pytest.raises(UsageError, match="no section 'money': choose one of fidelity, time, position"):
        panel("money")
    with pytest.raises(UsageError, match="'plane' is registered by this program already"):
        panel("time", name="plane")(lambda report, layer: None)
    panel("time", name="again")(lambda report, layer: a_panel("plane-5"))
    with pytest.raises(UsageError, match="two report panels have the key 'plane-5'"):
        sections(report)
