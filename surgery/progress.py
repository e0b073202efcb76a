"""Progress reporting: a Progress wraps an iterable, given a label and a total, and may show a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Progress = Callable[[Iterable[Item], str, int], Iterator[Item]]


def no_progress(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:  # noqa: ARG001
    """A Progress that shows nothing."""
    yield from items
