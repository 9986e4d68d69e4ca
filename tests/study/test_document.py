"""docs/RESULTS.md is made of analyses alone: verdicts, tables, figures, commands, limits."""

from __future__ import annotations

import re

from synthetic_study import World, make_members, study_file
from tcsae.study.analysis import analyse
from tcsae.study.document import document, write_document

WORLD = World(effects={"next": {"topic": 0.05}}, models=("one", "two"))


def make(folder, world=WORLD, **changes):
    return analyse(study_file(world, **changes), make_members(folder, world))


def test_it_is_written_with_the_figures_that_it_names(tmp_path):
    analyses = [make(tmp_path / "a"), make(tmp_path / "b", name="second")]
    path = write_document(analyses, tmp_path / "docs" / "RESULTS.md")
    text = path.read_text()
    named = re.findall(r"\]\((results/[^)]+)\)", text)
    assert len(named) == 2 * (1 + 4)  # of every study one of its question, the plane, the cost and two curves
    for name in named:
        assert (path.parent / name).is_file()
        assert (path.parent / name).with_suffix(".svg").is_file()
    assert text.count("\n## ") == 2
    assert "_alone_" not in text


def test_two_scales_of_one_study_keep_their_own_figures(tmp_path):
    one = make(tmp_path)
    two = one.model_copy(update={"scale": "medium"})
    text = document([one, two])
    folders = set(re.findall(r"\]\((results/[^/]+)/", text))
    assert folders == {"results/made_up-small", "results/made_up-medium"}
    assert "| made_up | medium | the term | **helps** |" in text


def test_it_says_how_to_run_it_again_and_larger(tmp_path):
    text = document([make(tmp_path)])
    assert "pipeline study studies/made_up.toml --scale small" in text
    assert "`pipeline study studies/made_up.toml --scale gemma` on Gemma-2-2b (30 hours, 500 GB)" in text
    for part in ("seeds", "machine", "2 cores, 2 threads", "took", "hash", "### Limits", "3 seeds:"):
        assert part in text


def test_it_begins_with_the_verdicts(tmp_path):
    text = document([make(tmp_path)])
    assert text.index("it helps") < text.index("\n## ")
    assert "### the term: helps" in text
    assert "### Model by model" in text
    assert "| document topic ↑ | +0.0" in text


def test_tables_keep_their_columns(tmp_path):
    world = World(effects={"next": {"topic": 0.05}}, variants=("next", "none", "shuffled"))
    text = document([make(tmp_path, world)])
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        lines = block.strip().splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, block


def test_a_failed_member_is_named(tmp_path):
    members = make_members(tmp_path, WORLD)
    members[0] = type(members[0])(**(vars(members[0]) | {"failure": "killed | by hand"}))
    text = document([analyse(study_file(WORLD), members)])
    assert "- Without numbers: next, seed 0, one l5: killed | by hand" in text
