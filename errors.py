"""The failures a user can cause: one clear sentence each, naming both sides and the remedy.

Anything else that escapes is a bug and shows a traceback. ``pipeline.main`` turns a :class:`TcsaeError` into its
sentence and its exit status; ``--debug`` shows where it came from.
"""

from __future__ import annotations

import importlib.util


def printable(text: str) -> str:
    """The same on one line, what cannot be printed written out as numbers: names come from files of anyone."""
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


class TcsaeError(Exception):
    """A failure with a sentence for the user, on one line whatever it quotes. Exit status 1."""

    exit_code = 1

    def __init__(self, sentence: object = ""):
        super().__init__(printable(str(sentence)))


class UsageError(TcsaeError):
    """The command line or a configuration asks for something that cannot be. Exit status 2."""

    exit_code = 2


class StoreError(TcsaeError):
    """An activation store is missing, unfinished, damaged, locked, or not the one that was expected."""


class StaleRunError(StoreError):
    """The run that this process writes for no longer holds the store."""


class ModelError(TcsaeError):
    """A language model cannot be had, or does not have what was asked of it."""


class TextError(TcsaeError):
    """A dataset or text file is missing, empty, or lacks the column that was named."""


class ArrayError(TcsaeError):
    """A file of vectors is missing, cannot be read, or holds none that a store can be made of."""


class RunError(TcsaeError):
    """A training run is missing, unfinished, diverged, or does not fit what it is used with."""


class NoLanguageModelError(TcsaeError):
    """Something was asked that only a language model can answer, and there is none."""


class ResourceError(TcsaeError):
    """Disk or memory does not suffice for the plan."""


class MissingPackageError(TcsaeError):
    """What was asked for needs a package of an extra that is not installed."""


def needs(*packages: str, extra: str, what: str) -> None:
    """Check that optional packages are there, before the work that needs them begins.

    Args:
        packages: names to import.
        extra: which of pyproject.toml's extras installs them.
        what: what needs them, as the sentence begins.

    Raises:
        MissingPackageError: one is not installed.

    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"{what} needs {package}, which is not installed: pip install 'tcsae[{extra}]'")
