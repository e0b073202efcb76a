"""Counts the bytes of tensors that are alive, by storage."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Bytes of tensors that operations made and that are still held; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.total = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.from_file.default:  # pages of a file are no memory
            return result
        given: set[int] | None = None
        for leaf in _tensors(result):
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key in self.sizes or leaf.is_meta:  # a meta tensor has no memory
                continue
            if given is None:
                given = {one.untyped_storage()._cdata for one in _tensors((args, kwargs))}
            if key not in given:
                self.sizes[key] = storage.nbytes()
                self.total += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self.total)
        return result

    def _forget(self, key: int) -> None:
        self.total -= self.sizes.pop(key, 0)


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for one in found:
            yield from _tensors(one)
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))
