"""Stores that are written together hold the same rows: what a layer beside finished ones is told, and how it joins
them.
"""

import os
import shlex
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tcsae.cache.format.layout import StoreLayout
from tcsae.cache.store import ActivationStore
from tcsae.errors import StoreError
from tcsae.extract import plan as plan_module
from tcsae.extract import run as run_module
from tcsae.extract.run import extract
from tcsae.pipeline import main
from tcsae.sites import Location


@pytest.fixture(autouse=True)
def quick(small_shards, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@contextmanager
def refused(monkeypatch, sentence):
    """A StoreError, and that before the weights are read."""
    with monkeypatch.context() as patched:
        for name in ("identify_model", "load_language_model"):
            patched.setattr(run_module, name, lambda *_, **__: pytest.fail("the weights were read"))
        with pytest.raises(StoreError, match=sentence) as said:
            yield said


def test_a_layer_beside_finished_ones_is_refused_at_once_and_then_extracted_by_itself(config, monkeypatch, tmp_path):
    extract(config)
    three = replace(config, layers=(1, 2, 3))
    with refused(
        monkeypatch, r"l1.zarr holds 100 rows but .*l3.zarr 0: .*; the same rows, by itself: pipeline"
    ) as said:
        extract(three)
    assert not (tmp_path / "a" / "l3.zarr").exists()
    with refused(monkeypatch, r"text.seed: store has 0, you asked for 5"):
        extract(replace(three, text=replace(three.text, seed=5)))
    assert main(shlex.split(str(said.value).rsplit("by itself: ", 1)[1])[1:]) == 0
    assert extract(three).already_complete
    alone, beside = (ActivationStore.open(three.paths[Location(n)]) for n in (3, 1))
    assert (alone.tokens(0, 100) == beside.tokens(0, 100)).all()


def test_a_layer_added_to_stores_that_grew_grows_with_them(config, monkeypatch, tmp_path):
    extract(replace(config, tokens=42 * 16))
    extract(replace(config, tokens=60 * 16))
    three = replace(config, layers=(1, 2, 3), tokens=90 * 16)
    with refused(monkeypatch, r"l3.zarr 0: .* --layers 3 .* --tokens 960 "):
        extract(three)
    extract(replace(three, layers=(3,), tokens=60 * 16))
    assert extract(three).tokens == 30 * 16
    whole = replace(three, out=str(tmp_path / "b"))
    extract(whole)
    for at, path in whole.paths.items():
        ours, theirs = ActivationStore.open(three.paths[at]), ActivationStore.open(path)
        torch.testing.assert_close(ours.rows(0, 90), theirs.rows(0, 90), rtol=0, atol=0)


def test_layers_in_shards_of_other_sizes_are_not_written_together(config, monkeypatch):
    extract(replace(config, layers=(1,)))
    with monkeypatch.context() as patched:
        patched.setattr(plan_module, "plan_layout", lambda *_, **__: StoreLayout(24, 16, 4, 16))
        extract(replace(config, layers=(2,)))
    assert extract(config).already_complete
    with refused(monkeypatch, r"l1.zarr and .*l2.zarr have shards of 8 and 16 rows .*: name one layer at a time"):
        extract(replace(config, tokens=120 * 16))
