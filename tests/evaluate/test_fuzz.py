"""Foreign and damaged folders by the hundred: each is read or refused in one sentence, quickly and in little memory."""

from __future__ import annotations

import random
import resource

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mutations import corpus, mutated, outcome


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def test_the_corpus_itself_is_read(folders):
    assert {folder.name: outcome(folder) for folder in folders} == {folder.name: "read" for folder in folders}


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(dice=st.randoms(use_true_random=False))
@example(dice=random.Random(0))
def test_whatever_is_wrong_is_one_sentence(folders, tmp_path_factory, dice):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case = tmp_path_factory.getbasetemp() / "case"
    mutated(dice.choice(folders), case, dice)
    assert outcome(case) in ("read", "refused")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
