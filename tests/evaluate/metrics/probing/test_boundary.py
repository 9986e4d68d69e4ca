"""Seams of spliced documents: planted codes that see them, that do not, and the rows that are made."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tcsae.evaluate.metrics.probing.boundary import auc_of_seams, boundary, plan_splices
from tcsae.evaluate.model.heldout_text import HeldOutText
from worlds import value

ROWS, CONTEXT, DOCUMENTS = 24, 32, 8


def a_text(documents: int = DOCUMENTS) -> HeldOutText:
    """Token numbers that tell their document: 100 · document + position; BOS is 0."""
    document = np.arange(ROWS) % documents
    tokens = 100 * (document[:, None] + 1) + np.arange(CONTEXT)
    tokens[:, 0] = 0
    documents_RT = np.repeat(document[:, None], CONTEXT, 1)
    return HeldOutText(tokens, documents_RT, documents_RT, tokens > 0, np.arange(documents))


def looked_at(code, documents: int = DOCUMENTS):
    """What the probe finds where the activations are tokens, and codes a function of them."""
    seen = []

    def on_rows(x_RTD, rows):
        seen.append(rows)
        return SimpleNamespace(features=code(x_RTD[..., 0]))

    def run_rows(tokens_BT):
        return torch.stack([tokens_BT.double(), torch.ones_like(tokens_BT, dtype=torch.float64)], 2).float()

    context = SimpleNamespace(
        sae=SimpleNamespace(on_rows=on_rows), seed=0, norm_limit=1e9, text=a_text(documents), run_rows=run_rows
    )
    return boundary(context), seen


def of_document(token_RT):
    return torch.nn.functional.one_hot((token_RT // 100).long(), 2 * DOCUMENTS + 1).float()


def test_a_code_that_knows_the_document_finds_every_seam():
    found, _ = looked_at(of_document)
    assert value(found.sums["boundary"]) == 1
    assert found.sums["boundary"].denominator_U.sum() == ROWS
    assert value(found.sums["boundary_control"]) == pytest.approx(0.5)  # nothing changes where nothing is spliced


def test_a_code_that_never_changes_and_one_that_always_does_are_at_chance():
    for code in (lambda token_RT: torch.ones(*token_RT.shape, 3), lambda t: torch.eye(CONTEXT).expand(len(t), -1, -1)):
        found, _ = looked_at(code)
        assert value(found.sums["boundary"]) == pytest.approx(0.5)


def test_no_coder_is_told_of_the_seam():
    _, seen = looked_at(of_document)
    assert all((rows.documents_NT == 0).all() for rows in seen)
    assert all(rows.one_run_from == 1 for rows in seen)


def test_rows_are_of_two_documents_and_of_as_many_as_there_are():
    text = a_text()
    chosen, other = plan_splices(text, 0)
    document = text.documents_RT[:, 0]
    assert sorted(chosen) == list(range(ROWS))
    assert (document[chosen] != document[other]).all()
    few, _ = plan_splices(text, 0, rows=DOCUMENTS)
    assert sorted(document[few]) == list(range(DOCUMENTS))


def test_one_document_has_no_seams_and_says_so():
    found, _ = looked_at(of_document, documents=1)
    assert not found.sums
    assert "fewer than two documents" in found.notes[0]


def test_the_area_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(5, 12, 4, generator=generator)
    z[3, 6] = 0  # a seam without a code
    valid = torch.ones(5, 12, dtype=torch.bool)
    valid[:, 0] = False
    valid[1, 9] = False
    seams = torch.tensor([3, 5, 8, 6, 11])
    got = auc_of_seams(z, valid, seams)
    for row, seam in enumerate(seams.tolist()):
        pairs = [t for t in range(1, 11) if valid[row, t] and valid[row, t + 1]]
        pairs = [t for t in pairs if z[row, t].norm() > 0 and z[row, t + 1].norm() > 0]
        change = {t: 1 - float(torch.cosine_similarity(z[row, t].double(), z[row, t + 1].double(), 0)) for t in pairs}
        if seam - 1 not in change:
            assert torch.isnan(got[row])
            continue
        others = [one for t, one in change.items() if t != seam - 1]
        assert got[row] == pytest.approx(np.mean([one < change[seam - 1] for one in others]))
