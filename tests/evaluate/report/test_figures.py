import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from synthetic import metric, synthetic_report
from tcsae.evaluate.report import figures
from tcsae.evaluate.report.chart import (
    APART,
    DARK,
    LIGHT,
    STYLES,
    Axis,
    Line,
    Mark,
    Panel,
    Rule,
    number,
    power_label,
)
from tcsae.evaluate.report.figures import write_figures
from tcsae.evaluate.report.page import render_page
from tcsae.evaluate.report.panels.fidelity import plane, plane_zoomed
from tcsae.evaluate.report.panels.registry import sections
from tcsae.evaluate.report.panels.time import time_plane, variation_rows
from tcsae.evaluate.report.svg import interval_glyph, render
from tcsae.evaluate.results import Curve, EvaluationReport, TrainingCurves

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return synthetic_report(features=0)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, two: str) -> float:
    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("role", STYLES)
def test_colours_can_be_read_on_light_and_on_dark(role):
    assert contrast(STYLES[role].light, LIGHT) >= 4.5
    assert contrast(STYLES[role].dark, DARK) >= 4.5


def test_roles_differ_without_colour():
    for names in (("tc", "twin", "external", "reference"), ("reconstruction", "sparsity", "temporal", "auxiliary")):
        for a, b in itertools.combinations(names, 2):
            assert STYLES[a].marker != STYLES[b].marker
            assert STYLES[a].dash != STYLES[b].dash


finite = st.one_of(st.just(0.0), st.floats(1e-12, 1e6), st.floats(-1e6, -1e-12))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(finite, min_size=1, max_size=6), st.booleans())
def test_axis_holds_its_values_and_its_ticks(values, log):
    axis = Axis("x", log=log)
    ends = axis.range(values)
    assert ends[0] < ends[1]
    shown = [v for v in values if v > 0 or not log]
    for value in shown:
        assert axis.value(axis.fraction(value, ends), ends) == pytest.approx(
            value, rel=1e-6, abs=1e-6 * (ends[1] - ends[0])
        )
    ticks = axis.ticks(ends)
    assert [t for t, _ in ticks] == sorted(t for t, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)
    slack = 1e-6 * (ends[1] - ends[0])
    assert all(ends[0] - slack <= t <= ends[1] + slack for t, _ in ticks)
    assert 1 <= len(ticks) <= 14


@pytest.mark.parametrize("values", [[32.0], [31.99996, 32.00003], [-2.0, -2.0], [0.0, 0.0]])
def test_values_that_differ_by_rounding_alone_are_not_spread_over_an_axis(values):
    low, high = Axis("x").range(values)
    size = max(map(abs, values))
    assert low <= min(values) - 0.04 * size
    assert high >= max(values) + 0.04 * size
    assert low < high


def test_log_axis_puts_zero_at_its_edge():
    axis = Axis("x", log=True)
    assert axis.fraction(0.0, axis.range([0.0, 0.1, 1.0])) == 0.0


def levels(*xs: float, y: float = 1.0, interval: tuple[float, float] | None = (0.9, 1.1)) -> tuple[Mark, ...]:
    return tuple(Mark(x, y, "tc", y_interval=interval) for x in xs)


def placed(*marks: Mark, log: bool = False) -> list[float]:
    """Where they are drawn between 1 and 100, in shares of the axis."""
    panel = Panel("k", "t", Axis("x", log=log), Axis("y"), (*marks, *levels(1.0, 100.0, y=5.0, interval=(4.9, 5.1))))
    ends, _ = panel.ends()
    return [panel.x.fraction(mark.x, ends) for mark in panel.drawn()[: len(marks)]]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.floats(1, 100), max_size=8), st.booleans())
def test_marks_set_apart_stay_in_order_and_near(xs, log):
    panel = Panel("k", "t", Axis("x", log=log), Axis("y"), levels(*xs))
    ends, _ = panel.ends()
    true, drawn = ([panel.x.fraction(mark.x, ends) for mark in marks] for marks in (panel.marks, panel.drawn()))
    assert all(abs(a - b) <= APART * 1.001 for a, b in zip(true, drawn, strict=True))
    order = sorted(range(len(xs)), key=lambda i: (true[i], i))
    assert all(drawn[a] <= drawn[b] + 1e-9 for a, b in itertools.pairwise(order))


@pytest.mark.parametrize("log", [False, True])
def test_two_marks_in_one_place_are_drawn_beside_each_other(log):
    one, other = placed(*levels(32.0, 32.0), log=log)
    assert other - one == pytest.approx(APART)


