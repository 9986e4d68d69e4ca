"""What a report says first, on reports whose truth is known."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from synthetic import metric, paired, synthetic_report
from tcsae.evaluate.report.page import render_page
from tcsae.evaluate.report.terminal import print_outcomes
from tcsae.evaluate.report.verdict import first_sentences, judge, verdicts
from tcsae.evaluate.results import Definition
from tcsae.evaluate.run import Outcome

TC, TWIN = "l5-topk64-pairwise0.1-w5-s0", "l5-topk64-none-s0"
NOTHING = {
    "ce_score_mean": (-0.0002, 0.001), "kl_score_mean": (0.0001, 0.001), "explained_variance": (-0.0004, 0.001),
    "same_token": (0.002, 0.01), "eta_squared": (0.0001, 0.001), "prefix_shift": (-0.001, 0.004), "l0": (0.0, 0.0),
    "temporal_variation": (-0.3, 0.01),
}  # fmt: skip


def report_of(changes, resampling="200 documents", **more):
    values = NOTHING | changes
    pair = paired(TC, TWIN, 5).model_copy(update={"metrics": {k: metric(k, v, s) for k, (v, s) in values.items()}})
    return synthetic_report(layers=(5,), features=0, paired=[pair], resampling=resampling, **more)


@pytest.mark.parametrize(
    ("changes", "resampling", "word", "said"),
    [
        ({}, "200 documents", "undecided", "Of 6 outcomes outside the loss, none is decided. No cost is decided"),
        ({"same_token": (0.2, 0.01)}, "200 documents", "helps", "helps: better in same token"),
        ({"explained_variance": (-0.02, 0.001)}, "200 documents", "harms", "harms: worse in EV (−0.0200"),
        ({"same_token": (-0.07, 0.01)}, "200 documents", "harms", "worse in same token"),
        (
            {"same_token": (0.2, 0.01), "prefix_shift": (-0.05, 0.004)},
            "200 documents", "mixed", "Better in same token (+0.200",
        ),
        ({"ce_score_mean": (0.05, 0.001)}, "200 documents", "undecided", "better in CE rec. (+0.0500"),
        ({"same_token": (0.2, 0.01)}, "4 documents", "undecided", "too little text to say"),
        (
            {"same_token": (0.2, 0.01)},
            "nothing (too little text for intervals: 1 block)", "undecided", "too little text to say",
        ),
    ],
)  # fmt: skip
def test_the_verdict_is_the_known_truth(changes, resampling, word, said, capsys):
    report = report_of(changes, resampling)
    (found,) = verdicts(report)
    assert found.word == word
    assert said in found.sentence
    assert "variation" not in found.sentence  # it is in the loss
    page = render_page(report)
    assert page.index(f'<td class="word {word}">{word}</td>') < page.index("<main>")
    print_outcomes([Outcome(report, Path(report.name), None)], as_json=False)
    assert " ".join(capsys.readouterr().out.split()).startswith(found.sentence[:60])


def test_the_closing_table_fits_80_columns_and_has_the_difference_and_ln_v(monkeypatch, capsys):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", "80")
    report = report_of({"kl": (0.0123, 0.001)})
    print_outcomes([Outcome(report, Path(report.name), None)], as_json=False)
    plain = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    table = plain[plain.index("layer 5") : plain.index("uniform guess")].splitlines()
    assert max(map(len, table)) <= 80
    (row,) = (line for line in table if "− its twin" in line)
    assert "+0.0123" in row
    assert "−0.0002" in row
    assert "…" not in "".join(table)
    assert f"CE = ln V = {math.log(report.model.vocab_size):.2f}" in " ".join(plain.split())


def test_what_speaks_against_it_stands_beside_what_speaks_for_it():
    (found,) = verdicts(report_of({"same_token": (0.2, 0.01), "explained_variance": (-0.02, 0.001)}))
    lines = {line.aspect: line for line in found.lines}
    assert {name: line.word for name, line in lines.items()} == {
        "cost": "bad", "benefit": "good", "position": "undecided", "controls": "not measured",
    }  # fmt: skip
    assert "Better in same token" in found.sentence
    assert "Worse in EV" in found.sentence


def test_many_outcomes_need_a_clearer_one():
    """An interval that just excludes zero decides among one outcome, not among six."""
    barely = {"same_token": (0.022, 0.02)}
    report = report_of(barely)
    alone = judge({"same_token": report.paired[0].metrics["same_token"]}, report)
    assert [one.word for one in alone] == ["better"]
    assert {one.word for one in judge(report.paired[0].metrics, report)} == {"undecided"}


@pytest.mark.parametrize(("theirs", "word"), [(0.05, "good"), (0.25, "bad")])
def test_a_control_that_shows_as_much_is_named(theirs, word):
    report = report_of({"same_token": (0.2, 0.01)})
    (pair,) = report.paired
    own = report.record(TC, 5)
    settings = own.sae.settings | {"temporal.partner": "next", "temporal.weight": 0.1}
    own = own.model_copy(update={"sae": own.sae.model_copy(update={"settings": settings})})
    other = own.model_copy(
        update={
            "name": "control",
            "sae": own.sae.model_copy(update={"settings": settings | {"temporal.partner": "shuffled"}}),
        }
    )
    beside = pair.model_copy(
        update={"first": "control", "metrics": pair.metrics | {"same_token": metric("same_token", theirs, 0.01)}}
    )
    records = [own if record.name == TC else record for record in report.records]
    report = report.model_copy(update={"records": [*records, other], "paired": [pair, beside]})
    controls = verdicts(report)[0].lines[-1]
    assert (controls.aspect, controls.word) == ("controls", word)
    assert "shuffled" in controls.because or "control shows as much" in controls.because


def test_many_pairs_are_counted_first_and_told_each():
    report = report_of({"same_token": (-0.07, 0.01)})
    many = [report.paired[0].model_copy(update={"first": f"a{i}"}) for i in range(9)]
    report = report.model_copy(update={"paired": many})
    (sentence,) = first_sentences(verdicts(report))
    assert sentence == "Of 9 comparisons of the temporal term with its twin, it harms in 9; each is told below."
    assert render_page(report).count('<td class="word harms">') == 9


def test_a_metric_of_a_plug_in_with_a_good_direction_has_a_say():
    report = report_of({"my_metric": (0.2, 0.01)})
    own = {"my_metric": Definition(text="mine", unit="1", better="higher", label="my metric")}
    assert verdicts(report)[0].word == "undecided"
    report = report.model_copy(update={"definitions": report.definitions | own, "plugins": {"mine.py": "0" * 64}})
    (found,) = verdicts(report)
    assert found.word == "helps"
    assert "better in my metric" in found.sentence
