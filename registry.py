"""Every idea that has a name on the command line is registered under that name, by this program and by plug-ins alike.

Built-in ideas are listed with the module that registers them and imported on first use: names can be listed and checked
without importing torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named things of one kind.

    Args:
        kind: what they are, as messages say it ("temporal term").
        modules: built-in names → the module inside this package that registers them (``train.loss.terms``).

    """

    _all: list[Registry[Any]] = []  # noqa: RUF012 - every registry of the process, for `forget_plugin`
    _plugin: str | None = None  # the plug-in being loaded

    def __init__(self, kind: str, modules: Mapping[str, str] = {}):
        self.kind = kind
        self._modules = dict(modules)
        self._entries: dict[str, T] = {}
        self._owners: dict[str, str] = {}  # plug-in names → the plug-in's file
        Registry._all.append(self)

    def add(self, name: str, entry: T) -> T:
        """Register ``entry``.

        Raises:
            UsageError: the name is taken, or cannot stand in a file name.

        """
        if not name or not name.replace("_", "").replace("-", "").isalnum():
            raise UsageError(f"'{name}' is no name for a {self.kind}: use letters, digits, '_' and '-'")
        plugin = None if self._is_built_in(name) else Registry._plugin
        if name in self._entries or (plugin is not None and name in self._modules):
            owner = self._owners.get(name, "this program")
            raise UsageError(f"the {self.kind} '{name}' is registered by {owner} already: choose another name")
        self._entries[name] = entry
        if plugin is not None:
            self._owners[name] = plugin
        return entry

    def _is_built_in(self, name: str) -> bool:
        """Whether the built-in module of that name is just being imported, perhaps because a plug-in needs it."""
        module = sys.modules.get(f"{__package__}.{self._modules.get(name)}")
        return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))

    def register(self, name: str) -> Callable[[T], T]:
        """:meth:`add` as a decorator."""
        return lambda entry: self.add(name, entry)

    def get(self, name: str) -> T:
        """The entry of that name.

        Raises:
            UsageError: nothing is registered under it; the sentence lists what is.

        """
        self.check(name)
        if name not in self._entries:
            import_module("." + self._modules[name], __package__)
        return self._entries[name]

    def check(self, name: str) -> str:
        """The name itself, if something is registered under it; imports nothing.

        Raises:
            UsageError: as :meth:`get`.

        """
        if name not in self:
            known = ", ".join(self)
            raise UsageError(f"there is no {self.kind} '{name}': choose one of {known}, or register it with --plugin")
        return name

    def owner(self, name: str) -> str | None:
        """The plug-in that registered the name; None for this program's own."""
        return self._owners.get(name)

    def among(self, plugins: Collection[str]) -> list[str]:
        """All names but those of plug-ins whose files (names) are not in ``plugins``: they belong to another call."""
        owners = {name: Path(owner).name for name, owner in self._owners.items()}
        return [name for name in self if name not in owners or owners[name] in plugins]

    def is_own(self, name: str) -> bool:
        """Whether the name is this program's own: neither a plug-in's nor registered in a notebook."""
        return name in self._modules

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._modules, *self._entries]))

    def __len__(self) -> int:
        return len(set(self))

    @classmethod
    def kinds(cls, plugin: str) -> set[str]:
        """Kinds of the registries in which a plug-in file (by name) has registered something."""
        return {one.kind for one in cls._all for owner in one._owners.values() if Path(owner).name == plugin}

    @classmethod
    def forget_plugin(cls, plugin: str) -> None:
        """Remove everything that a plug-in registered."""
        for registry in cls._all:
            for name in [name for name, owner in registry._owners.items() if owner == plugin]:
                del registry._entries[name], registry._owners[name]