def test_a_mark_that_hides_no_other_is_drawn_where_it_is():
    for marks in (
        (*levels(32.0), *levels(32.0, y=3.0, interval=(2.9, 3.1))),  # one above the other
        (*levels(32.0, interval=None), *levels(32.0)),  # no interval that is hidden
        levels(30.0, 50.0),
    ):
        panel = Panel("k", "t", Axis("x", log=True), Axis("y"), marks)
        assert panel.drawn() == marks


def test_marks_that_are_spread_hide_no_neighbour_either():
    one, two, three = placed(*levels(50.0, 50.0, 53.0))
    assert two - one > 0.8 * APART
    assert three - two > 0.8 * APART


def test_marks_at_the_end_of_an_axis_stay_on_it():
    axis = Axis("x", low=0.0, high=1.0)
    drawn = Panel("k", "t", axis, Axis("y"), levels(0.0, 0.0)).drawn()
    assert [mark.x for mark in drawn] == pytest.approx([0.0, APART])


@pytest.mark.parametrize("log", [False, True])
def test_an_interval_moves_with_its_mark(log):
    marks = tuple(Mark(x, 0.9, "tc", x_interval=(20.0, 180.0), y_interval=(0.8, 1.0)) for x in (100.0, 100.5))
    panel = Panel("k", "t", Axis("x", log=log), Axis("y"), (*marks, Mark(2.0, 0.9, "tc"), Mark(4000.0, 0.9, "tc")))
    ends, _ = panel.ends()
    for before, after in zip(marks, panel.drawn(), strict=False):
        values = ((before.x, after.x), *zip(before.x_interval, after.x_interval, strict=True))
        shifts = [panel.x.fraction(b, ends) - panel.x.fraction(a, ends) for a, b in values]
        assert shifts == pytest.approx([shifts[0]] * 3)
        assert abs(shifts[0]) > 0.01


def reach_of_first_label(panel: Panel) -> tuple[float, float]:
    """From where to where it goes as drawn, in shares of the axis."""
    with figures._figure(1, 3.3) as (figure, axes):
        figures.draw(axes[0], panel)
        figure.canvas.draw()
        box = axes[0].texts[0].get_window_extent()
        left, right = (axes[0].transAxes.inverted().transform((x, 0))[0] for x in (box.x0, box.x1))
    return left, right


@pytest.mark.parametrize(
    ("mark", "log"),
    [
        (Mark(40.0, 0.9, "tc", "topk, λ2 = 0.01, wide", "", (10.0, 90.0), (0.85, 0.95)), False),
        (Mark(70.0, 0.9, "tc", "crosscoder of 5 tokens, 160 a window", "", None, (0.85, 0.95)), True),
        (Mark(90.0, 0.9, "tc", "an interval down to zero", "", (0.0, 95.0), (0.85, 0.95)), True),
        (Mark(93.0, 0.9, "tc", "TFA", "", (88.0, 95.0), (0.85, 0.95)), False),
        (Mark(50.0, 0.9, "tc", "any earlier token of its row, λ2 = 0.03 and more", "", None, (0.85, 0.95)), False),
    ],
)
def test_a_label_beside_a_mark_lies_within_the_axes(mark, log):
    others = (Mark(1.0, 0.1, "twin"), Mark(95.0, 0.1, "twin"))
    left, right = reach_of_first_label(Panel("k", "t", Axis("x", log=log), Axis("y"), (mark, *others)))
    assert left > -0.02
    assert right < 1.02


def test_zero_on_a_log_axis_is_drawn_at_its_low_end_and_the_layout_holds():
    names = Axis("", categories=("TopK", "the activation itself, rounded"))
    marks = Mark(0.3, 0.0, "tc", "0.3", "", (0.0, 0.4)), Mark(0.0, 1.0, "reference", "0.0")
    for panel in (
        Panel("k", "t", Axis("KL (log scale)", log=True), names, marks),
        Panel("k", "t", Axis("KL (log scale)", log=True), Axis("y"), marks),
    ):
        low = panel.ends()[0][0]
        assert [mark.x for mark in panel.drawn()] == pytest.approx([0.3, low])
        assert panel.drawn()[0].x_interval == pytest.approx((low, 0.4))
        with figures._figure(1, 3.3) as (figure, axes):
            figures.draw(axes[0], panel)
            figure.canvas.draw()
            whole = axes[0].get_tightbbox()
        assert whole.x0 >= 0
        assert whole.y0 >= 0


def test_a_label_of_a_named_row_lies_within_the_axes():
    names = Axis("", categories=("crosscoder of 5 tokens, 32 a window", "TopK"))
    marks = Mark(165.0, 0.0, "tc", "165"), Mark(0.0, 1.0, "tc", "0")
    left, right = reach_of_first_label(Panel("k", "t", Axis("µs per token"), names, marks))
    assert left > 0.5
    assert right < 1.02


