"""A dataset of the Hugging Face hub, read as a stream, pinned to one commit and shuffled through a buffer.

A dataset that needs a loading script is read from the hub's automatic conversion to Parquet instead.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ...errors import TextError, needs
from ..config import TextSource
from ..model.hub import hub_failures
from .documents import Content, column_of, content_of, label_of, names_of, text_of

SHUFFLE_BUFFER = 10_000  # documents in the buffer from which the next one is drawn at random


@dataclass
class StreamedDocuments:
    """A hub dataset read as a stream, pinned to one commit."""

    stream: Any
    name: str
    column: str
    revision: str | None
    label_column: str | None = None
    chat: bool = False
    _numbers: dict[str | None, int] = field(default_factory=lambda: {None: 0})  # label → its number
    _labels: array[int] = field(default_factory=lambda: array("i"))  # those numbers, from document _first on
    _first: int = 0

    @property
    def fingerprint(self) -> str:
        """The commit, which identifies the content."""
        return f"commit:{self.revision}"

    def read(self, start: int) -> Iterator[tuple[int, Content]]:
        """See :class:`Documents`.

        Documents before ``start`` are read and skipped, since the state of the shuffle buffer depends on them.
        """
        self._first, self._labels = start, array("i")
        with hub_failures("dataset", self.name, TextError):
            for number, example in islice(enumerate(self.stream), start, None):
                if self.label_column is not None:
                    label = label_of(example, self.label_column, self.name, names_of(self.stream, self.label_column))
                    self._labels.append(self._numbers.setdefault(label, len(self._numbers)))
                yield number, content_of(example, self.column, self.name, chat=self.chat)

    def label(self, number: int) -> str | None:
        """See :class:`Documents`."""
        if self.label_column is None:
            return None
        return list(self._numbers)[self._labels[number - self._first]]


def open_stream(source: TextSource) -> StreamedDocuments:
    """The documents of a hub dataset, as a stream.

    Raises:
        TextError: there is no such dataset, subset, split or column, it is gated, or the hub cannot be reached.

    """
    needs("datasets", extra="extract", what="a dataset of the hub")
    from datasets import disable_progress_bars
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    disable_progress_bars()
    name, _, subset = source.dataset.partition(":")
    with hub_failures("dataset", name, TextError):
        revision, files = _at_commit(name, source.revision)
        converted = _converted(files, subset, source.split, name)
        try:
            stream = _parquet(name, revision, converted) if converted else _declared(name, subset, source, revision)
        except (RuntimeError, ValueError, DataFilesNotFoundError, EmptyDatasetError) as problem:
            # A repository with a loading script raises RuntimeError since datasets 4, and before ValueError, since we
            # do not trust remote code.
            if "script" not in str(problem):
                said = " ".join(str(problem).splitlines()[:2])  # the second line lists the subsets to choose from
                remedy = f"choose with --split, or a subset with --dataset {name}:SUBSET"
                raise TextError(
                    f"{source.dataset} cannot be read as split '{source.split}' ({said}): {remedy}"
                ) from problem
            revision, files = _conversion(name)
            stream = _parquet(name, revision, _converted(files, subset, source.split, name))
    column = source.text_column
    if (columns := getattr(stream, "column_names", None)) is not None:
        column = column_of(source, columns)
        text_of(dict.fromkeys(columns), column, source.dataset)
        label_of(dict.fromkeys(columns), source.label_column, source.dataset)
    shuffled = stream.shuffle(seed=source.seed, buffer_size=SHUFFLE_BUFFER)
    return StreamedDocuments(shuffled, source.dataset, column, revision, source.label_column, source.chat_template)


def _at_commit(name: str, revision: str | None) -> tuple[str, list[str]]:
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(name, revision=revision, timeout=10)
    return str(info.sha), [file.rfilename for file in info.siblings or []]


def _conversion(name: str) -> tuple[str, list[str]]:
    """Commit and files of the branch with the hub's automatic conversion; no files if there is none."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return _at_commit(name, "refs/convert/parquet")
    except RevisionNotFoundError:
        return "", []


def _declared(name: str, subset: str, source: TextSource, revision: str) -> Any:
    from datasets import load_dataset

    return load_dataset(name, subset or None, split=source.split, streaming=True, revision=revision)


def _converted(files: list[str], subset: str, split: str, name: str) -> list[str]:
    """The Parquet files of one split in the hub's automatic conversion; empty if ``files`` are not such a conversion.

    That branch holds only files ``SUBSET/SPLIT/0000.parquet`` …; large splits are shortened and named
    ``partial-SPLIT``.

    Raises:
        TextError: it is a conversion without that subset or split.

    """
    parts = [file.split("/") for file in files if not file.startswith(".")]
    if not parts or not all(len(p) == 3 and p[2].removesuffix(".parquet").isdigit() for p in parts):
        return []
    subsets = sorted({p[0] for p in parts})
    if subset not in subsets and (subset or len(subsets) > 1):
        raise TextError(f"{name} has the subsets {', '.join(subsets)}: write --dataset {name}:SUBSET with one of them")
    chosen = subset or subsets[0]
    splits = sorted({p[1] for p in parts if p[0] == chosen})
    found = sorted("/".join(p) for p in parts if p[0] == chosen and p[1] in (split, f"partial-{split}"))
    if not found:
        raise TextError(f"{name} has no split '{split}': it has {', '.join(splits)}; choose with --split")
    return found


def _parquet(name: str, revision: str, files: list[str]) -> Any:
    from datasets import load_dataset

    if not files:
        raise TextError(
            f"{name} needs a loading script and the hub offers no conversion of it: download it and pass the files"
        )
    urls = [f"hf://datasets/{name}@{revision}/{file}" for file in files]
    return load_dataset("parquet", data_files=urls, split="train", streaming=True)
