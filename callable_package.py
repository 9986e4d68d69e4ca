"""Packages that can be called: ``tcsae.train`` is the package of stage two, and ``tcsae.train(…)`` runs it.

Importing ``tcsae.train.config`` puts the package under the name ``train`` into ``tcsae``, where the function of the
same name is wanted too. One object that is both spares users a second name.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        """The function, found on first use; help() and inspect.signature() look here."""
        return getattr(import_module(".interface", __package__), self.__name__.rpartition(".")[2])


def make_callable(package: str) -> None:
    """Let the imported ``package`` be called as the function of :mod:`tcsae.interface` that has its name."""
    sys.modules[package].__class__ = _CallablePackage
