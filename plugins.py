"""Plug-ins: Python files of the user that register temporal terms, architectures, partners, metrics, panels and more.

A plug-in is code and is run. It is loaded only when it is named on the command line or in a call, never because a run
folder mentions it; what a run folder keeps is the hash of the file, so that another file under its name is noticed.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from .errors import RunError, TcsaeError, UsageError
from .registry import Registry
from .system.untrusted_files import read_bytes

_loaded: dict[str, str] = {}  # resolved path → hash of what was loaded from it


def load_plugins(files: Iterable[str | Path]) -> dict[str, str]:
    """Run every plug-in file that is not loaded yet (or has changed since), in order.

    Returns:
        Name of each file → SHA-256 of its bytes: what a record keeps.

    Raises:
        UsageError: a file cannot be read or run, two files have one name, or a name is registered twice.

    """
    hashes: dict[str, str] = {}
    for file in map(Path, files):
        try:
            source = read_bytes(
                file, most=1 << 24, missing=f"there is no plug-in {file}", remedy="name a Python file with --plugin"
            )
        except RunError as failure:
            raise UsageError(f"{failure}") from failure
        digest = hashlib.sha256(source).hexdigest()
        if hashes.setdefault(file.name, digest) != digest:
            raise UsageError(f"two different plug-ins are called {file.name}: rename one of them")
        key = str(file.resolve())
        if _loaded.get(key) != digest:
            forget_plugin(file)
            _run(file, key, digest)
            _loaded[key] = digest
    return hashes


def forget_plugin(file: str | Path) -> None:
    """Undo :func:`load_plugins` of one file: nothing that it registered is known any more."""
    key = str(Path(file).resolve())
    Registry.forget_plugin(key)
    _loaded.pop(key, None)


def changed_plugin(recorded: Mapping[str, str], given: Mapping[str, str]) -> str | None:
    """What differs between the plug-ins of a record and those given now, as words; None where nothing does."""
    for name, digest in recorded.items():
        if name not in given:
            return f"it was begun with the plug-in {name}, which was not given: add --plugin {name}"
        if given[name] != digest:
            hashes = f"SHA-256 {digest[:12]}… then, {given[name][:12]}… now"
            return f"the plug-in {name} has changed since it was begun ({hashes})"
    more = next((name for name in given if name not in recorded), None)
    return None if more is None else f"it was begun without the plug-in {more}"


@contextmanager
def plugin_at_work(registry: Registry[Any], name: str) -> Iterator[None]:
    """Run what is registered under ``name``: where a plug-in registered it, its own errors become one sentence.

    Raises:
        UsageError: the plug-in's code failed; the sentence names it, the file and the line.

    """
    owner = registry.owner(name)
    try:
        yield
    except TcsaeError:
        raise
    except Exception as failure:
        if owner is None:
            raise
        reason = _where(failure, Path(owner))
        raise UsageError(f"the {registry.kind} '{name}' of the plug-in {Path(owner).name} fails: {reason}") from failure


def _run(file: Path, key: str, digest: str) -> None:
    name = f"tcsae_plugin_{digest[:16]}"
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"the plug-in {file} is no Python file: its name must end in .py")
    module = module_from_spec(spec)
    before, Registry._plugin = Registry._plugin, key
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException as failure:
        Registry.forget_plugin(key)
        del sys.modules[name]
        if isinstance(failure, TcsaeError):
            raise UsageError(f"the plug-in {file}: {failure}") from failure
        if isinstance(failure, Exception):
            raise UsageError(f"the plug-in {file} does not run: {_where(failure, file)}") from failure
        raise
    finally:
        Registry._plugin = before


def _where(failure: Exception, file: Path) -> str:
    """Kind, message and, where it is known, the line of the file."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(failure.__traceback__)
        if Path(frame.filename).resolve() == file.resolve()
    ]
    line = failure.lineno if isinstance(failure, SyntaxError) else (lines[-1] if lines else None)
    words = failure.msg if isinstance(failure, SyntaxError) else str(failure)
    return f"{type(failure).__name__}{f' in line {line}' if line else ''}: {words}"
