"""Selective recomputation: caches outputs of expensive operations for the backward pass, in a byte budget.

The backward pass recomputes the forward pass of every layer. In a cached layer, the outputs of attention and
of products with large matrices come from the cache instead. The backward pass starts at the last layer, so
the last layers are cached; all others are recomputed in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from surgery.engine.causal_attention import attention_output
from surgery.errors import SurgeonError

ATTENTION = (
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    "_scaled_dot_product_fused_attention_overrideable",
)
# matrix products -> index of the argument with K columns
PRODUCTS = {"mm": 0, "bmm": 0, "_grouped_mm": 0, "addmm": 1, "baddbmm": 1}
# On a CPU, storing an output in newly mapped memory takes about as long as computing it from this many
# columns K, measured (`tests/benchmarks/streamed.py --time`). A GPU has a caching allocator: no limit there.
EXPENSIVE_COLUMNS = {"cpu": 1024}
_ATTENTION = {getattr(torch.ops.aten, name).default for name in ATTENTION if hasattr(torch.ops.aten, name)}
_ATTENTION.add(attention_output._opoverload)
_PRODUCTS = {
    getattr(torch.ops.aten, name).default: argument
    for name, argument in PRODUCTS.items()
    if hasattr(torch.ops.aten, name)
}


def is_expensive(operation: Any, args: Any) -> bool:
    """Whether recomputing the output of `operation` takes longer than caching it.

    True for attention, and for matrix products over at least the device's EXPENSIVE_COLUMNS (0 if unlisted).
    """
    if operation in _ATTENTION:
        return True
    if operation not in _PRODUCTS:
        return False
    left = args[_PRODUCTS[operation]]
    return bool(left.shape[-1] >= EXPENSIVE_COLUMNS.get(left.device.type, 0))


class SavedOps(TorchDispatchMode):
    """Within the block, saves the outputs of expensive operations, in order.

    `nbytes` is their size. An output that is modified in place later (OLMo clips its queries) is dropped,
    because the recomputation needs the value before the modification.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.saved: list[tuple[Any, Any]] = []  # (operation, its output, None where dropped)
        self.nbytes = 0
        self._index_of_storage: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self._drop(_written(func, args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if is_expensive(func, args):
            self.nbytes += _nbytes(result)
            self._index_of_storage |= dict.fromkeys(map(_storage, _tensors(result)), len(self.saved))
            # detached: otherwise each output would keep its autograd graph alive
            self.saved.append((func, tree_map_only(torch.Tensor, torch.Tensor.detach, result)))
        return result

    def _drop(self, written: list[torch.Tensor]) -> None:
        storages = {_storage(tensor) for tensor in written}
        for index in {self._index_of_storage[s] for s in storages if s in self._index_of_storage}:
            operation, result = self.saved[index]
            self.nbytes -= _nbytes(result)
            self.saved[index] = (operation, None)


class ReplayOps(TorchDispatchMode):
    """Within the block, expensive operations return the outputs saved in `results`, in order.

    They are computed only where the saved output was dropped. Raises SurgeonError when the operations
    are not those of the forward pass.
    """

    def __init__(self, results: SavedOps) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._remaining: Iterator[tuple[Any, Any]] = iter(results.saved)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_expensive(func, args):
            return func(*args, **(kwargs or {}))
        saved = next(self._remaining, None)
        if saved is None or saved[0] is not func:
            raise SurgeonError("recomputation ran other operations than the forward pass", where=str(func))
        return func(*args, **(kwargs or {})) if saved[1] is None else saved[1]


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _nbytes(result: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(result))


def _storage(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, equal for all views; meta tensors have no distinct data pointers."""
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The argument tensors that an operation modifies, according to its schema."""
    written = [
        args[position] if position < len(args) else kwargs.get(entry.name)
        for position, entry in enumerate(func._schema.arguments)
        if entry.alias_info is not None and entry.alias_info.is_write
    ]
    return _tensors(written)


class ActivationCache:
    """Saved outputs of the last layers, as many of `layers` as fit in `budget` bytes.

    They are stored by layer and micro-batch. The first micro-batch measures the size of one layer (`plan`),
    which gives the first layer to cache. `left` is the unused budget in bytes, `largest` the bytes of the
    largest layer so far. A layer is cached only if `largest` fits in `left`.
    """

    def __init__(self, layers: int, budget: int) -> None:
        self.layers = layers
        self.left = budget
        self.first: int | None = None
        self.largest = 0
        self.results: dict[int, list[SavedOps | None]] = {}

    def plan(self, nbytes: int) -> None:
        """Choose the first layer to cache, given the bytes of one layer; none where not even one fits."""
        self.largest = nbytes
        self.first = max(0, self.layers - self.left // nbytes) if nbytes else self.layers

    def wants(self, number: int) -> bool:
        """Whether to cache layer `number`."""
        return self.first is not None and number >= self.first and self.largest <= self.left

    def reserve(self, results: SavedOps) -> SavedOps | None:
        """Charge `results` to the budget and return them; None where they do not fit."""
        if results.nbytes > self.left:
            return None
        self.left -= results.nbytes
        return results

    def keep(self, number: int, results: list[SavedOps | None]) -> None:
        """Cache a layer's results, one entry per micro-batch; None for a micro-batch that did not fit."""
        self.results[number] = results
        self.largest = max(self.largest, sum(saved.nbytes for saved in results if saved is not None))

    def take(self, number: int) -> list[SavedOps | None]:
        """Remove and return a layer's results; an empty list for a layer that is not cached."""
        return self.results.pop(number, [])
