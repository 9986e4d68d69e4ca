"""Labels of documents: from folders, from a column, and through to the text that is evaluated on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tcsae.cache.format.layout import RowBlock
from tcsae.cache.format.manifest import TextIdentity
from tcsae.errors import TextError
from tcsae.evaluate.model.heldout_text import HeldOutText
from tcsae.extract.config import TextSource, extract_config, text_source
from tcsae.extract.text.hub_stream import StreamedDocuments
from tcsae.extract.text.open import open_documents


def labelled(folder, *, labels=("music", "law"), extra: str | None = None):
    for label in labels:
        for number in range(4):
            path = folder / label / ("deep" if number % 2 else ".") / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{label} number {number}")
    if extra:
        (folder / extra).write_text("no label here")
    return folder


def label_of_text(documents):
    return {text: documents.label(number) for number, text in documents.read(0)}


def test_the_first_folder_is_the_label(tmp_path):
    found = label_of_text(open_documents(TextSource(str(labelled(tmp_path)), seed=3)))
    assert len(found) == 8
    assert all(text.startswith(str(label)) for text, label in found.items())


@pytest.mark.parametrize("shape", [{"labels": ("music",)}, {"extra": "stray.txt"}])
def test_one_folder_or_a_file_outside_of_them_is_no_labelling(tmp_path, shape):
    assert set(label_of_text(open_documents(TextSource(str(labelled(tmp_path, **shape))))).values()) == {None}


def test_a_column_holds_labels(tmp_path):
    rows = [{"text": f"text {n}", "topic": topic, "n": n} for n, topic in enumerate(["a", "b", "a", None, "", "b"])]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = label_of_text(open_documents(TextSource(str(path), label_column="topic", seed=1)))
    assert found == {f"text {n}": label for n, label in enumerate(["a", "b", "a", None, None, "b"])}
    assert set(label_of_text(open_documents(TextSource(str(path), label_column="n"))).values()) == set("012345")
    assert set(label_of_text(open_documents(TextSource(str(path)))).values()) == {None}


def test_what_is_wrong_with_a_label_column_is_said(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "a", "tags": ["x"]}) + "\n")
    with pytest.raises(TextError, match="no column 'topic': its columns are text, tags; name one with --label-column"):
        open_documents(TextSource(str(path), label_column="topic"))
    documents = open_documents(TextSource(str(path), label_column="tags"))
    with pytest.raises(TextError, match="holds list, no labels"):
        label_of_text(documents)
    with pytest.raises(TextError, match="text files, which have no column 'topic'"):
        open_documents(TextSource(str(labelled(tmp_path / "folders")), label_column="topic"))


def test_a_stream_knows_the_labels_of_what_it_has_read():
    rows = [{"text": f"text {n}", "topic": n % 3} for n in range(9)]
    documents = StreamedDocuments(rows, "someone/prose", "text", "sha", "topic")
    assert [number for number, _ in documents.read(4)] == [4, 5, 6, 7, 8]
    assert [documents.label(number) for number in (4, 8)] == ["1", "2"]
    assert StreamedDocuments(rows, "someone/prose", "text", "sha").label(0) is None


def test_held_out_text_carries_numbers_of_labels_and_their_names():
    documents = np.repeat(np.arange(3)[:, None], 5, 1).astype(np.int32)
    block = RowBlock(documents + 7, documents, np.zeros((3, 5), np.uint8))
    label = {0: "b", 1: None, 2: "a"}
    text = HeldOutText.gather([block], 3, label.get)
    assert text.label_names == ("a", "b")
    assert text.labels_RT is not None
    assert text.labels_RT[:, 0].tolist() == [1, -1, 0]
    plain = HeldOutText.gather([block], 3)
    assert plain.label_names == ()
    assert plain.fingerprint != text.fingerprint


def test_the_label_column_is_recorded_only_where_there_is_one_and_used_again():
    common = {"dataset": "d", "split": "train", "text_column": "text", "fingerprint": "f", "packing": "document"}
    plain = TextIdentity(**common, context=16, seed=0, held_out=0.1)
    assert "label_column" not in plain.model_dump()  # what older versions would refuse
    assert TextIdentity.model_validate(plain.model_dump()) == plain
    column = plain.model_copy(update={"label_column": "topic"})
    assert TextIdentity.model_validate_json(column.model_dump_json()).label_column == "topic"
    assert text_source(column).label_column == "topic"
    assert extract_config(layers=1, label_column="topic").text.label_column == "topic"
