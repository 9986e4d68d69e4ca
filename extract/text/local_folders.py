"""What a local path holds: which files, of which split; or a dataset that ``save_to_disk`` wrote.

A folder is read in one of four ways, the first that fits:

1. ``dataset_dict.json`` or ``state.json`` is there: ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote it.
2. ``README.md`` declares ``configs`` (a clone of a hub dataset): the package datasets says which files they mean.
3. Every file belongs to a split by its name: ``train/…``, ``test.jsonl``, ``data/train-00000-of-00002.parquet``.
4. All files that can be read are the split ``train``.

Links are followed, to files and to folders; what is hidden is left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...errors import TextError, needs
from ..model.hub import first_line

FORMATS = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_NO_TEXT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_SPLITS = "train|training|test|testing|validation|valid|val|dev|eval|evaluation"
_SPLIT_OF = re.compile(
    rf"^(?:data/)?(?:(?P<folder>{_SPLITS})/.|(?P<stem>{_SPLITS})\.[^/]+$|(?P<part>[^/]+)-\d{{5}}-of-\d{{5}}\.[^/]+$)"
)
_SAME = {"training": "train", "testing": "test", "valid": "validation", "val": "validation", "dev": "validation"}
_SAME |= {"eval": "validation", "evaluation": "validation"}


@dataclass(frozen=True)
class Found:
    """The files of one split, and their table if the package datasets opened them already."""

    files: list[Path]
    folder: Path
    kind: str
    table: Any = None


def format_of(path: Path) -> str | None:
    """``text``, or the format's name in the package datasets; None if the file cannot be read."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return FORMATS.get(Path(name).suffix)


def find(root: Path, split: str, subset: str = "") -> Found:
    """What is at ``root``.

    Raises:
        TextError: no such split or subset, nothing that can be read, or files of two formats.

    """
    if root.is_file():
        if format_of(root) is None:
            raise TextError(
                f"{root} is not text that can be read here: use one of {' '.join(FORMATS)} (also compressed)"
            )
        _check_split(root, split, ["train"])
        files, folder = [root], root.parent
    elif (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _saved(root, split, subset)
    elif _declares_configs(root):
        return _declared(root, split, subset)
    else:
        files, folder = _in_folder(root, split), root
    if subset:
        raise TextError(f"{root} declares no subsets in a README.md; you asked for ':{subset}': leave it out")
    kinds = sorted({str(format_of(p)) for p in files})
    if len(kinds) > 1:
        raise TextError(f"{root} mixes {' and '.join(kinds)} files: keep one format to a folder, or name a single file")
    for path in files:
        _check_no_pointer(path)
        if path.suffix.lower() == ".zst":
            needs("zstandard", extra="extract", what=f"{path.name}, which is compressed with Zstandard,")
    return Found(files, folder, kinds[0])


def _check_split(where: Path, split: str, splits: list[str]) -> None:
    if split not in splits:
        if splits == ["train"]:
            raise TextError(f"{where} is on this machine and has only the split 'train'; you asked for '{split}'")
        raise TextError(f"{where} has the splits {', '.join(splits)}; you asked for '{split}': choose with --split")


def _in_folder(root: Path, split: str) -> list[Path]:
    files = sorted((p for p in _walk(root) if format_of(p)), key=lambda p: p.relative_to(root).as_posix())
    if not files:
        endings = " ".join(FORMATS)
        raise TextError(f"{root} holds no files that can be read here: put {endings} files there (also compressed)")
    of = [_split_of(p.relative_to(root).as_posix()) for p in files]
    if None in of:
        of = ["train"] * len(files)
    _check_split(root, split, sorted({str(name) for name in of}))
    return [path for path, its in zip(files, of, strict=True) if its == split]


def _split_of(name: str) -> str | None:
    """The split that a file's relative name tells, None if it tells none."""
    if (found := _SPLIT_OF.match(name)) is None:
        return None
    split = found["folder"] or found["stem"] or found["part"]
    return _SAME.get(split, split)


def _walk(root: Path) -> Iterator[Path]:
    """All files below ``root`` that are not hidden, through links, every folder once."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and name not in _NO_TEXT and path.is_file():
                yield path


def _check_no_pointer(path: Path) -> None:
    """Git without its extension for large files leaves three lines of text in the place of each."""
    if path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise TextError(f"{path} is not there yet, git cloned only a pointer to it: run `git lfs pull` in its folder")


def _saved(root: Path, split: str, subset: str) -> Found:
    needs("datasets", extra="extract", what="a folder that save_to_disk wrote")
    from datasets import load_from_disk

    if subset:
        raise TextError(f"{root} was written by save_to_disk, which knows no subsets: leave ':{subset}' out")
    folder = root
    try:
        if (root / "dataset_dict.json").is_file():
            splits = sorted(json.loads((root / "dataset_dict.json").read_text())["splits"])
            _check_split(root, split, splits)
            folder = root / split
        else:
            info = json.loads((root / "state.json").read_text())
            _check_split(root, split, sorted({info.get("_split") or "train", "train"}))
        table = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, FileNotFoundError) as wrong:
        raise TextError(f"{root} cannot be read as a folder of save_to_disk: {first_line(wrong)}") from wrong
    return Found(sorted(folder.glob("*.arrow")), folder, "arrow", table)


def _declares_configs(root: Path) -> bool:
    """Whether the front matter of README.md, between two lines of ``---``, has ``configs``."""
    card = root / "README.md"
    if not card.is_file():
        return False
    parts = re.split(r"^---\s*$", card.read_text(encoding="utf-8", errors="replace"), maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return False
    try:
        facts = yaml.safe_load(parts[1])
    except yaml.YAMLError as wrong:
        raise TextError(f"the front matter of {card} is no YAML: {first_line(wrong)}") from None
    return isinstance(facts, dict) and bool(facts.get("configs"))


def _declared(root: Path, split: str, subset: str) -> Found:
    needs("datasets", extra="extract", what="a clone of a dataset")
    from datasets import disable_progress_bars, load_dataset_builder
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError

    disable_progress_bars()
    try:
        builder = load_dataset_builder(str(root), subset or None)
        files = {str(name): [Path(p) for p in paths] for name, paths in (builder.config.data_files or {}).items()}
        _check_split(root, split, sorted(files))
        for path in files[split]:
            _check_no_pointer(path)
        kind = str(format_of(files[split][0]))
        if kind == "text":  # datasets would make a document of every line
            return Found(files[split], root, kind)
        builder.download_and_prepare()
        return Found(files[split], root, kind, builder.as_dataset(split=split))
    except DatasetGenerationError as wrong:
        raise TextError(f"{root} cannot be read: {first_line(wrong.__cause__ or wrong)}") from wrong
    except (OSError, ValueError, RuntimeError, ImportError, DataFilesNotFoundError, EmptyDatasetError) as wrong:
        said = " ".join(str(wrong).splitlines()[:2])
        raise TextError(
            f"{root} cannot be read as its README.md says ({said}): choose with --dataset {root}:SUBSET"
        ) from wrong
