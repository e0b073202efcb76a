"""LazyStatistics: statistics of an FFN by name, read or computed when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping

import torch

from surgery.errors import IndexMismatchError


class LazyStatistics(MutableMapping[str, torch.Tensor]):
    """Statistics [F] by name. `load` is called once for each name of `names` that is asked for.

    `left_out` are statistics that the index does not hold although others do: asking for one raises
    IndexMismatchError, which says so.
    """

    def __init__(
        self, names: Iterable[str], load: Callable[[str], torch.Tensor], left_out: Iterable[str] = ()
    ) -> None:
        self._names = dict.fromkeys(names)
        self._load = load
        self._left_out = frozenset(left_out)
        self._values: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._values:
            if name not in self._names:
                raise self._missing(name)
            self._values[name] = self._load(name)
        return self._values[name]

    def _missing(self, name: str) -> Exception:
        if name not in self._left_out:
            return KeyError(name)
        return IndexMismatchError(
            "a published index does not hold this statistic",
            where=name,
            next_step="run surgeon index, and use the folder it writes",
        )

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self._names[name] = None
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        del self._names[name]
        self._values.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
