"""What autograd saves of a layer's forward pass, kept for its backward pass while a budget lasts.

The backward pass visits the last layers first, so theirs are kept; all others are run again when their turn comes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

Seen = tuple[str, torch.Tensor | None, torch.Tensor, torch.Tensor]


@dataclass
class Graph:
    """One micro-batch's way through one layer: what entered, what left, and what went through each FFN."""

    hidden: torch.Tensor
    output: torch.Tensor
    seen: list[Seen]


class SavedBytes:
    """Counts the bytes autograd saves besides the parameters of one layer, each storage once."""

    def __init__(self, layer: nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        self.weights = sum(p.nbytes for p in layer.parameters())
        self.storages: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Bytes so far, without the layer's weights."""
        return sum(self.storages.values())

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """While open, what is saved is counted."""

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.parameters:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield


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

    def plan(self, saved: SavedBytes, micro_batches: int) -> None:
        """Choose the first layer to keep, from what one micro-batch of any layer saves."""
        self.largest = saved.total * micro_batches + saved.weights
        self.first = max(0, self.layers - self.left // max(1, self.largest))

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
