"""Which held-out rows are measured: spread over documents, never twice, in order."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tcsae.cache.format.layout import RowBlock
from tcsae.evaluate.model.heldout_text import ENOUGH_DOCUMENTS, HeldOutText, spread_over_documents


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
