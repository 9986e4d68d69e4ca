"""What a terminal shows while something runs: a bar, a table beneath it that fits, and nothing left over at the end."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from rich.console import Console
from stores import make_store
from tcsae import console
from tcsae.progress_bar import Bar, Table, fitted
from tcsae.train.loop.trainer import live_table


def table_of(n, name="run"):
    return Table(["loss", "explained\nvariance"], [(f"{name}{i}", [f"{i}.5", "0.9"]) for i in range(n)], foot="step 7")


def drawn(renderable, width=80, height=20):
    screen = Console(width=width, height=height, file=io.StringIO(), record=True, force_terminal=True)
    screen.print(renderable)
    return [line.rstrip() for line in screen.export_text().rstrip().split("\n")]


@pytest.mark.parametrize(
    ("rows", "height", "shown", "more"), [(3, 20, 3, None), (40, 20, 14, 26), (15, 20, 15, None), (5, 3, 1, 4)]
)
def test_the_first_rows_that_fit_are_shown_and_the_rest_are_counted(rows, height, shown, more):
    lines = drawn(fitted(table_of(rows), 80, height))
    assert [line.split()[0] for line in lines if line.startswith("run")] == [f"run{i}" for i in range(shown)]
    assert lines[-1] == "step 7"
    assert [line for line in lines if "more" in line] == ([f"… and {more} more"] if more else [])
    assert len(lines) < max(height, 7)  # with the bar's line no more than the terminal has


def test_names_too_long_for_the_terminal_keep_the_end_that_tells_them_apart():
    lines = drawn(fitted(table_of(2, name="l12-topk64-pairwise0.03-other_document-w5-s"), 40, 20), width=40)
    assert all(len(line) <= 40 for line in lines)
    assert lines[2].startswith("…")
    assert [line.split()[0][-3:] for line in lines[2:4]] == ["-s0", "-s1"]
    assert [line.split()[1:] for line in lines[2:4]] == [["0.5", "0.9"], ["1.5", "0.9"]]


def test_the_board_has_a_row_per_member_and_a_dash_for_what_is_undefined():
    members = {
        "tc": {
            "loss": 12.3456,
            "explained_variance": 0.87654,
            "l0": 63.9,
            "dead_share": 0.0123,
            "temporal_share": 0.15,
        },
        "twin": {"loss": 10.0, "explained_variance": None},
    }
    shown = live_table(members, {"tokens_per_second": 12_345.0, "seconds_waiting": 0.25}, 50)
    assert shown.rows[0] == ("tc", ["12.35", "0.877", "63.9", "1.2%", "15.0%", "—"])
    assert shown.rows[1] == ("twin", ["10", "—", "—", "—", "—", "—"])
    assert shown.foot == "step 50, 12.3k tokens/s, 0.2 s waiting for the disk"
    assert live_table({}, {}, 3).foot == "step 3"
    lines = drawn(fitted(shown, 100, 20))
    for head in ("loss", "explained", "variance", "L0", "dead", "temporal", "variation"):
        assert any(head in line.split() for line in lines[:2])


def test_a_table_replaces_the_one_before_and_the_last_one_stays():
    screen = Console(width=80, height=20, file=io.StringIO(), force_terminal=True, color_system=None)
    with Bar("training", 100, 20, lambda speed: f"{speed} t/s", console=screen) as bar:
        bar.advance(40, "well")
        bar.show(table_of(2, name="before"))
        bar.advance(40)
        bar.show(table_of(2, name="after"))
    last = screen.file.getvalue().rsplit("\x1b[2K", 1)[-1]  # what was written since a line was last wiped
    assert "100%" in last
    assert "after1" in last
    assert "before" not in last
    assert last.endswith("\x1b[?25h")  # the cursor is shown again


def test_without_a_terminal_nothing_is_drawn(capsys):
    with console.progress("training", 100) as bar:
        bar.advance(50)
        bar.show(table_of(3))
    assert capsys.readouterr() == ("", "")


def on_a_terminal(command, *, rows, columns):
    """Status and output of a command whose standard error is a real terminal of this size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment = inherited | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    while part := _read(ours):
        seen += part
    os.close(ours)
    return process.wait(), seen.decode()


def _read(handle):
    try:
        return os.read(handle, 65536)
    except OSError:  # Linux says so when the other side is closed
        return b""


def test_training_on_a_real_terminal_shows_the_table_and_ends_clean(tmp_path):
    store = make_store(tmp_path, rows=64, context=16, d_model=8)
    small = [
        "--steps",
        "4",
        "--batch-size",
        "60",
        "--k",
        "4",
        "--width",
        "16",
        "--log-every",
        "2",
        "--sweep",
        "seed=0,1,2,3",
    ]
    command = [
        sys.executable,
        "-m",
        "tcsae.pipeline",
        "train",
        "--store",
        str(store),
        "--out",
        str(tmp_path / "runs"),
        *small,
    ]
    status, seen = on_a_terminal(command, rows=10, columns=70)
    assert status == 0, seen
    assert "Traceback" not in seen
    shown, after = seen.rsplit("\x1b[?25h", 1)
    last = [line for line in shown.rsplit("\x1b[2K", 1)[-1].replace("\r", "").split("\n") if line]
    assert "100%" in last[0]
    assert "explained" in last[1]
    assert "temporal" in last[1]
    assert [line.count("s0") for line in last[3:5]] == [1, 1]
    assert "… and 4 more" in last[-2]
    assert "step 4" in last[-1]
    assert "waiting for the disk" in last[-1]
    assert len(last) < 10
    assert " ".join(after.split()).startswith("the default term is there to be compared with its twin")
    assert "step 4" not in after
