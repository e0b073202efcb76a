"""Registry: a table of named entries that an installed package can extend through an entry point."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from surgery.errors import PlanError

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Entries by name: the built-in ones, those registered in this process, and those of the entry point
    `group`.

    An entry point's name is the name of its entry; what it points at must be an `entry_type`. It is imported
    when its entry is first used, so that listing names imports no other package. `kind` says in errors what
    an entry is.
    """

    def __init__(self, kind: str, group: str, entry_type: type[Entry], builtin: dict[str, Entry]) -> None:
        self.kind = kind
        self.group = group
        self.entry_type = entry_type
        self._entries = dict(builtin)
        self._found: dict[str, EntryPoint] | None = None

    @property
    def _installed(self) -> dict[str, EntryPoint]:
        if self._found is None:
            self._found = {point.name: point for point in entry_points(group=self.group)}
        return self._found

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries and name in self._installed:
            self._entries[name] = self._load(self._installed[name])
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._entries, *self._installed)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def find(self, name: str) -> Entry:
        """The entry of this name. Raises PlanError where there is none, or its package can't be used."""
        if name not in self:
            raise PlanError(f"unknown {self.kind}", expected=", ".join(self), found=name)
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._installed

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry in this process. Raises PlanError for a name that is taken."""
        if name in self:
            raise PlanError(f"a {self.kind} of this name exists", found=name, next_step="choose another name")
        self._entries[name] = entry

    def _load(self, point: EntryPoint) -> Entry:
        next_step = "fix or uninstall the package"
        try:
            entry = point.load()
        except (ImportError, AttributeError) as error:
            raise PlanError(
                f"the package of this {self.kind} can't be imported",
                where=point.name,
                found=f"{type(error).__name__}: {error}",
                next_step=next_step,
            ) from error
        if not isinstance(entry, self.entry_type):
            raise PlanError(
                f"the entry point of this {self.kind} is of the wrong type",
                where=f"{self.group}: {point.name} = {point.value}",
                expected=f"a surgery.{self.entry_type.__name__}",
                found=type(entry).__name__,
                next_step=next_step,
            )
        return entry


def import_object(path: str | Any) -> Any:
    """What "module:name" or "module:object.name" names; anything but text is returned as it is."""
    return pkgutil.resolve_name(path) if isinstance(path, str) else path
