"""Which held-out rows are measured: spread over documents, never twice, in order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcsae.cache.format.layout import RowBlock
from tcsae.evaluate.model.heldout_text import ENOUGH_DOCUMENTS, HeldOutText, spread_over_documents, survey
from tcsae.sites import Location


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(st.integers(0, 6), min_size=1, max_size=40), rows=st.integers(1, 50))
def test_every_document_has_its_turn_before_any_has_another(documents, rows):
    documents_R = np.array(documents)
    chosen = spread_over_documents(documents_R, rows)
    assert len(chosen) == min(rows, len(documents))
    assert (np.diff(chosen) > 0).all(), "in order, each once"
    taken = {d: int((documents_R[chosen] == d).sum()) for d in set(documents)}
    left = {d: documents.count(d) - taken[d] for d in set(documents)}
    for d, n in taken.items():
        assert all(n >= taken[other] - 1 or left[d] == 0 for other in taken)


def test_reading_goes_on_where_the_first_rows_are_of_one_document():
    def blocks():
        for row in range(10_000):
            # The first document fills 100 rows, every later one fills 2.
            document = np.full((1, 4), max(0, (row - 98) // 2), dtype=np.int32)
            yield RowBlock(np.full((1, 4), row, dtype=np.int32), document, np.zeros((1, 4), dtype=np.uint8))

    text = HeldOutText.gather(blocks(), 48)
    assert len(text) == 48
    assert text.n_documents == 48, "one row each"
    assert text.tokens_RT.max() < 98 + 2 * ENOUGH_DOCUMENTS + 2, "and no further than needed"


@pytest.mark.parametrize("first_row", [1.0, 30.0])
def test_the_survey_is_of_the_whole_text_whatever_the_batches(first_row):
    """Where the first rows are larger than the rest, ten times their median says nothing of the limit."""
    draw = torch.Generator().manual_seed(0)
    x_RTD = torch.randn(23, 8, 6, generator=draw)
    x_RTD[0] = torch.nn.functional.normalize(x_RTD[0], dim=-1) * first_row
    x_RTD[5, 2], x_RTD[17, 7] = 300.0, 40.0
    far = 2 + 7 * (first_row > 10)
    tokens = np.arange(23 * 8).reshape(23, 8)
    real = tokens % 8 > 0
    text = HeldOutText(tokens, tokens * 0, tokens * 0, real, np.zeros(1, dtype=np.int64))
    of_rows = lambda _text, rows, locations: {locations[0]: x_RTD[rows]}  # noqa: E731
    model = SimpleNamespace(of_rows=of_rows, device=torch.device("cpu"))
    x_ND = x_RTD[torch.from_numpy(real)].double()
    norms = x_ND.norm(dim=-1)
    limit = 10 * float(norms.float().median())
    for batch_rows in (1, 2, 5, 23):
        (found,) = survey(model, text, [Location(0)], batch_rows).values()
        assert found.norm_limit == pytest.approx(limit)
        assert (found.n_tokens, found.n_outliers) == (23 * 7, int((norms > limit).sum()))
        assert found.n_outliers == far
        assert torch.allclose(found.mean_D.double(), x_ND[norms <= limit].mean(0), atol=1e-6)