@pytest.mark.parametrize("clean", [0.5, 3.64, 8.0, 9.8, 10.4, 12.0, 13.0, 13.5])
@pytest.mark.parametrize("names", [("a", "b"), ("untrained, a fifth of the features", "identity, as bf16")])
def test_the_words_of_rules_are_whole_and_apart(clean, names):
    rules = Rule(f"clean model {clean}", x=clean), Rule("uniform guess, ln V = 10.80", x=10.8)
    marks = Mark(0.4, 0.0, "tc"), Mark(13.81, 1.0, "tc")
    panel = Panel("k", "t", Axis("CE"), Axis("", categories=names), marks, rules=rules)
    with figures._figure(1, 3.3) as (figure, axes):
        figures.draw(axes[0], panel)
        figure.canvas.draw()
        a, b = (words.get_window_extent() for words in axes[0].texts)
        whole = figure.bbox
    for box in a, b:
        assert 0 <= box.x0 < box.x1 <= whole.x1
        assert 0 <= box.y0 < box.y1 <= whole.y1
    assert a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0


@pytest.mark.parametrize(
    ("value", "label"), [(0.01, "0.01"), (1e-4, "10⁻⁴"), (3e-5, "3·10⁻⁵"), (1000.0, "1000"), (1e5, "10⁵"), (0.5, "0.5")]
)
def test_power_labels(value, label):
    assert power_label(value) == label


def test_numbers_are_never_minus_zero():
    assert number(-0.0004, 2) == "0.00"
    assert number(-1234.5, 1) == "−1,234.5"


def test_every_section_draws_its_layers(report):
    found = sections(report)
    keys = [panel.key for group in found.values() for panel in group]
    assert len(keys) == len(set(keys))
    for layer in (5, 12):
        assert {
            f"plane-{layer}",
            f"kl-{layer}",
            f"lag-autocorrelation-{layer}",
            f"density-{layer}",
            f"loss-{layer}",
        } <= set(keys)
    assert all(panel.layer in (5, 12) for group in found.values() for panel in group)


def test_plane_shows_references_with_an_l0_as_points_and_the_rest_as_levels(report):
    panel = plane(report, 5)
    assert panel is not None
    assert {mark.label for mark in panel.marks} == {"TC-SAE", "twin", "untrained SAE", "all-zero SAE"}
    assert {rule.label for rule in panel.rules} == {
        "identity (bf16)",
        "zero, every position",
        "zero",
        "mean",
        "previous token",
    }
    a, b = panel.links[0]
    assert {panel.marks[a].role, panel.marks[b].role} == {"tc", "twin"}


def test_time_panels_leave_out_zero_where_all_would_crowd_at_the_other_end(report):
    def low(change: float) -> float:
        near = with_records(report, lambda r: {"metrics": r.metrics | close(r, change)})
        return min(
            panel.x.range([mark.x for mark in panel.marks])[0]
            for panel in (*time_plane(near, 5), variation_rows(near, 5))
        )

    def close(record, change: float):
        value = 1.0 if record.role == "tc" else 1.0 + change
        return (
            {key: metric(key, value) for key in ("temporal_variation", "temporal_variation_refit")}
            if record.role
            else {}
        )

    assert low(0.02) > 0.9
    assert low(0.5) == 0


def test_dashes_of_the_published_tableare_explained_under_their_table(report):
    page = render_page(report)
    part = page[page.index('<section id="published">') :]
    assert part.index("does not apply to this row") < part.index("</section>")


def with_records(report: EvaluationReport, change) -> EvaluationReport:
    return report.model_copy(update={"records": [r.model_copy(update=change(r)) for r in report.records]})


def test_nulls_are_not_drawn(report):
    null = metric("ce_score_mean", None)
    assert plane_zoomed(with_records(report, lambda r: {"metrics": r.metrics | {"ce_score_mean": null}}), 5) == []
    points = {"x": [1, 2, 3, None], "y": [0.5, None, 0.2, 0.1], "low": [0, None, 0, 0], "high": [1, None, 1, 1]}
    holes = Curve(**points, x_label="x", y_label="y", definition="d")
    found = sections(with_records(report, lambda r: {"curves": {"lag_autocorrelation": holes}}))["time"]
    panel = next(panel for panel in found if panel.key.startswith("lag"))
    assert panel.lines[0].x == (1, 3)
    assert panel.lines[0].low == ()


def test_shares_of_the_loss_add_up(report):
    panels = {panel.key: panel for panel in sections(report)["training"]}
    shares = panels["shares-l5-topk64-pairwise0.1-w5-s0"]
    assert {line.role for line in shares.lines} == {"reconstruction", "temporal", "auxiliary"}
    for values in zip(*(line.y for line in shares.lines), strict=True):
        assert sum(values) == pytest.approx(100)


