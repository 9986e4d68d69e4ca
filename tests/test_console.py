"""Numbers written for people, and the closing summary."""

import json

import pytest
from tcsae import console
from tcsae.console import format_bytes, format_count, format_duration, note, parse_count, progress, speaking, summary
from tcsae.errors import UsageError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("200k", 200_000),
        ("10M", 10_000_000),
        ("1B", 10**9),
        ("1.5B", 1_500_000_000),
        ("4_096", 4096),
        (" 7 ", 7),
        (12, 12),
    ],
)
def test_counts_as_people_write_them(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "ten", "-5", "1e6", "10 MB", "1.2.3k"])
def test_a_count_that_is_none_is_named(text):
    with pytest.raises(UsageError, match="is not a count: write a number such as"):
        parse_count(text)


def test_numbers_read_well():
    assert format_count(1_234_567) == "1.23M"
    assert format_count(12) == "12"
    assert format_bytes(138_000_000_000) == "138 GB"
    assert format_bytes(12) == "12 B"
    assert format_duration(3.21) == "3.2 s"
    assert format_duration(65) == "1 min 05 s"
    assert format_duration(3725) == "1 h 02 min"


def test_the_summary_is_one_line_of_json_or_aligned_text(capsys):
    summary("done", {"rows": 3, "bytes_per_row": 12}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"rows": 3, "bytes_per_row": 12}
    summary("done", {"rows": 3, "bytes_per_row": 12}, as_json=False)
    assert capsys.readouterr().out == "done\n  rows           3\n  bytes per row  12\n"


def test_nothing_is_said_unless_asked(capsys):
    note("a")
    with progress("b", 1) as bar:
        bar.advance(1)
    with speaking(True):
        note("c")
        with speaking(False):
            note("d")
        note("e")
    note("f")
    assert capsys.readouterr().err == "c\ne\n"


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with speaking(True), progress("working", 400, unit="rows", done=100) as bar:
        for seconds in (4, 6, 1, 1):
            now[0] += seconds
            bar.advance(75, "well")
    first, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("working 62%, 15 rows/s, well", "working 100%, 25 rows/s, well")


def test_a_pipe_hears_something_every_half_minute_and_nothing_of_what_is_short(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with speaking(True, seldom=True):
        with progress("short", 1) as bar:
            now[0] += 20
            bar.advance(1)
        assert capsys.readouterr().err == ""
        with progress("long", 100, unit="rows") as bar:
            for _ in range(10):
                now[0] += 10
                bar.advance(10)
    said = capsys.readouterr().err.splitlines()
    assert said == ["long 30%, 1 rows/s", "long 60%, 1 rows/s", "long 90%, 1 rows/s", "long 100%, 1 rows/s"]


def test_names_are_shown_as_they_are(capsys):
    summary("trained", {"my_run": 1, "in_all": 2}, as_json=False, names=["my_run"])
    assert capsys.readouterr().out == "trained\n  my_run  1\n  in all  2\n"
