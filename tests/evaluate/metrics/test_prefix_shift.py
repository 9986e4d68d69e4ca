from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tcsae.cache.format.layout import SPECIAL, RowBlock
from tcsae.evaluate.metrics.prefix_shift import plan_shifts, prefix_shift


def block(rows: int = 20, context: int = 24, documents: int = 5, *, bos: bool = True) -> RowBlock:
    tokens = np.arange(rows * context, dtype=np.int32).reshape(rows, context) + 100
    flags = np.zeros((rows, context), dtype=np.uint8)
    if bos:
        tokens[:, 0], flags[:, 0] = 1, SPECIAL
    return RowBlock(
        tokens, np.repeat(np.arange(rows, dtype=np.int32) % documents, context).reshape(rows, context), flags
    )


@pytest.mark.parametrize("bos", [True, False])
def test_a_shifted_row_is_its_head_the_prefix_and_the_passage(bos):
    rows = block(bos=bos)
    plan = plan_shifts(rows, 0, passages=7, shifts=(1, 4, 99))
    assert plan is not None
    assert plan.shifts == (1, 4)
    assert plan.start == int(bos)
    assert plan.length == 24 - plan.start - 4
    owner = {int(token): row for row, line in enumerate(rows.tokens_BT) for token in line}
    for at, shift in enumerate(plan.shifts):
        for shifted in (plan.shifted_KRT[at], plan.control_KRT[at]):
            assert shifted.shape == plan.plain_RT.shape
            for plain, moved in zip(plan.plain_RT, shifted, strict=True):
                assert moved[: plan.start].tolist() == plain[: plan.start].tolist()
                passage = plain[plan.start : plan.start + plan.length]
                assert moved[plan.start + shift : plan.start + shift + plan.length].tolist() == passage.tolist()
                document = rows.documents_BT[:, 1]
                assert document[owner[int(moved[plan.start + shift - 1])]] != document[owner[int(passage[-1])]]
    # every document once before any twice: 7 passages of 5 documents
    counts = np.bincount([rows.documents_BT[owner[int(line[-1])], 1] for line in plan.plain_RT])
    assert counts.max() - counts.min() <= 1


def test_one_document_has_no_unrelated_text():
    assert plan_shifts(block(documents=1), 0) is None
    context = SimpleNamespace(rows=[block(documents=1)], seed=0)
    assert "fewer than two documents" in prefix_shift(context).notes[0]


def fake_context(position_weight: float, past_weight: float = 0.0):
    """A model whose activation is the token's own vector, one of the position and one of all that stood before."""
    generator = torch.Generator().manual_seed(0)
    of_token, of_position = torch.randn(700, 16, generator=generator), torch.randn(24, 16, generator=generator)

    def run_rows(tokens_BT):
        own = of_token[tokens_BT]
        past = own.cumsum(1) / torch.arange(1, 25)[:, None]
        return own + position_weight * of_position + past_weight * past

    def on_rows(x, rows):
        assert rows.n_tokens == x.shape[0] * x.shape[1]
        return SimpleNamespace(features=torch.cat([x, -x], -1).relu())

    sae = SimpleNamespace(on_rows=on_rows)
    return SimpleNamespace(rows=[block()], seed=0, run_rows=run_rows, sae=sae)


def test_features_of_the_text_alone_do_not_move():
    found = prefix_shift(fake_context(0.0))
    assert found.metrics["prefix_shift"].value == pytest.approx(1)
    assert found.metrics["prefix_shift_activation"].value == pytest.approx(1)
    assert found.curves["prefix_shift"].x == [1, 4]


def test_features_of_the_position_move_but_the_control_does_not():
    found = prefix_shift(fake_context(3.0)).metrics
    assert found["prefix_shift"].value < 0.5
    assert found["prefix_shift_activation"].value < 0.5
    assert found["prefix_shift_control"].value == pytest.approx(1)
    assert found["prefix_shift"].low < found["prefix_shift"].value < found["prefix_shift"].high


def test_a_changed_context_shows_in_the_control_too():
    found = prefix_shift(fake_context(0.0, past_weight=3.0)).metrics
    assert found["prefix_shift_control"].value < 0.99
    assert found["prefix_shift_activation_control"].value < 0.99
