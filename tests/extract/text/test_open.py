"""Where text comes from: every local format, hub streams as the libraries hand them over, and a sentence for each
failure.
"""

import gzip
import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DataFilesNotFoundError
from tcsae.errors import TextError, UsageError
from tcsae.extract.config import ModelSource, TextSource
from tcsae.extract.model.load import outline_model
from tcsae.extract.text import local_files
from tcsae.extract.text.documents import LargeText
from tcsae.extract.text.open import open_documents, resolve_text
from tiny import tiny_text

TEXTS = [tiny_text(seed, 20) for seed in range(6)]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def write(folder, kind):
    folder.mkdir()
    if kind == "txt":
        for number, text in enumerate(TEXTS):
            (folder / f"{number}.txt").write_text(text)
    elif kind == "txt.gz":
        for number, text in enumerate(TEXTS):
            (folder / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode()))
    elif kind in ("jsonl", "jsonl.gz"):
        raw = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)).encode()
        (folder / f"a.{kind}").write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    elif kind == "json":
        (folder / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif kind in ("csv", "tsv"):
        import csv

        with (folder / f"a.{kind}").open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerows([["text"], *([text] for text in TEXTS)])
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[:3]}), folder / "a.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[3:]}), folder / "b.parquet")
    return folder


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet"])
def test_every_local_format_gives_the_same_documents(tmp_path, kind):
    documents = open_documents(TextSource(str(write(tmp_path / "in", kind)), seed=1))
    read = list(documents.read(0))
    assert sorted(text for _, text in read) == sorted(TEXTS)
    assert [number for number, _ in read] == list(range(6))
    assert list(documents.read(4)) == read[4:]
    assert [text for _, text in open_documents(TextSource(str(tmp_path / "in"), seed=2)).read(0)] != [
        t for _, t in read
    ]
    assert documents.revision is None


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_cell_larger_than_a_document_in_memory_is_read_in_pieces(tmp_path, monkeypatch, kind):
    """Of 50 MB, a process grows by 0.2 to 0.5 GB (docs/LOG.md); here, that no Python object of the cell is made. 12 MB
    are more than the JSON reader takes at a time.
    """
    large = "the old king remembers the harvest in winter. " * (260_000 if kind == "jsonl" else 4_000)
    rows = [{"text": "a short one"}, {"text": large}]
    file = tmp_path / f"cells.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        file.write_text("text\n" + "".join(f'"{row["text"]}"\n' for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    monkeypatch.setattr(local_files, "LARGE", 100_000)
    real, made = local_files.content_of, []

    def content_of(row, *rest, **more):
        made.append(len(row["text"]))
        return real(row, *rest, **more)

    monkeypatch.setattr(local_files, "content_of", content_of)
    documents = open_documents(TextSource(dataset=str(file)))
    (found,) = [content for _, content in documents.read(0) if isinstance(content, LargeText)]
    pieces = list(found.pieces())
    assert "".join(pieces) == large
    assert max(map(len, pieces)) <= 1_000_000
    assert made == [len("a short one")]


def test_fingerprint_covers_names_and_bytes(tmp_path):
    folder = write(tmp_path / "in", "txt")
    before = open_documents(TextSource(str(folder))).fingerprint
    assert open_documents(TextSource(str(folder))).fingerprint == before
    (folder / "0.txt").write_text(TEXTS[0][:-2] + "!\n")
    changed = open_documents(TextSource(str(folder))).fingerprint
    (folder / "0.txt").rename(folder / "9.txt")
    assert len({before, changed, open_documents(TextSource(str(folder))).fingerprint}) == 3


