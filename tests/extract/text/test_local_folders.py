"""Folders as people have them: save_to_disk, clones of hub datasets, splits, links, compressed files, labels."""

from __future__ import annotations

import importlib.util
import json

import datasets
import pytest
from tcsae.errors import MissingPackageError, TextError
from tcsae.extract.config import TextSource
from tcsae.extract.text.local_files import local_path, looks_local
from tcsae.extract.text.open import open_documents, recorded_name
from tiny import tiny_text

TEXTS = [tiny_text(seed, 20) for seed in range(6)]
TOPICS = ["law", "music", "law", "music", "law", "law"]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def rows(first, last):
    return [{"text": text, "topic": topic} for text, topic in zip(TEXTS[first:last], TOPICS[first:last], strict=True)]


def jsonl(path, first, last):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(first, last)))


def read(folder, **options):
    """Text → label."""
    documents = open_documents(TextSource(str(folder), **options))
    assert documents.fingerprint
    return {text: documents.label(number) for number, text in documents.read(0)}


def expected(first, last):
    return dict(zip(TEXTS[first:last], TOPICS[first:last], strict=True))


def saved(folder):
    features = datasets.Features(
        {"text": datasets.Value("string"), "topic": datasets.ClassLabel(names=["law", "music"])}
    )
    return datasets.Dataset.from_list(rows(0, 6), features=features), folder


def test_what_save_to_disk_wrote_with_the_names_of_its_labels(tmp_path):
    dataset, folder = saved(tmp_path / "one")
    dataset.save_to_disk(folder)
    assert read(folder, label_column="topic") == expected(0, 6)
    with pytest.raises(TextError, match="has only the split 'train'; you asked for 'test'"):
        read(folder, split="test")
    before = open_documents(TextSource(str(folder))).fingerprint
    other = tmp_path / "other"
    dataset.select([0, 1]).save_to_disk(other)
    assert open_documents(TextSource(str(other))).fingerprint != before


def test_a_saved_dict_has_splits(tmp_path):
    dataset, folder = saved(tmp_path / "both")
    datasets.DatasetDict({"train": dataset.select(range(4)), "test": dataset.select([4, 5])}).save_to_disk(folder)
    assert read(folder, label_column="topic") == expected(0, 4)
    assert read(folder, split="test", label_column="topic") == expected(4, 6)
    with pytest.raises(TextError, match="has the splits test, train; you asked for 'dev': choose with --split"):
        read(folder, split="dev")
    (folder / "train" / "state.json").write_text("{")
    with pytest.raises(TextError, match="cannot be read as a folder of save_to_disk"):
        read(folder)


def test_an_arrow_file_of_a_saved_dataset_is_a_table_too(tmp_path):
    dataset, folder = saved(tmp_path / "one")
    dataset.save_to_disk(folder)
    [file] = folder.glob("*.arrow")
    assert set(read(file)) == set(TEXTS)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("train/a.jsonl", "test/a.jsonl"),
        ("data/train/x.jsonl", "data/testing/y.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
    ],
)
def test_files_named_by_split(tmp_path, train, test):
    folder = tmp_path / "clone"
    jsonl(folder / train, 0, 4)
    jsonl(folder / test, 4, 6)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA set.\n")
    (folder / "dataset_infos.json").write_text('{"default": {"splits": {}}}')
    assert read(folder, label_column="topic") == expected(0, 4)
    assert read(folder, split="test", label_column="topic") == expected(4, 6)
    with pytest.raises(TextError, match="has the splits test, train; you asked for 'dev'"):
        read(folder, split="dev")


def test_a_folder_whose_names_only_look_like_splits_is_read_whole(tmp_path):
    for name in ("train_journey", "test drive", "the end"):
        (tmp_path / "stories").mkdir(exist_ok=True)
        (tmp_path / "stories" / f"{name}.txt").write_text(name)
    assert set(read(tmp_path / "stories")) == {"train_journey", "test drive", "the end"}


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_clone_whose_readme_declares_what_it_holds(tmp_path, kind):
    folder = tmp_path / "clone"
    if kind == "txt":
        for number, text in enumerate(TEXTS):
            path = folder / ("first" if number < 4 else "rest") / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    else:
        jsonl(folder / "first/a.jsonl", 0, 4)
        jsonl(folder / "rest/a.jsonl", 4, 6)
    (folder / "notes.csv").write_text("not,part,of it\n")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: early\n  data_files:\n"
        f"  - split: train\n    path: first/*.{kind}\n  - split: test\n    path: rest/*.{kind}\n"
        f"- config_name: late\n  data_files: rest/*.{kind}\n---\nA set.\n"
    )
    assert set(read(f"{folder}:early")) == set(TEXTS[:4])
    assert set(read(f"{folder}:early", split="test")) == set(TEXTS[4:])
    assert set(read(f"{folder}:late")) == set(TEXTS[4:])
    assert recorded_name(TextSource(f"{folder}:late")) == f"{folder}:late"
    assert looks_local(f"{folder}:late")
    assert local_path(f"{folder}:late") == folder
    with pytest.raises(TextError, match="has the splits test, train; you asked for 'dev': choose with --split"):
        read(f"{folder}:early", split="dev")
    with pytest.raises(TextError, match=r"Config name is missing.*\): choose with --dataset .*clone:SUBSET"):
        read(folder)


def test_what_is_wrong_with_a_clone_is_said(tmp_path):
    folder = tmp_path / "clone"
    jsonl(folder / "a.jsonl", 0, 6)
    with pytest.raises(TextError, match=r"declares no subsets in a README.md; you asked for ':late'"):
        read(f"{folder}:late")
    (folder / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(TextError, match=r"the front matter of .*README.md is no YAML"):
        read(folder)
    (folder / "README.md").unlink()
    (folder / "a.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(TextError, match="git cloned only a pointer to it: run `git lfs pull`"):
        read(folder)


def test_links_are_followed_once(tmp_path):
    real = tmp_path / "real"
    for topic, text in zip(TOPICS, TEXTS, strict=True):
        (real / topic).mkdir(parents=True, exist_ok=True)
        (real / topic / f"{hash(text)}.txt").write_text(text)
    view = tmp_path / "view"
    view.mkdir()
    for topic in set(TOPICS):
        (view / topic).symlink_to(real / topic)
    (real / "law" / "again").symlink_to(view)  # a loop
    assert read(view) == expected(0, 6)
    (tmp_path / "link").symlink_to(view)
    assert read(tmp_path / "link") == expected(0, 6)


@pytest.mark.skipif(importlib.util.find_spec("zstandard") is None, reason="zstandard is not installed")
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_zst(tmp_path, kind):
    import zstandard

    for number, row in enumerate(rows(0, 6)):
        content = row["text"] if kind == "txt" else json.dumps(row) + "\n"
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.{kind}.zst").write_bytes(zstandard.compress(content.encode()))
    assert set(read(tmp_path / "in")) == set(TEXTS)


def test_zst_without_its_library_names_the_package(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name == "zstandard" else real(name, *at))
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(MissingPackageError, match=r"a.txt.zst, which is compressed with Zstandard, needs .*zstandard"):
        read(tmp_path / "a.txt.zst")
