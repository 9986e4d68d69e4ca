"""Imports run downwards only, and the stages keep to their business."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVEL = {"errors": 0, "bars": 0, "allocator": 0, "console": 1, "cache": 2, "train": 3, "extract": 3, "evaluate": 4, "demo": 5}
LEVEL["pipeline"] = 6
# Commands may reach upwards when they run, never when they are imported: `verify --model` needs a language model.
SOURCES = [path for part in LEVEL for path in [ROOT / f"{part}.py", *(ROOT / part).glob("**/*.py")] if path.is_file()]


def imports(path: Path, *, top_level_only: bool):
    """(package of ours or external module, line) for every import of a file."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    here = path.relative_to(ROOT).parts
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if node.level == 0 or (node.level == len(here) and module != [""]):
                yield module[0], node.lineno
            elif node.level == len(here):
                yield from ((alias.name, node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    upward = [
        (name, line)
        for name, line in imports(path, top_level_only=path.name == "command.py")
        if name in LEVEL and name != own and LEVEL[name] >= LEVEL[own]
    ]
    assert not upward, f"{path.name} imports upwards or sideways: {upward}"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.parent.name in ("cache", "train")], ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_cache_and_train_know_no_language_models(path):
    foreign = [(name, line) for name, line in imports(path, top_level_only=False) if name in ("transformers", "datasets")]
    assert not foreign


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_one_idea(path):
    assert len(path.read_text().splitlines()) <= 300
    assert ast.get_docstring(ast.parse(path.read_text())), "the first lines say which idea this file is"
