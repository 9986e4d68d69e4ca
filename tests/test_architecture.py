"""The house keeps its order: folders are small, imports run downwards and never in circles, tests mirror the tree."""

from __future__ import annotations

import ast
import tomllib

import house
import pytest

SOURCES = [path for path in house.sources() if path.name != "__init__.py"]
MOST_FILES = 20


def named(path):
    return str(path.relative_to(house.ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_run_downwards(path):
    assert not house.upward(path)


def test_no_file_imports_itself_in_a_circle():
    assert not house.cycles(house.sources())


def test_no_folder_is_too_full():
    assert not {folder: n for folder, n in house.files_per_folder().items() if n > MOST_FILES}


@pytest.mark.parametrize("path", [path for path in SOURCES if house.part(path) in ("cache", "train")], ids=named)
def test_cache_and_train_know_no_language_models(path):
    foreign = [
        (name, line) for _, name, line in house.imports(path) if name.split(".")[0] in ("transformers", "datasets")
    ]
    assert not foreign


@pytest.mark.parametrize("path", house.sources(), ids=named)
def test_the_first_lines_say_which_idea_a_file_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_folder_is_installed():
    """setuptools takes the list of pyproject.toml literally: a folder that is missing there is missing in a wheel."""
    listed = tomllib.loads((house.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path for name in house.FOLDERS for path in (house.ROOT / name).rglob("__init__.py")]
    there = {".".join(("tcsae", *path.parent.relative_to(house.ROOT).parts)) for path in folders}
    assert set(listed) == {"tcsae"} | there


def test_tests_mirror_the_tree():
    """A folder of tests has a folder that it tests."""
    folders = {path.parent.relative_to(house.ROOT / "tests") for path in (house.ROOT / "tests").rglob("test_*.py")}
    assert not [str(folder) for folder in folders if not (house.ROOT / folder).is_dir()]
