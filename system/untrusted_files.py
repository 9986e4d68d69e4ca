"""Files and names from others, or that may be damaged: taken within bounds, or refused in one sentence.

Opening a FIFO would wait for ever and a device never ends, so only regular files are opened; JSON nested without end,
numbers beyond 64 bits or not finite, and files larger than anything meaningful are refused before they cost anything.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import RunError, UsageError, printable

MOST_JSON = 1 << 28  # bytes; reports of many SAEs are the largest JSON files there are
_LONGEST_NAME = 200  # bytes; file systems take 255, and names inside are made of it
DEEPEST_JSON = 64  # no file of ours or of any format read here comes near


class IrregularFileError(ValueError):
    """A folder, FIFO, device or socket in place of a file; its text says which."""


def regular_descriptor(path: str | Path) -> int:
    """A descriptor of a regular file, for reading. Opening a FIFO would wait for ever; this does not wait.

    Raises:
        OSError: there is none, or it may not be read.
        IrregularFileError: it is something else.

    """
    # O_NONBLOCK: a FIFO without a writer is opened at once, to be refused; it changes nothing for regular files.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    raise IrregularFileError(_kind(mode))


def open_regular(path: str | Path, *, missing: str | None = None, remedy: str = "name another file") -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: the file.
        missing: the sentence where there is none.
        remedy: what to do where it cannot be read, as the end of the sentence.

    Raises:
        RunError: nothing there, it is no regular file, or it may not be read.

    """
    try:
        return os.fdopen(regular_descriptor(path), "rb")
    except IrregularFileError as other:
        raise RunError(f"{shown(path)} is {other} and no regular file: {remedy}") from None
    except FileNotFoundError:
        raise RunError(missing or f"{shown(path)} is missing") from None
    except (OSError, ValueError) as failure:
        raise RunError(f"{shown(path)} cannot be read ({reason(failure)}): {remedy}") from failure


def read_bytes(path: str | Path, *, most: int, missing: str | None = None, remedy: str = "name another file") -> bytes:
    """The contents of a regular file of at most ``most`` bytes.

    Raises:
        RunError: as :func:`open_regular`, or it is larger.

    """
    with open_regular(path, missing=missing, remedy=remedy) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            sizes = f"has {size:,} bytes, more than the {most:,} that such a file may have"
            raise RunError(f"{shown(path)} {sizes}: {remedy}")
        try:
            return file.read(most)
        except OSError as failure:
            raise RunError(f"{shown(path)} cannot be read ({reason(failure)}): {remedy}") from failure


def read_json(
    path: str | Path, *, most: int = MOST_JSON, missing: str | None = None, remedy: str = "name another file"
) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        RunError: as :func:`read_bytes`; it is no JSON object, is nested too deeply, or holds a number that is not
            finite or has more than 64 bits.

    """
    raw = read_bytes(path, most=most, missing=missing, remedy=remedy)
    try:
        found = parse_json(raw)
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
    except ValueError as failure:
        raise RunError(f"{shown(path)} cannot be read ({reason(failure)}): {remedy}") from failure
    return found


def parse_json(raw: bytes) -> Any:
    """JSON from elsewhere, as UTF-8.

    Raises:
        ValueError: it is none, is nested too deeply, or holds a number that is not finite or has more than 64 bits.

    """
    try:
        found = json.loads(raw.decode(), parse_int=_integer, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if isinstance(found, dict | list):
        _check_depth(found)
    return found


def shown(value: object, most: int = 100) -> str:
    """A name or value from outside as part of a sentence: one line, printable, cut where it is very long."""
    words = printable(str(value))
    return words if len(words) <= most else f"{words[: most // 2]}…{words[-most // 2 :]}"


def markdown(words: object) -> str:
    """Words from elsewhere on one line of Markdown, so that they are shown and not understood."""
    return re.sub(r"([\\`*\[\]<>#!|~$&])", r"\\\1", shown(words, 300))


def folder_name(name: str, option: str) -> str:
    """``name``, if one folder can be called so: what is made of it stays inside the folder it is meant for.

    Raises:
        UsageError: it has a separator or control characters in it, is ``.`` or ``..``, or is too long.

    """
    if name in (".", "..") or "/" in name or os.sep in name or not name.isprintable():
        raise UsageError(f"{option} {shown(name)} is no name of a folder: '/' and '..' belong into --out")
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise UsageError(f"{option} {shown(name)} is too long for a folder: give at most {_LONGEST_NAME} characters")
    return name


def seed_number(seed: int, option: str = "--seed") -> int:
    """``seed``, if every generator takes it.

    Raises:
        UsageError: it is negative or has more than 63 bits.

    """
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"{option} {shown(seed, 24)} is no seed: use a number from 0 to 2^63 − 1")
    return seed


def reason(failure: BaseException) -> str:
    """The first line of an exception's message, or its kind; of an OSError what the system said."""
    said = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure).strip()
    return shown(said.splitlines()[0], 200) if said else type(failure).__name__


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= 20 else 1 << 64
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"the number {shown(digits, 24)} does not fit into 64 bits")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(digits, 24)} is not finite")
    return value


def _check_depth(found: dict[str, Any] | list[Any]) -> None:
    level: list[Any] = [found]
    for _ in range(DEEPEST_JSON):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    return next((name for test, name in kinds.items() if test(mode)), "a device")
