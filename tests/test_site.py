"""The documentation's site: it builds without a network, every link and anchor leads somewhere, nothing is loaded from
elsewhere, every public name is in it; the notebook runs.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tcsae
import yaml
from stores import make_store
from tcsae.train.config import TrainConfig
from tcsae.train.presets import changed
from tcsae.train.run import train
from tiny import tiny_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="pip install 'tcsae[docs]'")
    pytest.importorskip("mkdocstrings", reason="pip install 'tcsae[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return out


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        tags = re.findall(r"<(?:script|img|iframe|source|link)\b[^>]*>", page.read_text())
        elsewhere = [tag for tag in tags if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag)]
        assert not elsewhere, f"{page.name}: {elsewhere[0]}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", sheet.read_text()), sheet


def test_the_api_has_every_public_name(site):
    page = (site / "API.html").read_text()
    missing = [name for name in tcsae.__all__ if name != "__version__" and f"{name}" not in re.findall(r"\w+", page)]
    assert not missing
    documented = re.findall(r"^::: tcsae\.[\w.]*\.(\w+)$", (ROOT / "docs/API.md").read_text(), flags=re.MULTILINE)
    assert set(tcsae.__all__) - {"__version__"} <= set(documented)


def test_every_page_of_how_to_is_in_the_navigation(site):
    page = (site / "index.html").read_text()
    for path in (ROOT / "docs/how-to").glob("*.md"):
        assert f'href="how-to/{path.stem}.html"' in page


def test_the_navigation_names_files_that_exist():
    text = (ROOT / "mkdocs.yml").read_text()
    for name in re.findall(r": ([\w/-]+\.md)", text.partition("nav:")[2]):
        assert any((ROOT / folder / name).exists() for folder in ("docs", ".")) or name == "notebook.md", name
    assert yaml.safe_load(text)["theme"]["font"] is False


def test_the_table_of_costs_is_what_its_code_prints():
    page = (ROOT / "docs/learn/choose.md").read_text()
    block = r"^```{}\n(.*?)^```"
    (code,), (table,) = (
        re.findall(block.format(language), page, flags=re.MULTILINE | re.DOTALL) for language in ("python", "text")
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == table


def test_the_notebook_runs(tmp_path, monkeypatch):
    """On a tiny model: the first cell of code holds all that depends on the model."""
    cells = json.loads((ROOT / "docs/notebook.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama", tmp_path / "model", n_layers=4, d_model=24)
    store = make_store(tmp_path / "store", layer=3, d_model=24)
    small = {"data.store": str(store), "sae.k": 4, "sae.width": 64, "run.steps": 5, "data.batch_size": 60}
    config = changed(TrainConfig(), small | {"run.name": "tc", "temporal.weight": 0.1})
    run, twin = train(config).runs
    monkeypatch.setenv("MPLBACKEND", "agg")
    scope: dict[str, object] = {}
    settings = {"STORE": str(store), "RUN": str(run), "TWIN": str(twin), "MODEL": str(model)}
    exec(sources[0], scope)
    assert set(settings) <= set(scope)
    scope |= settings
    for source in sources[1:]:
        exec(compile(source, "notebook.ipynb", "exec"), scope)
    assert 0 < scope["l0"]["TC-SAE"] <= 4


def test_the_notebook_was_executed_in_order_and_without_error():
    cells = [
        cell for cell in json.loads((ROOT / "docs/notebook.ipynb").read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds
    assert kinds.count("display_data") >= 2
