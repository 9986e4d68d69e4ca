"""Text in local files: ``.txt`` (one document each), or tables (.jsonl .json .csv .tsv .parquet), also compressed."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import xxhash

from ...errors import TextError, needs
from ..config import TextSource
from ..model.files import hash_file
from ..model.hub import first_line
from .documents import LARGE, LargeText, file_pieces, label_of, shuffled, text_hash, text_of

_FORMATS = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


def looks_local(dataset: str) -> bool:
    """Whether ``dataset`` is a path: it exists, or it cannot be the id of a hub dataset."""
    return (
        local_path(dataset) is not None
        or dataset[0] in "./~"
        or dataset.count("/") > 1
        or format_of(Path(dataset)) is not None
    )


def local_path(dataset: str) -> Path | None:
    """The absolute path of ``dataset`` if there is such a file or folder, else None."""
    path = Path(dataset).expanduser()
    return path.resolve() if path.exists() else None


def format_of(path: Path) -> str | None:
    """``text``, or the format's name in the package datasets; None if the file cannot be read."""
    name = path.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return _FORMATS.get(Path(name).suffix)


def open_local(where: str | Path, source: TextSource) -> LocalText | LocalTable:
    """The documents of a file or folder.

    Raises:
        TextError: the path does not exist, it holds no readable file, files of two formats or no text, or there is no
            such column or split.

    """
    if source.split != "train":
        raise TextError(f"{where} is on this machine and has only the split 'train'; you asked for '{source.split}'")
    files, folder = _files(where)
    kind = format_of(files[0])
    if kind == "text" and source.label_column is not None:
        raise TextError(
            f"{where} holds text files, which have no column '{source.label_column}': put those of each label in a "
            "folder of their own, and leave --label-column out"
        )
    documents = LocalText(files, folder, source.seed) if kind == "text" else _table(str(kind), files, folder, source)
    if len(documents) == 0:
        raise TextError(f"{where} holds no text: every file in it is empty")
    return documents


def _files(where: str | Path) -> tuple[list[Path], Path]:
    root = local_path(str(where))
    if root is None:
        raise TextError(f"there is no file or folder {where}: give a path that exists, or a dataset on the hub")
    endings = " ".join(_FORMATS)
    if root.is_file():
        if format_of(root) is None:
            raise TextError(f"{root} is not text that can be read here: use one of {endings} (also compressed)")
        return [root], root.parent
    hidden = (
        p
        for p in root.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
    )
    files = sorted((p for p in hidden if format_of(p)), key=lambda p: p.relative_to(root).as_posix())
    if not files:
        raise TextError(f"{root} holds no files that can be read here: put {endings} files there (also compressed)")
    kinds = sorted({str(format_of(p)) for p in files})
    if len(kinds) > 1:
        raise TextError(f"{root} mixes {' and '.join(kinds)} files: keep one format to a folder, or name a single file")
    return files, root


def _fingerprint(files: Sequence[Path], root: Path) -> str:
    digest = xxhash.xxh3_128()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode())
        hash_file(digest, path)
    return digest.hexdigest()


@dataclass
class LocalText:
    """Text files, one document each. Where they lie in two folders or more, the first one's name is their label."""

    files: Sequence[Path]
    folder: Path
    seed: int

    def __post_init__(self):
        self.files = [path for path in self.files if path.stat().st_size]
        parts = [path.relative_to(self.folder).parts for path in self.files]
        folders = [part[0] if len(part) > 1 else None for part in parts]
        self._labels = folders if None not in folders and len(set(folders)) > 1 else [None] * len(folders)
        self._order = shuffled(len(self.files), self.seed)
        self._large: dict[int, LargeText] = {}

    @property
    def revision(self) -> None:
        """None, since local files have no commit."""

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """Hash of all names and contents. All files are checked to be UTF-8 here, before anything is extracted."""
        for number in range(len(self.files)):
            if isinstance(text := self._text(number), LargeText):
                text_hash(text)  # reads all of it
        return _fingerprint(self.files, self.folder)

    def read(self, start: int) -> Iterator[tuple[int, str | LargeText]]:
        """See :class:`tcsae.extract.text.documents.Documents`."""
        for number in range(start, len(self._order)):
            yield number, self._text(self._order[number])

    def _text(self, file: int) -> str | LargeText:
        """The text of one file. What is known of a large one is kept: its hash takes a while."""
        text = self._large.get(file) or _read_text(self.files[file])
        if isinstance(text, LargeText):
            self._large[file] = text
        return text

    def label(self, number: int) -> str | None:
        """See :class:`tcsae.extract.text.documents.Documents`."""
        return self._labels[self._order[number]]


