"""TrainingStream: a token stream whose backward pass gives the gradients of what is trained of a layer.

Shape letters: N blocks, T tokens of a block, D hidden_size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import LayerForward, TokenStream, check_finite
from surgery.heal.trainable import Trainables


@dataclass
class GraphBudget:
    """Bytes that autograd graphs may hold between the forward and the backward pass.

    `per_layer` are those of one layer, measured in the first layer that ran; 0 before.
    """

    left: int
    per_layer: int = 0


@dataclass
class _KeptLayer:
    """What the backward pass needs of a layer whose graph was kept: trained tensors, and each micro-batch."""

    leaves: dict[str, torch.Tensor]
    runs: list[LayerForward]


class TrainingStream(TokenStream):
    """N blocks that go forward through the layers with `trainables` in place, and backward with gradients.

    Graphs of layers are kept while `graphs` has room, the last layers first; the others are recomputed. Only
    layers whose weights stay in memory can keep one: a graph holds the weights it needs.
    """

    def __init__(
        self,
        model: StreamedModel,
        ids: torch.Tensor,
        trainables: Trainables,
        *,
        micro_batch: int,
        place: str = "device",
        graphs: GraphBudget | None = None,
    ) -> None:
        super().__init__(model, ids, micro_batch=micro_batch, keep_inputs=True, place=place)
        self.trainables = trainables
        self.graphs = graphs or GraphBudget(0)
        self.graphs_left = self.graphs.left
        self.graphs_of: dict[int, _KeptLayer] = {}

    def forward(self, number: int, layer: nn.Module) -> None:
        """Run every block through the resident layer. Raises NumericsError on NaN or infinity."""
        if not self._keeps_graph(number):
            with self.trainables.installed(number, layer):
                super().forward(number, layer)
            return
        finite = torch.ones((), dtype=torch.bool, device=self.model.device)
        runs = []
        measured = contextlib.nullcontext() if self.graphs.per_layer else _SavedBytes()
        with self.trainables.installed(number, layer) as leaves, measured:
            for batch, part in enumerate(self.slices):
                runs.append(self._run_with_graph(number, layer, batch))
                finite &= runs[-1].output.detach().isfinite().all()
                self.store.put(self._slot(number + 1), part, runs[-1].output.detach())
        check_finite(finite, number)
        if isinstance(measured, _SavedBytes):
            self.graphs.per_layer = measured.nbytes
        self.graphs_left -= self.graphs.per_layer
        self.graphs_of[number] = _KeptLayer(leaves, runs)

    def _keeps_graph(self, number: int) -> bool:
        """Whether to keep layer `number`'s graph: its weights stay, and it is among the last that fit."""
        if not self.graphs.left or number not in self.model.kept:
            return False
        after = len(self.model.layers) - number
        size = max(1, self.graphs.per_layer)
        return size <= self.graphs_left and after <= max(1, self.graphs.left // size)

    def _run_with_graph(self, number: int, layer: nn.Module, batch: int) -> LayerForward:
        hidden = self.store.get(self._slot(number), self.slices[batch], self.model.device)
        hidden.requires_grad_(True)
        with torch.enable_grad():
            output = self.model.run_layer(layer, hidden, self.calls[batch][number])
        return LayerForward(hidden, output, [])

    def train_backward(self, number: int, layer: nn.Module) -> dict[str, torch.Tensor]:
        """Propagate dL/d(output) of layer `number` to its input; returns path -> dL/d(trained), float32.

        A tensor that the layer did not use (an expert without tokens) gets a gradient of 0.
        """
        kept = self.graphs_of.pop(number, None)
        with self.trainables.installed(number, layer, kept.leaves if kept else None) as leaves:
            sums = {path: torch.zeros_like(leaf, dtype=torch.float32) for path, leaf in leaves.items()}
            for batch, part in enumerate(self.slices):
                run = kept.runs[batch] if kept else self._run_with_graph(number, layer, batch)
                gradient = self.store.get(self._slot(number + 1), part, self.model.device)
                inputs = (run.hidden, *leaves.values())
                d_input, *others = torch.autograd.grad(
                    run.output, inputs, gradient, allow_unused=True, materialize_grads=True
                )
                if kept:
                    kept.runs[batch] = None  # type: ignore[call-overload]
                self.store.put(self._slot(number), part, d_input)
                for total, found in zip(sums.values(), others, strict=True):
                    total += found
        return sums


class _SavedBytes:
    """Within the block, counts the bytes of tensors that autograd saves, each storage once.

    Parameters are not counted: they are in memory anyway.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._seen: set[int] = set()
        self._hooks: Any = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor._base is None:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.nbytes += storage.nbytes()
        elif tensor._base is not None and not isinstance(tensor._base, nn.Parameter):
            self._count(tensor._base)
        return tensor

    def __enter__(self) -> _SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def all_layers(model: StreamedModel, backwards: bool = False) -> Iterator[tuple[int, nn.Module]]:
    """The resident layers one after another, from the first or from the last."""
    order = range(len(model.layers))
    return model.stream_layers(reversed(order) if backwards else order)
