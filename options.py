"""What a command is asked by name: options in a typed dictionary, the same from the command line and from Python."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import UsageError


def chosen(options: Mapping[str, Any], kind: type, command: str) -> dict[str, Any]:
    """The options that say something, neither None nor an empty list; paths as text.

    Args:
        options: by name, as written.
        kind: the TypedDict that says which there are.
        command: whose options they are, as the sentence says it.

    Raises:
        UsageError: there is no option of that name.

    """
    for name in options:
        if name not in kind.__annotations__:
            close = difflib.get_close_matches(name, kind.__annotations__, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"choose among {', '.join(kind.__annotations__)}"
            raise UsageError(f"{command} has no option '{name}': {remedy}")
    plain = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in options.items()}
    return {name: value for name, value in plain.items() if value is not None and not _says_nothing(value)}


def several(value: Any) -> tuple[Any, ...]:
    """A list from a list or from its only member; paths as text."""
    members = [value] if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable) else value
    return tuple(os.fspath(one) if isinstance(one, os.PathLike) else one for one in members)


def fields(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The given options among ``names`` (option → field) under their fields' names."""
    return {field: given[option] for option, field in names.items() if option in given}


def _says_nothing(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 0
