"""What a layer's forward pass computed dearly, kept for its backward pass while a budget lasts.

The backward pass visits the last layers first, so theirs are kept; all others are run again in full when their turn comes. A
layer that is kept is run again too, but results of attention and of products with large matrices are taken from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from surgery.errors import SurgeonError

ATTENTION = (
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    "_scaled_dot_product_fused_attention_overrideable",
)
PRODUCTS = {"mm": 0, "bmm": 0, "_grouped_mm": 0, "addmm": 1, "baddbmm": 1}  # and which argument has K columns
# On a CPU a result in memory not touched before costs about what computing it from so few columns K does, measured
# (`tests/benchmarks/streamed.py --time`); a GPU's memory comes from a cache.
DEAR_COLUMNS = {"cpu": 1024}


_ATTENTION = {getattr(torch.ops.aten, name).default for name in ATTENTION if hasattr(torch.ops.aten, name)}
_PRODUCTS = {
    getattr(torch.ops.aten, name).default: place
    for name, place in PRODUCTS.items()
    if hasattr(torch.ops.aten, name)
}


def _dear(operation: Any, args: Any) -> bool:
    """Whether computing a result again would take longer than keeping it."""
    if operation in _ATTENTION:
        return True
    if operation not in _PRODUCTS:
        return False
    left = args[_PRODUCTS[operation]]
    return bool(left.shape[-1] >= DEAR_COLUMNS.get(left.device.type, 0))


class Results(TorchDispatchMode):
    """While open, keeps the dear results of what is run, in order.

    `nbytes` is what they take. A result that is changed in place later (OLMo clips its queries) is forgotten: it is not what
    the rest has to be made again from.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[tuple[Any, Any]] = []
        self.nbytes = 0
        self._places: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self._forget(_written(func, args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if _dear(func, args):
            self.nbytes += _nbytes(result)
            self._places |= dict.fromkeys(map(_storage, _tensors(result)), len(self.kept))
            # detached, or autograd would tie all it saved to them
            self.kept.append((func, tree_map_only(torch.Tensor, torch.Tensor.detach, result)))
        return result

    def _forget(self, written: list[torch.Tensor]) -> None:
        for place in {self._places[_storage(one)] for one in written if _storage(one) in self._places}:
            operation, result = self.kept[place]
            self.nbytes -= _nbytes(result)
            self.kept[place] = (operation, None)


class Replay(TorchDispatchMode):
    """While open, dear results are those of `results`, in the order they were kept in, instead of being computed."""

    def __init__(self, results: Results) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left: Iterator[tuple[Any, Any]] = iter(results.kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _dear(func, args):
            return func(*args, **(kwargs or {}))
        kept = next(self._left, None)
        if kept is None or kept[0] is not func:
            raise SurgeonError("a layer went another way when it was run again", where=str(func))
        return func(*args, **(kwargs or {})) if kept[1] is None else kept[1]


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _nbytes(result: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(result))


def _storage(tensor: torch.Tensor) -> int:
    """What views of one memory have in common; its address would not do for the meta device."""
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors that an operation writes, by its schema."""
    written = [
        args[place] if place < len(args) else kwargs.get(entry.name)
        for place, entry in enumerate(func._schema.arguments)
        if entry.alias_info is not None and entry.alias_info.is_write
    ]
    return _tensors(written)


class KeptResults:
    """Results of the last layers of `layers`, as many as `budget` bytes hold, by layer and micro-batch.

    How much one layer takes is seen on the first micro-batch that is run; the first layer kept is chosen from that. A layer
    that turns out larger than the budget still has left is not begun.
    """

    def __init__(self, layers: int, budget: int) -> None:
        self.layers = layers
        self.left = budget
        self.first: int | None = None
        self.largest = 0
        self.results: dict[int, list[Results | None]] = {}

    def plan(self, nbytes: int) -> None:
        """Choose the first layer to keep, from what any layer takes; none where nothing can be kept."""
        self.largest = nbytes
        self.first = max(0, self.layers - self.left // nbytes) if nbytes else self.layers

    def wants(self, number: int) -> bool:
        """Whether layer `number` is to be kept."""
        return self.first is not None and number >= self.first and self.largest <= self.left

    def reserve(self, results: Results) -> Results | None:
        """The same results, their bytes taken from the budget; none where it has no room left for them."""
        if results.nbytes > self.left:
            return None
        self.left -= results.nbytes
        return results

    def keep(self, number: int, results: list[Results | None]) -> None:
        """Keep a layer's results, of every micro-batch, that were reserved."""
        self.results[number] = results
        self.largest = max(self.largest, sum(one.nbytes for one in results if one is not None))

    def take(self, number: int) -> list[Results | None]:
        """A layer's results, no longer kept here; none where they were not kept."""
        return self.results.pop(number, [])