def test_long_training_is_thinned():
    curves = TrainingCurves(
        steps=list(range(5000)), series={"total": [1.0] * 5000, "temporal": [0.1] * 5000, "mse": [0.9] * 5000}
    )
    base = synthetic_report(layers=(5,), features=0)
    report = base.model_copy(update={"training": {base.records[0].name: curves}})
    panels = sections(report)["training"]
    assert [panel.key.split("-")[0] for panel in panels] == ["loss", "shares"]
    assert all(100 <= len(line.x) <= 160 for panel in panels for line in panel.lines)


def test_svg_escapes_and_describes():
    mark = Mark(1.0, 2.0, "tc", "<b>&", 'say "<script>"', y_interval=(1.0, 3.0))
    panel = Panel(
        "k",
        "a < b",
        Axis("x & y"),
        Axis("<y>"),
        (mark,),
        lines=(Line((0, 1), (0, 1), "twin", "<i>"),),
        rules=(Rule("<r>", y=1),),
    )
    out = render(panel)
    assert isinstance(out, Markup)
    for raw in ("<b>", "<script>", "<i>", "<y>", "<r>", "a < b"):
        assert raw not in out
    assert "say &#34;&lt;script&gt;&#34;" in out
    assert 'role="img"' in out
    assert "<desc" in out


def test_coinciding_points_are_both_seen():
    marks = tuple(
        Mark(64.0, y, role, role, y_interval=(y - 0.1, y + 0.1)) for y, role in ((0.97, "tc"), (0.971, "twin"))
    )
    out = render(Panel("k", "t", Axis("x"), Axis("y"), marks))
    centre = float(out.split('cx="')[1].split('"')[0])
    square = float(out.split("<rect")[1].split('x="')[1].split('"')[0]) + 3.7
    assert 7.4 < abs(centre - square) < 10  # a marker is 7.4 wide


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, None, None), (-2.0, -3.0, -1.0), (0.5, -0.5, 1.5)])
def test_glyph_puts_the_difference_on_its_side_of_zero(value, low, high):
    reach = max(abs(v) for v in (value, low or 0, high or 0))
    out = interval_glyph(value, low, high, reach, "tc")
    x = float(out.split('cx="')[1].split('"')[0])
    assert math.copysign(1, x - 60) == math.copysign(1, value) or value == 0
    assert ("whisker" in out) == (low is not None)


def test_figures_are_written_twice_the_same(report, tmp_path):
    panels = [p for p in sections(report)["fidelity"] if p.layer == 5 and p.key.startswith(("plane-5", "kl"))]
    panels += sections(report)["features"][:1] + sections(report)["training"][:1]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.png").write_bytes(b"")
    one, two = write_figures(panels, tmp_path / "a"), write_figures(panels, tmp_path / "b")
    assert len(one) == 2 * len(panels)
    assert not (tmp_path / "a" / "old.png").exists()
    for a, b in zip(one, two, strict=True):
        assert a.read_bytes() == b.read_bytes()
        assert a.stat().st_size > 1000
        assert a.suffix == ".svg" or a.read_bytes().startswith(PNG)
    svg = one[1].read_text()
    assert "previous token" in svg  # text stays text
    assert "<dc:date>" not in svg


def test_a_figure_is_drawn_once(report, tmp_path, monkeypatch):
    drawn: list[str] = []
    real = figures.draw
    monkeypatch.setattr(figures, "draw", lambda ax, panel: (drawn.append(panel.key), real(ax, panel))[1])
    panels = [panel for group in sections(report).values() for panel in group][:3]
    keys = [panel.key for panel in panels]
    first = {path: path.read_bytes() for path in write_figures(panels, tmp_path)}
    assert drawn == keys
    assert {path: path.read_bytes() for path in write_figures(panels, tmp_path)} == first
    assert drawn == keys
    for change, again in (
        (lambda: (tmp_path / f"{keys[0]}.png").write_bytes(b"damaged"), keys[:1]),
        (lambda: (tmp_path / f"{keys[1]}.svg").unlink(), keys[1:2]),
        (lambda: (tmp_path / figures.DRAWN).write_text("{"), keys),
        (lambda: monkeypatch.setattr(figures, "version", lambda package: "0"), keys),
    ):
        drawn.clear()
        change()
        write_figures(panels, tmp_path)
        assert drawn == again
        assert {path: path.read_bytes() for path in first} == first
    drawn.clear()
    changed = dataclasses.replace(panels[0], title="another title")
    write_figures([changed, *panels[1:]], tmp_path)
    assert drawn == keys[:1]