def failing(tmp_path, case):
    folder = tmp_path / "in"
    if case == "column":
        write(folder, "jsonl")
        return TextSource(str(folder), text_column="body")
    if case == "split":
        return TextSource(str(write(folder, "txt")), split="test")
    folder.mkdir()
    if case == "empty":
        (folder / "a.txt").write_text("")
    elif case == "mixed":
        (folder / "a.txt").write_text("x")
        (folder / "b.jsonl").write_text("{}")
    elif case == "latin":
        (folder / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    elif case == "numbers":
        (folder / "a.jsonl").write_text('{"text": 3}\n')
    elif case == "broken":
        (folder / "a.parquet").write_bytes(b"PAR1 no")
    elif case == "pdf":
        (folder / "a.pdf").write_bytes(b"%PDF")
        return TextSource(str(folder / "a.pdf"))
    return TextSource(str(folder / "gone.txt") if case == "missing" else str(folder))


def use(source):
    documents = open_documents(source)
    return documents.fingerprint, list(documents.read(0))


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("column", r"has no column 'body': its columns are id, text; name one with --text-column"),
        ("split", r"is on this machine and has only the split 'train'; you asked for 'test'"),
        ("empty", r"holds no text: every file in it is empty"),
        ("mixed", r"mixes json and text files: keep one format to a folder"),
        ("latin", r"a.txt is not UTF-8 \(byte 3\): convert it"),
        ("numbers", r"column 'text' of .* holds int, not text or token ids: name another with --text-column"),
        ("broken", r"cannot be read as parquet"),
        ("pdf", r"a.pdf is not text that can be read here: use one of .txt"),
        ("missing", r"there is no file or folder .*gone.txt"),
        ("nothing", r"holds no files that can be read here: put .txt"),
    ],
)
def test_local_failures_are_sentences(tmp_path, case, sentence):
    source = failing(tmp_path, case)
    with pytest.raises(TextError, match=sentence):
        use(source)


@pytest.mark.parametrize(
    ("field", "value"), [("packing", "tight"), ("context", 1), ("held_out", 1.0), ("seed", -1), ("dataset", "")]
)
def test_settings_that_cannot_be_are_refused(field, value):
    with pytest.raises(UsageError, match="--" + field.replace("_", "-")):
        TextSource(**{field: value})


# --- the hub, as huggingface_hub and datasets answer
# ---------------------------------------------------------------------

SHA, CONVERTED = "a" * 40, "c" * 40


