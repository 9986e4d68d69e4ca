"""Columns of token ids: taken as they are, after they were checked against the model."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tcsae.cache.format.layout import RowBlock
from tcsae.errors import TextError
from tcsae.extract.config import ModelSource, TextSource
from tcsae.extract.model.load import outline_model
from tcsae.extract.text.hub_stream import StreamedDocuments
from tcsae.extract.text.rows import row_blocks
from tiny import tiny_text
from tiny_tokenizers import tokenizer_of

TEXTS = [tiny_text(seed, 60) for seed in range(8)]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def outline(tiny_llama):
    return outline_model(ModelSource(str(tiny_llama)))


def write(folder, kind, ids):
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        pa.parquet.write_table(pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32()))}), folder / "a.parquet")
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    else:
        datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(folder)
    return folder


def rows(folder, outline, column="input_ids", **options):
    source = TextSource(str(folder), text_column=column, context=16, **options)
    return RowBlock.concatenate([block for block, _ in row_blocks(source, outline)])


def tokens(outline):
    return [outline.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "save_to_disk"])
@pytest.mark.parametrize("packing", ["document", "concat"])
def test_given_ids_make_the_rows_that_their_text_makes(tmp_path, outline, kind, packing):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    text = rows(tmp_path / "text", outline, "text", held_out=0, packing=packing)
    given = rows(write(tmp_path / "ids", kind, tokens(outline)), outline, held_out=0, packing=packing)
    np.testing.assert_array_equal(given.tokens_BT, text.tokens_BT)
    np.testing.assert_array_equal(given.documents_BT, text.documents_BT)
    np.testing.assert_array_equal(given.flags_BT, text.flags_BT)


def test_a_bos_in_front_and_padding_at_the_ends_are_left_out(tmp_path, outline):
    bos, pad = outline.bos_token_id, outline.tokenizer.pad_token_id
    plain = rows(write(tmp_path / "plain", "parquet", tokens(outline)), outline, held_out=0)
    padded = [[pad] * 3 + [bos, *ids] + [pad] * 5 for ids in tokens(outline)]
    found = rows(write(tmp_path / "padded", "parquet", padded), outline, held_out=0)
    np.testing.assert_array_equal(found.tokens_BT, plain.tokens_BT)
    assert (found.tokens_BT[:, 0] == bos).all()


def test_ids_of_a_larger_vocabulary_or_of_another_tokenizer_are_refused(tmp_path, outline):
    for wrong in (400, -100):
        ids = tokens(outline)
        ids[3][5] = wrong
        with pytest.raises(
            TextError, match=rf"holds token {wrong} .* has tokens 0 to 399: it was tokenised for another"
        ):
            rows(write(tmp_path / f"wrong{wrong}", "parquet", ids), outline)
    other = [tokenizer_of("wordpiece")(text)["input_ids"] for text in TEXTS]
    with pytest.raises(TextError, match=r"holds tokens of another tokenizer: .* % are the same|\d+% are the same"):
        rows(write(tmp_path / "other", "parquet", other), outline)


def test_a_column_of_other_numbers_is_no_text(tmp_path, outline):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [0.5, 1.5]}\n')
    with pytest.raises(TextError, match="holds lists of float, not text or token ids"):
        rows(tmp_path / "a.jsonl", outline)


def test_held_out_documents_are_the_others_for_ids_too(tmp_path, outline):
    folder = write(tmp_path / "ids", "jsonl", tokens(outline))
    source = TextSource(str(folder), text_column="input_ids", context=16, held_out=0.4)
    share = [set(b.documents_BT.flat) for held in (False, True) for b, _ in row_blocks(source, outline, held_out=held)]
    assert len(share) == 2
    assert not share[0] & share[1]
    assert share[0] | share[1] == set(range(8))


def test_a_stream_of_the_hub_has_ids_too(outline):
    documents = StreamedDocuments([{"input_ids": ids} for ids in tokens(outline)], "a/b", "input_ids", "sha")
    source = TextSource("a/b", text_column="input_ids", context=16, held_out=0)
    found = RowBlock.concatenate([block for block, _ in row_blocks(source, outline, documents=documents)])
    assert set(found.documents_BT.flat) == set(range(8))
