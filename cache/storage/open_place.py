"""From a path or URL to the object that accesses it."""

from __future__ import annotations

from pathlib import Path

from .local import LocalPlace
from .places import Place


def place_of(path: str | Path) -> Place:
    """The place of a path or URL. Plain paths and ``file://`` URLs are local.

    Raises:
        StoreError: the URL's protocol needs a package that is not installed, or is unknown.

    """
    text = str(path)
    if "://" not in text:
        return LocalPlace(text)
    if text.startswith(("file://", "local://")):
        return LocalPlace(text.split("://", 1)[1])
    from .remote import RemotePlace  # fsspec is needed only here

    return RemotePlace(text)