class Stream:
    column_names = ("text", "url")

    def __init__(self, rows):
        self.rows = rows

    def shuffle(self, *, seed, buffer_size):
        assert buffer_size >= 1000
        return Stream(self.rows[seed:] + self.rows[:seed])

    def __iter__(self):
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves TEXTS; what was asked of it is in ``asked``, what it refuses in ``fails``."""
    import datasets
    import huggingface_hub

    state = SimpleNamespace(asked=[], fails={}, converted=["plain_text/partial-train/0000.parquet", ".gitattributes"])

    def dataset_info(self, name, revision=None, **_):
        if "info" in state.fails:
            raise state.fails["info"]
        if "branch" in state.fails and revision == "refs/convert/parquet":
            raise state.fails["branch"]
        if revision in ("refs/convert/parquet", CONVERTED):
            return SimpleNamespace(sha=CONVERTED, siblings=[SimpleNamespace(rfilename=f) for f in state.converted])
        return SimpleNamespace(
            sha=SHA, siblings=[SimpleNamespace(rfilename=f) for f in ("README.md", "data/train-0.parquet")]
        )

    def load_dataset(path, name=None, **options):
        state.asked.append((path, name, options))
        if path != "parquet" and "load" in state.fails:
            raise state.fails["load"]
        return Stream([{"text": text, "url": ""} for text in TEXTS])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


def test_a_hub_dataset_is_streamed_at_its_commit(hub, tiny_gemma2):
    source = TextSource("someone/prose:small", seed=2)
    documents = open_documents(source)
    [(path, name, options)] = hub.asked
    assert (path, name) == ("someone/prose", "small")
    assert options == {"split": "train", "streaming": True, "revision": SHA}
    assert list(documents.read(4)) == [(4, TEXTS[0]), (5, TEXTS[1])]
    identity = resolve_text(source, outline_model(ModelSource(str(tiny_gemma2))), documents)
    assert (identity.dataset, identity.revision, identity.fingerprint) == ("someone/prose:small", SHA, f"commit:{SHA}")


@pytest.mark.parametrize(
    "refusal",
    [
        RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py"),
        ValueError("The repository requires you to execute the dataset script in that repo, so pass trust_remote_code"),
    ],
)
def test_a_dataset_that_is_a_script_is_read_from_its_conversion(hub, refusal):
    hub.fails["load"] = refusal
    documents = open_documents(TextSource("Skylion007/openwebtext"))
    assert documents.revision == CONVERTED
    path, _, options = hub.asked[-1]
    assert path == "parquet"
    assert options["data_files"] == [
        f"hf://datasets/Skylion007/openwebtext@{CONVERTED}/plain_text/partial-train/0000.parquet"
    ]
    assert [text for _, text in documents.read(0)] == TEXTS
    # Resumed, the recorded commit is that of the conversion: it is recognised and read the same way.
    again = open_documents(TextSource("Skylion007/openwebtext", revision=CONVERTED))
    assert hub.asked[-1] == (path, None, options)
    assert again.revision == CONVERTED


def refused(kind):
    """An error of huggingface_hub, without the HTTP response it usually carries (whose package changed its name)."""
    from huggingface_hub import errors

    error = getattr(errors, kind)
    return error.__new__(error, "403 Client Error")


@pytest.mark.parametrize(
    ("source", "fails", "sentence"),
    [
        ({"text_column": "body"}, {}, r"has no column 'body': its columns are text, url"),
        (
            {"split": "dev"},
            {"load": ValueError('Bad split: dev. Available splits: ["train"]')},
            r"as split 'dev' \(Bad split: .*\): choose with --split",
        ),
        (
            {},
            {
                "load": ValueError(
                    "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample"
                )
            },
            r"among the available configs: \['a', 'b'\]\): choose .*, or a subset with --dataset a/b:SUBSET",
        ),
        (
            {},
            {"load": DataFilesNotFoundError("No (supported) data files found in a/b")},
            r"data files found in a/b\): choose",
        ),
        ({}, {"load": RuntimeError("script"), "branch": "RevisionNotFoundError"}, r"no conversion of it: download it"),
        ({}, {"info": ConnectionError("Name or service not known")}, r"hub cannot be reached .* pass a folder"),
        (
            {},
            {"info": "GatedRepoError"},
            r"dataset a/b is gated .* accept its licence at .*/datasets/a/b, .*hf auth login",
        ),
        ({}, {"info": "RepositoryNotFoundError"}, r"there is no dataset 'a/b': no such folder or file here"),
        ({}, {"info": "RevisionNotFoundError"}, r"not in that revision"),
        (
            {},
            {"load": RuntimeError("Dataset scripts are no longer supported"), "converted": []},
            r"no conversion of it",
        ),
        ({"split": "x"}, {"load": RuntimeError("script")}, r"has no split 'x': it has partial-train"),
        (
            {"dataset": "a/b:c"},
            {"load": RuntimeError("script")},
            r"has the subsets plain_text: write --dataset a/b:SUBSET",
        ),
    ],
)
def test_hub_failures_are_sentences(hub, source, fails, sentence):
    hub.converted = fails.pop("converted", hub.converted)
    hub.fails = {k: refused(v) if isinstance(v, str) else v for k, v in fails.items()}
    with pytest.raises(TextError, match=sentence):
        open_documents(TextSource(**{"dataset": "a/b", **source}))


def test_a_stream_that_breaks_off_is_a_sentence(hub, monkeypatch):
    def broken(self):
        yield {"text": TEXTS[0]}
        raise ConnectionError("reset")

    monkeypatch.setattr(Stream, "__iter__", broken)
    with pytest.raises(TextError, match="the hub cannot be reached"):
        list(open_documents(TextSource("a/b")).read(0))
