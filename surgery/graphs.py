"""What a layer's forward pass computed dearly, kept for its backward pass while a budget lasts.

The backward pass visits the last layers first, so theirs are kept; all others are run again when their turn comes. Of a layer
that is kept, results of matrix products and attention are, which take about half of what autograd saves in
bfloat16; the rest is made again from them, by PyTorch's selective activation checkpointing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Seen = tuple[str, torch.Tensor | None, torch.Tensor, torch.Tensor | None]

DEAR = (
    *("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable"),
)
KEPT = {getattr(torch.ops.aten, name).default for name in DEAR if hasattr(torch.ops.aten, name)}


@dataclass
class Graph:
    """One micro-batch's way through one layer: what entered, what left, and what went through each FFN."""

    hidden: torch.Tensor
    output: torch.Tensor
    seen: list[Seen]

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds besides results of matrix products."""
        seen = (one for _, tokens, u, y in self.seen for one in (tokens, u, y) if one is not None)
        return self.hidden.nbytes + self.output.nbytes + sum(one.nbytes for one in seen)


class KeptResults(TorchDispatchMode):
    """Watches, while open, the results that `keeping` keeps: their bytes, and whether any is `overwritten` later.

    One that is (OLMo clips its queries in place) would not be what the rest has to be made again from.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0
        self.overwritten = False
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            written = _written(func, args, kwargs or {})
            self.overwritten |= any(_storage(one) in self.storages for one in written)
        result = func(*args, **(kwargs or {}))
        if func in KEPT:
            kept = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.nbytes += sum(tensor.nbytes for tensor in kept)
            self.storages.update(map(_storage, kept))
        return result


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
    return [one for one in tree_leaves(written) if isinstance(one, torch.Tensor)]


def keeping(run: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """`run(*args)`, of which autograd keeps dear results only and runs the rest again."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    output: torch.Tensor = checkpoint(
        run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return output


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class KeptGraphs:
    """Graphs of the last layers of `layers`, as many as `budget` bytes hold, by layer and micro-batch.

    How much one layer takes is seen on the first micro-batch that is run; the first layer kept is chosen from that. A layer
    that turns out larger than the budget still has left is not begun.
    """

    def __init__(self, layers: int, budget: int) -> None:
        self.layers = layers
        self.left = budget
        self.first: int | None = None
        self.largest = 0
        self.graphs: dict[int, list[Graph | None]] = {}

    def plan(self, nbytes: int) -> None:
        """Choose the first layer to keep, from what any layer takes; none where nothing can be kept."""
        self.largest = nbytes
        self.first = max(0, self.layers - self.left // nbytes) if nbytes else self.layers

    def wants(self, number: int) -> bool:
        """Whether layer `number` is to be kept."""
        return self.first is not None and number >= self.first and self.largest <= self.left

    def keep(self, number: int, graphs: list[Graph | None], nbytes: int) -> None:
        """Keep a layer's graphs, which take so many bytes."""
        self.graphs[number] = graphs
        self.left -= nbytes
        self.largest = max(self.largest, nbytes)

    def take(self, number: int) -> list[Graph | None]:
        """A layer's graphs, no longer kept here; none where it was not kept."""
        return self.graphs.pop(number, [])