def _read_text(path: Path) -> str | LargeText:
    """The text of a file; what is longer than LARGE stays on the disk until it is read."""
    with _failures(path), _open_text(path) as file:
        text = file.read(LARGE + 1)
    return text if len(text) <= LARGE else LargeText(str(path), lambda: _pieces(path))


def _pieces(path: Path) -> Iterator[str]:
    with _failures(path):
        yield from file_pieces(_open_text(path))


def _open_text(path: Path) -> Any:
    import fsspec

    found: Any = fsspec.open(str(path), "rt", encoding="utf-8", compression="infer")
    return found.open()


@contextmanager
def _failures(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:
        where = "" if path.suffix.lower() in _COMPRESSED else f" ({_first_wrong_byte(path)})"
        raise TextError(f"{path} is not UTF-8{where}: convert it, for instance with iconv -t utf-8") from None
    except (OSError, ValueError, ImportError, EOFError) as wrong:
        raise TextError(f"{path} cannot be read: {first_line(wrong)}") from wrong


def _first_wrong_byte(path: Path) -> str:
    """Where a file stops being UTF-8. The reader's own answer counts from the beginning of its buffer."""
    decoder, before = getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while part := file.read(1_000_000):
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(part)
            except UnicodeDecodeError as wrong:
                return f"byte {before - held + wrong.start}"
            before += len(part)
    return f"byte {before - len(decoder.getstate()[0])}"


@dataclass
class LocalTable:
    """Rows of JSON, CSV or Parquet files, memory-mapped by the package datasets."""

    table: Any
    files: Sequence[Path]
    folder: Path
    column: str
    seed: int
    label_column: str | None = None

    def __post_init__(self):
        self._order = shuffled(len(self.table), self.seed)

    @property
    def revision(self) -> None:
        """None, since local files have no commit."""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def fingerprint(self) -> str:
        """Hash of all names and contents."""
        return _fingerprint(self.files, self.folder)

    def read(self, start: int) -> Iterator[tuple[int, str | LargeText]]:
        """See :class:`tcsae.extract.text.documents.Documents`."""
        rows = self.table.with_format("arrow")
        for number in range(start, len(self._order)):
            row = int(self._order[number])
            cell = rows[row].column(self.column)[0]  # memory-mapped: a large text is not copied
            name = f"row {row} of {self.folder}"
            yield number, large_cell(cell, name) or text_of(self.table[row], self.column, str(self.folder))

    def label(self, number: int) -> str | None:
        """See :class:`tcsae.extract.text.documents.Documents`."""
        if self.label_column is None:
            return None
        return label_of(self.table[int(self._order[number])], self.label_column, str(self.folder))


def large_cell(cell: Any, name: str) -> LargeText | None:
    """A large text in a column of Arrow strings; None for anything else."""
    import pyarrow

    kind = cell.type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)) or not cell.is_valid:
        return None
    content = cell.as_buffer()
    if content.size <= LARGE:
        return None

    def pieces() -> Iterator[str]:
        return file_pieces(TextIOWrapper(pyarrow.BufferReader(content), encoding="utf-8", newline=""))

    return LargeText(name, pieces)


def _table(kind: str, files: Sequence[Path], folder: Path, source: TextSource) -> LocalTable:
    needs("datasets", extra="extract", what=f"text in {kind} files")
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetGenerationError

    disable_progress_bars()
    options: dict[str, Any] = {"sep": "\t"} if ".tsv" in "".join(files[0].suffixes).lower() else {}
    named = str(files[0]) if len(files) == 1 else str(folder)
    try:
        table = load_dataset(kind, data_files=[str(p) for p in files], split="train", **options)
    except (DatasetGenerationError, OSError, ValueError, ImportError, TypeError) as wrong:
        raise TextError(f"{named} cannot be read as {kind}: {first_line(wrong.__cause__ or wrong)}") from wrong
    columns = table.column_names
    empty = dict.fromkeys(columns or [])
    text_of(empty, source.text_column, named)
    label_of(empty, source.label_column, named)
    used = list(dict.fromkeys([source.text_column, source.label_column or source.text_column]))
    return LocalTable(table.select_columns(used), files, folder, source.text_column, source.seed, source.label_column)
