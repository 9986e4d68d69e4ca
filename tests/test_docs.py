"""The documents' examples: the real parser understands every command line, every Python block runs on a store and a
run.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from stores import make_store
from tcsae import pipeline
from tcsae.extract.assets import MODELS, demo_text_folder
from tcsae.train.config import TrainConfig
from tcsae.train.presets import changed
from tcsae.train.run import train
from tiny import tiny_model

ROOT = Path(__file__).parents[1]
SITE = ["docs/index.md", *(f"docs/{path.relative_to(ROOT / 'docs')}" for path in sorted(ROOT.glob("docs/*/*.md")))]
PAGES = ["README.md", "docs/GUIDE.md", "docs/SEQUENCES.md", *SITE]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def command_lines():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():  # a command on several lines is one
                words = shlex.split(line, comments=True)
                if words and Path(words[0]).name == "pipeline":
                    yield words[1:]


def test_there_are_examples():
    assert len(list(command_lines())) > 20


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_the_parser_understands_every_example(words):
    command = typer.main.get_command(pipeline.app).commands[words[0]]
    command.make_context(words[0], list(words[1:]))


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_run(page, tmp_path, monkeypatch, corpus):
    if not (examples := blocks(page, "python")):
        return
    (tmp_path / "cache").mkdir()
    built = make_store(tmp_path / "built", layer=12)
    Path(built).rename(tmp_path / "cache/l12.zarr")
    monkeypatch.chdir(tmp_path)
    # Tiny ones lie where the demo's model and text are kept: no part of the code can find the real ones.
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path / "assets"))
    tiny_model("llama", MODELS["demo"].folder, n_layers=12)
    shutil.copytree(corpus, demo_text_folder())
    monkeypatch.setattr("tcsae.evaluate.report.page.write_figures", lambda *_: [])
    small = {"data.store": "cache/l12.zarr", "sae.k": 2, "run.steps": 2, "data.batch_size": 40}
    for name in ("l12-topk64-pairwise0.03-w5-s0", "l12-topk64-none-s0"):
        train(changed(TrainConfig(), small | {"run.name": name, "run.baseline": False}))
    scope: dict[str, object] = {}
    for block in examples:
        exec(compile(block, page, "exec"), scope)


def test_links_lead_somewhere():
    for page in [*PAGES, "docs/METHOD.md", "docs/FORMAT.md", "CONTRIBUTING.md"]:
        here = (ROOT / page).parent
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            assert (here / target).exists(), f"{page} links to {target}"
