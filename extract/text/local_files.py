"""Text in local files: ``.txt`` (one document each), or tables (.jsonl .json .csv .tsv .parquet .arrow), also
compressed.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ...errors import TextError, needs
from ..config import TextSource
from ..model.files import hash_file
from ..model.hub import first_line
from .documents import (
    LARGE,
    Content,
    LargeText,
    column_of,
    content_of,
    file_pieces,
    label_of,
    names_of,
    shuffled,
    text_hash,
    text_of,
)
from .local_folders import COMPRESSED, Found, find, format_of


def looks_local(dataset: str) -> bool:
    """Whether ``dataset`` is a path: it exists, or it cannot be the id of a hub dataset."""
    return (
        local_path(dataset) is not None
        or dataset[0] in "./~"
        or dataset.count("/") > 1
        or format_of(Path(dataset)) is not None
    )


def local_path(dataset: str) -> Path | None:
    """The absolute path of ``dataset`` if there is such a file or folder, else None; a ``:SUBSET`` is left out."""
    return _local(dataset)[0]


def recorded_path(dataset: str) -> str | None:
    """The absolute path with the ``:SUBSET``, if any; None if there is no such file or folder."""
    path, subset = _local(dataset)
    return None if path is None else f"{path}:{subset}" if subset else str(path)


def _local(dataset: str) -> tuple[Path | None, str]:
    path = Path(dataset).expanduser()
    if path.exists():
        return path.resolve(), ""
    folder, _, subset = dataset.rpartition(":")
    if folder and (path := Path(folder).expanduser()).is_dir():
        return path.resolve(), subset
    return None, ""


def open_local(where: str | Path, source: TextSource) -> LocalText | LocalTable:
    """The documents of a file or folder.

    Raises:
        TextError: the path does not exist, it holds no readable file, files of two formats or no text, or there is no
            such column, split or subset.

    """
    root, subset = _local(str(where))
    if root is None:
        raise TextError(f"there is no file or folder {where}: give a path that exists, or a dataset on the hub")
    found = find(root, source.split, subset)
    if found.kind == "text" and source.label_column is not None:
        raise TextError(
            f"{where} holds text files, which have no column '{source.label_column}': put those of each label in a "
            "folder of their own, and leave --label-column out"
        )
    if found.kind == "text" and source.chat_template:
        raise TextError(
            f"{where} holds text files, and --chat-template is for rows of messages: give a .jsonl or table"
        )
    documents = LocalText(found.files, found.folder, source.seed) if found.kind == "text" else _table(found, source)
    if len(documents) == 0:
        raise TextError(f"{where} holds no text: every file in it is empty")
    return documents


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

    def read(self, start: int) -> Iterator[tuple[int, Content]]:
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
        where = "" if path.suffix.lower() in COMPRESSED else f" ({_first_wrong_byte(path)})"
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
    chat: bool = False

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

    def read(self, start: int) -> Iterator[tuple[int, Content]]:
        """See :class:`tcsae.extract.text.documents.Documents`."""
        rows = self.table.with_format("arrow")
        for number in range(start, len(self._order)):
            row = int(self._order[number])
            cell = rows[row].column(self.column)[0]  # memory-mapped: a large text is not copied
            content = None if self.chat else _memory_mapped(cell, f"row {row} of {self.folder}")
            if content is None:
                content = content_of(self.table[row], self.column, str(self.folder), chat=self.chat)
            yield number, content

    def label(self, number: int) -> str | None:
        """See :class:`tcsae.extract.text.documents.Documents`."""
        if self.label_column is None:
            return None
        row = self.table[int(self._order[number])]
        return label_of(row, self.label_column, str(self.folder), names_of(self.table, self.label_column))


def _memory_mapped(cell: Any, name: str) -> LargeText | np.ndarray | None:
    """A large text, or token ids, without making Python objects of them; None for anything else."""
    import pyarrow

    kind, is_a = cell.type, pyarrow.types
    if not cell.is_valid:
        return None
    if (is_a.is_list(kind) or is_a.is_large_list(kind)) and is_a.is_integer(kind.value_type):
        return cell.values.to_numpy(zero_copy_only=False).astype(np.int64)
    if not (is_a.is_string(kind) or is_a.is_large_string(kind)) or cell.as_buffer().size <= LARGE:
        return None
    content = cell.as_buffer()

    def pieces() -> Iterator[str]:
        return file_pieces(TextIOWrapper(pyarrow.BufferReader(content), encoding="utf-8", newline=""))

    return LargeText(name, pieces)


def _table(found: Found, source: TextSource) -> LocalTable:
    table = _loaded(found) if found.table is None else found.table
    files, folder = found.files, found.folder
    named = str(files[0]) if len(files) == 1 else str(folder)
    empty = dict.fromkeys(table.column_names or [])
    column = column_of(source, list(empty))
    text_of(empty, column, named)
    label_of(empty, source.label_column, named)
    used = list(dict.fromkeys([column, source.label_column or column]))
    return LocalTable(
        table.select_columns(used), files, folder, column, source.seed, source.label_column, source.chat_template
    )


def _loaded(found: Found) -> Any:
    needs("datasets", extra="extract", what=f"text in {found.kind} files")
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetGenerationError

    disable_progress_bars()
    files = found.files
    options: dict[str, Any] = {"sep": "\t"} if ".tsv" in "".join(files[0].suffixes).lower() else {}
    try:
        return load_dataset(found.kind, data_files=[str(p) for p in files], split="train", **options)
    except (DatasetGenerationError, OSError, ValueError, ImportError, TypeError) as wrong:
        named = str(files[0]) if len(files) == 1 else str(found.folder)
        raise TextError(f"{named} cannot be read as {found.kind}: {first_line(wrong.__cause__ or wrong)}") from wrong
