"""The wheel holds all of the package, and installed elsewhere it does the whole job from its console script."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import house
import pytest

BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "py.typed")


def run(*command, cwd, **environment):
    """What a command prints; the tests' own import path is not passed on."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, in a folder named as a ZIP download's copy may be; without a network."""
    source = tmp_path_factory.mktemp("wheel") / "tcsae-main copy"
    source.mkdir()
    for name in (*BUILT_FROM, *(path.name for path in house.ROOT.glob("*.py"))):
        shutil.copy(house.ROOT / name, source)
    for name in house.FOLDERS:
        shutil.copytree(house.ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.zarr"))
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    run(*pip, "--wheel-dir", source.parent, ".", cwd=source)
    (built,) = source.parent.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel):
    """The bin folder of a fresh environment with the wheel in it; all it depends on is borrowed from this one."""
    environment = wheel.parent / "an environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin/python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", ask, cwd=wheel.parent).strip())
    # A line of a .pth adds a folder and does not read that folder's own .pth files: no editable install comes along.
    (site / "borrowed.pth").write_text("\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")}) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=wheel.parent)
    assert run(python, "-c", "import tcsae; print(tcsae.__file__)", cwd=wheel.parent).startswith(str(site))
    return environment / "bin"


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    python = set(house.sources())
    other = {house.ROOT / "py.typed"}
    for folder in ("evaluate/features/templates", "evaluate/report/templates", "study/templates"):
        other |= set((house.ROOT / folder).iterdir())
    expected = {f"tcsae/{path.relative_to(house.ROOT).as_posix()}" for path in python | other}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_it_does_the_whole_job_outside_the_checkout(installed, tiny_llama, corpus, tmp_path):
    place = tmp_path / "somewhere else"
    place.mkdir()

    def pipeline(*arguments):
        alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        out = run(installed / "pipeline", "--quiet", *arguments, "--json", cwd=place, **alone)
        return json.loads(out.splitlines()[-1])

    cpu = ("--device", "cpu", "--dtype", "float32")
    text = ("--model", tiny_llama, "--dataset", corpus, "--context", "16", "--held-out", "0.5")
    assert pipeline("extract", "--layers", "1", "--tokens", "1k", "--batch-size", "4", *text, *cpu)["rows"] == 63
    small = ("--steps", "4", "--batch-size", "60", "--width", "32", "--k", "4")
    trained = pipeline("train", "--store", "cache/l1.zarr", *small, *cpu)
    assert [Path(run).name for run in trained["runs"]] == ["l1-topk4-pairwise0.03-w5-s0", "l1-topk4-none-s0"]
    (report,) = pipeline("evaluate", "--batches", "2", "--batch-size", "4", "--quick", *cpu)["reports"]
    assert not report["failures"]
    assert {"l1-topk4-none-s0", "zero", "untrained"} <= {record["name"] for record in report["records"]}
    assert "<style>" in (place / report["page"]).read_text()
