"""Packing: the fast one equals the slow one, resumes anywhere, and keeps held-out documents apart."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import rows_by_hand
from tcsae.cache.format.layout import SPECIAL, RowBlock
from tcsae.errors import TextError
from tcsae.extract.config import ModelSource, TextSource
from tcsae.extract.model.load import outline_model
from tcsae.extract.text.documents import is_held_out, shuffled
from tcsae.extract.text.open import open_documents
from tcsae.extract.text.row_batches import RowReader, batches
from tcsae.extract.text.rows import Cursor, Tokenized, gather, pack, row_blocks
from tiny import tiny_corpus, tiny_text

LENGTHS = st.lists(st.integers(0, 40), max_size=12)
SHAPE = st.tuples(st.sampled_from(["document", "concat"]), st.integers(2, 9), st.sampled_from([None, 1]))


def documents_of(lengths, start=0):
    """Documents whose tokens are all different; every third number is held out, so not there."""
    numbers = [3 * at // 2 for at in range(len(lengths))]
    ids = np.split(np.arange(100, 100 + sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1]) if lengths else []
    return [(Tokenized(n, [i], f"hash{n}"), 0) for n, i in zip(numbers, ids, strict=True) if n >= start]


@given(LENGTHS, SHAPE)
@settings(deadline=None, max_examples=60)
def test_packing_equals_the_slow_twin(lengths, shape):
    packing, context, bos = shape
    documents = documents_of(lengths)
    rows = list(pack(documents, packing, context, bos))
    slow, dropped = rows_by_hand([(d.number, d.parts[0].tolist()) for d, _ in documents], packing, context, bos)
    fast = [list(zip(row.tokens_T.tolist(), row.documents_T.tolist(), strict=True)) for row in rows]
    assert fast == slow
    if rows and packing == "document":
        last = documents[-1][0]
        tail = len(last.parts[0]) - rows[-1].cursor.offset if rows[-1].cursor.document == last.number else None
        assert rows[-1].cursor.dropped_tokens + (tail or 0) <= dropped
        if tail is not None:
            assert rows[-1].cursor.dropped_tokens + tail == dropped


@given(LENGTHS, SHAPE, st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_packing_goes_on_from_any_cursor(lengths, shape, at):
    packing, context, bos = shape
    rows = list(pack(documents_of(lengths), packing, context, bos))
    if not rows:
        return
    at %= len(rows)
    cursor = Cursor.read(asdict(rows[at].cursor))
    rest = list(pack(documents_of(lengths, cursor.document), packing, context, bos, cursor))
    assert [row.cursor for row in rest] == [row.cursor for row in rows[at + 1 :]]
    for ours, theirs in zip(rest, rows[at + 1 :], strict=True):
        np.testing.assert_array_equal(ours.tokens_T, theirs.tokens_T)
        np.testing.assert_array_equal(ours.documents_T, theirs.documents_T)


@given(LENGTHS, SHAPE, st.integers(1, 7), st.integers(1, 5), st.integers(0, 30))
@settings(deadline=None, max_examples=40)
def test_batches_never_straddle_a_shard_and_miss_no_row(lengths, shape, shard_rows, batch_size, planned):
    packing, context, bos = shape
    rows = list(pack(documents_of(lengths), packing, context, bos))
    with RowReader(iter(rows), (1,)) as feed:
        got = list(batches(feed, 0, planned, shard_rows, batch_size))
    assert sum(len(batch.block) for batch in got) == min(planned, len(rows))
    for batch in got:
        stop = batch.first_row + len(batch.block)
        assert batch.first_row // shard_rows == (stop - 1) // shard_rows
        assert batch.first_row % shard_rows % batch_size == 0
        ends = stop % shard_rows == 0 or stop == min(planned, len(rows))
        assert (batch.cursor is not None) == ends
        if batch.cursor:
            assert batch.cursor == asdict(rows[stop - 1].cursor) | {"end": stop == len(rows)}
    if got:
        tokens = np.concatenate([batch.block.tokens_BT for batch in got])
        np.testing.assert_array_equal(tokens, np.stack([row.tokens_T for row in rows[: len(tokens)]]))


def test_feed_raises_what_its_thread_met():
    def broken():
        yield from pack(documents_of([20]), "document", 4, None)
        raise TextError("the disk is gone")

    with RowReader(broken(), ()) as feed:
        assert feed.take(4) is not None
        with pytest.raises(TextError, match="the disk is gone"):
            feed.take(2)


def test_special_tokens_are_flagged():
    block = gather(list(pack(documents_of([12]), "document", 5, 1)), (1, 104))
    assert (block.flags_BT[:, 0] == SPECIAL).all()
    np.testing.assert_array_equal(block.flags_BT[:, 1:] == SPECIAL, block.tokens_BT[:, 1:] == 104)


def test_special_tokens_written_in_a_text_stay_letters(tmp_path, tiny_gemma2, tiny_gpt2):
    for folder, token in ((tiny_gemma2, "<bos>"), (tiny_gpt2, "<|endoftext|>")):
        (tmp_path / "a.txt").write_text(f"The old king {token} crosses the northern road. " * 5)
        outline = outline_model(ModelSource(str(folder)))
        [(block, _)] = row_blocks(TextSource(str(tmp_path), context=16, held_out=0), outline)
        special = np.isin(block.tokens_BT, outline.special_token_ids)
        assert special[:, 0].all()
        assert not special[:, 1:].any()
        assert token in outline.tokenizer.decode(block.tokens_BT[:, 1:].reshape(-1))


def read(text, outline, **options):
    return RowBlock.concatenate([block for block, _ in row_blocks(text, outline, **options)])


def test_held_out_documents_and_rows_are_exactly_the_others(tiny_llama, corpus):
    outline = outline_model(ModelSource(str(tiny_llama)))
    everything = TextSource(str(corpus), context=16, held_out=0.0)
    share = TextSource(str(corpus), context=16, held_out=0.3)
    ours, theirs = read(share, outline), read(share, outline, held_out=True)
    whole = read(everything, outline)
    mine, held = set(ours.documents_BT.flat), set(theirs.documents_BT.flat)
    assert mine
    assert held
    assert not mine & held
    assert mine | held == set(whole.documents_BT.flat)
    assert len(ours) + len(theirs) == len(whole)


def test_no_held_out_document_is_a_sentence(tiny_llama, corpus):
    outline = outline_model(ModelSource(str(tiny_llama)))
    with pytest.raises(TextError, match=r"no held-out document .* share of 0: extract with a larger --held-out"):
        next(row_blocks(TextSource(str(corpus), held_out=0.0), outline, held_out=True))


def test_row_blocks_go_on_from_a_cursor_without_tokenising_what_lies_before(tiny_llama, corpus):
    outline = outline_model(ModelSource(str(tiny_llama)))
    text = TextSource(str(corpus), context=16, seed=3)
    blocks = list(row_blocks(text, outline, rows_per_block=10))
    cursor = blocks[12][1]
    assert cursor["document"] > 5
    seen: list[str] = []

    class Watched:
        bos_token_id, all_special_ids = outline.bos_token_id, outline.special_token_ids

        def __call__(self, texts, **options):
            seen.extend(texts)
            return outline.tokenizer(texts, **options)

    rest = list(row_blocks(text, replace(outline, tokenizer=Watched()), rows_per_block=10, cursor=cursor))
    assert len(seen) == sum(not is_held_out(t, 0.01) for _, t in open_documents(text).read(cursor["document"]))
    assert [c for _, c in rest] == [c for _, c in blocks[13:]]
    np.testing.assert_array_equal(rest[0][0].tokens_BT, blocks[13][0].tokens_BT)


def test_a_changed_text_is_refused_on_resume(tiny_llama, tmp_path):
    outline = outline_model(ModelSource(str(tiny_llama)))
    text = TextSource(str(tiny_corpus(tmp_path / "t", documents=8)), context=16)
    *_, (_, cursor) = row_blocks(text, outline, rows_per_block=10)
    for path in (tmp_path / "t").iterdir():
        path.write_text(path.read_text().replace("king", "queen"))
    with pytest.raises(TextError, match="document 7 is not the one this store was reading when it stopped"):
        list(row_blocks(text, outline, cursor=cursor))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
def test_held_out_share_is_a_hash_of_the_text(share):
    texts = [tiny_text(seed, 5) for seed in range(3000)]
    held = [is_held_out(text, share) for text in texts]
    assert abs(np.mean(held) - share) < 0.02
    assert held == [is_held_out(text, share) for text in texts]
    assert all(is_held_out(t, 0.5) for t, h in zip(texts, held, strict=True) if h), (
        "a larger share holds out more, not others"
    )


def test_order_is_a_permutation_by_seed_alone():
    assert sorted(shuffled(100, 7)) == list(range(100))
    assert shuffled(100, 7).tolist() != shuffled(100, 8).tolist()
    assert shuffled(6, 0).tolist() == [4, 3, 0, 1, 5, 2], "pinned: stores are resumed in this order"
    assert [n for n in range(8) if is_held_out(f"document {n}", 0.25)] == [2, 7], "pinned: evaluation relies on it"
