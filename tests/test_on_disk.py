"""ls and rm: everything of ours is found and told, and nothing goes that something else needs."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import pytest
from stores import make_store
from synthetic import synthetic_report
from tcsae.evaluate.results import write_results
from tcsae.on_disk import entries, removable, remove
from tcsae.pipeline import main
from tcsae.train import passes, run
from tcsae.train.presets import build_config
from tcsae.train.run_folder.member_folders import lock_folder

SMALL = {
    "data.batch_size": 60, "sae.k": 4, "sae.width": 16, "run.steps": 4, "run.device": "cpu", "run.dtype": "float32",
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A store, a TC-SAE with its twin, a run that was stopped, and a report."""
    make_store(tmp_path / "cache", rows=64)
    about = SMALL | {"data.store": str(tmp_path / "cache" / "l3.zarr"), "run.out": str(tmp_path / "runs")}
    run.train(build_config(None, None, about | {"temporal.weight": 0.1}))
    with monkeypatch.context() as patch:
        patch.setattr(passes, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        stopped = about | {"run.name": "stopped", "run.baseline": False, "run.checkpoint_every": 2}
        with pytest.raises(KeyboardInterrupt):
            run.train(build_config(None, None, stopped))
    (tmp_path / "reports" / "r").mkdir(parents=True)
    write_results(synthetic_report(layers=(5,), features=2), tmp_path / "reports" / "r")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_everything_is_listed_with_what_is_left_to_do(place, capsys):
    assert main(["ls", "--json"]) == 0
    found = {entry["path"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert {entry["kind"] for entry in found.values()} == {"store", "run", "report"}
    assert len(found) == 5
    assert found["cache/l3.zarr"]["bytes"] == sum(
        file.stat().st_size for file in (place / "cache" / "l3.zarr").rglob("*") if file.is_file()
    )
    unfinished = [path for path, entry in found.items() if not entry["finished"]]
    assert unfinished == ["runs/stopped"]
    assert "2 of 4 steps: the same `pipeline train` goes on" in found["runs/stopped"]["state"]
    assert main(["ls", "--unfinished", "--kind", "run"]) == 0
    shown = capsys.readouterr().out
    assert "runs/stopped" in shown
    assert "l3.zarr" not in shown
    rows = place / "reports" / "stopped" / "rows" / "0123"
    rows.mkdir(parents=True)
    (rows / "l3-mean.npz").write_bytes(b"")
    (begun,) = [entry for entry in entries(["reports"]) if not entry.finished]
    assert (begun.kind, begun.state) == ("report", "1 row is kept: the same `pipeline evaluate` goes on")
    assert max(map(len, shown.splitlines())) < 100


def test_what_is_damaged_is_listed_too(place, capsys):
    (place / "runs" / "stopped" / "train.json").write_text("{")
    (entry,) = [each for each in entries([place]) if each.damaged]
    assert "cannot be read" in entry.state
    assert main(["rm", "runs/stopped", "--yes"]) == 0
    assert not (place / "runs" / "stopped").exists()


def test_what_something_needs_is_refused_and_nothing_is_gone(place, capsys):
    before = set(place.rglob("*"))
    assert main(["rm", "cache/l3.zarr", "--yes"]) == 2
    assert "l3.zarr is not removed: the run runs/stopped needs it" in capsys.readouterr().err
    (twin,) = [path for path in (place / "runs").iterdir() if "none" in path.name]
    assert main(["rm", f"runs/{twin.name}", "--yes"]) == 2
    assert "needs it; remove that one, too, or say --force" in capsys.readouterr().err
    assert set(place.rglob("*")) == before
    both = [str(path.relative_to(place)) for path in (place / "runs").iterdir()]
    assert main(["rm", *both, "cache/l3.zarr", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 4
    assert [entry.kind for entry in entries([place])] == ["report"]
    assert list((place / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["rm", "cache", "--yes"], "cache is no store, run or report of ours"),
        (["rm", "nowhere", "--yes"], "nowhere is no store, run or report of ours"),
        (["rm", "reports/r"], "nothing was removed, since nobody can be asked: say --yes"),
        (["ls", "nowhere"], "nowhere is no folder"),
        (["ls", "--kind", "x"], "--kind x is unknown: choose one of store, run, report"),
    ],
)
def test_bad_input_is_one_sentence(place, args, sentence, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    before = set(place.rglob("*"))
    assert main(args) == 2
    assert sentence in capsys.readouterr().err
    assert set(place.rglob("*")) == before


def test_a_link_is_not_followed(place):
    (place / "link.zarr").symlink_to(place / "cache" / "l3.zarr")
    assert main(["rm", "link.zarr", "--yes"]) == 2
    assert (place / "cache" / "l3.zarr" / "zarr.json").exists()


def test_a_run_in_training_is_not_removed(place, capsys):
    other = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, os, sys; fcntl.flock(os.open('runs/stopped', 0), 2); print(1, flush=True)"
         "; sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == b"1\n"
        assert main(["rm", "runs/stopped", "--yes"]) == 1
        assert "another process trains runs/stopped" in capsys.readouterr().err
        assert (place / "runs" / "stopped" / "train.json").exists()
    finally:
        other.communicate()
    with lock_folder(place / "runs" / "stopped"):
        pass


def test_half_a_removal_is_no_store_and_can_be_ended(place, monkeypatch):
    (entry,) = removable(["reports/r"], ["."])
    monkeypatch.setattr(shutil, "rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove(entry)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    (left,) = [each for each in entries(["."]) if each.kind == "removed"]
    assert not (place / "reports" / "r").exists()
    assert main(["rm", str(left.path), "--yes"]) == 0
    assert list((place / "reports").iterdir()) == []
