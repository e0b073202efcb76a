"""Blocks of tokens on their way through the layers of a StreamedModel: forward, loss, backward.

Shape letters: N blocks, T tokens of a block, D hidden_size, F intermediate_size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from surgery.errors import NumericsError
from surgery.ffn import observed
from surgery.graphs import KeptResults, Replay, Results
from surgery.hidden import HiddenStore
from surgery.stream import LayerCall, StreamedModel

HEAD_ELEMENTS = 1 << 23  # logits alive at once in the loss: tokens x vocabulary


@dataclass(frozen=True)
class Flow:
    """What went through one FFN for a micro-batch of blocks beginning with `first_block`.

    `unit` names the FFN; u and s = dL/du are [n, T, F] or, for an expert, [routed, F] with the positions `tokens`
    [routed] in the flattened n x T batch. g = dL/dy [..., D], y what the down projection puts out, where asked for.
    """

    unit: str
    first_block: int
    tokens: torch.Tensor | None
    u: torch.Tensor
    s: torch.Tensor
    g: torch.Tensor | None = None


Observer = Callable[[Flow], None]
Seen = tuple[str, torch.Tensor | None, torch.Tensor, torch.Tensor | None]


@dataclass
class Graph:
    """One micro-batch's way through one layer: what entered, what left, and what went through each FFN."""

    hidden: torch.Tensor
    output: torch.Tensor
    seen: list[Seen]


class TokenStream:
    """Blocks of tokens on their way through the layers, micro-batch by micro-batch.

    `ids` [N, T]. With `keep_inputs` every layer's input is kept (slot i holds what enters layer i), which the
    backward pass needs; without it, one slot is overwritten from layer to layer; `host_bytes` and `place` are as of
    `HiddenStore`. `graph_bytes` may be spent on what the
    backward pass would otherwise compute again. With `journal`, a folder, inputs are kept in files there, and gradients
    beside them instead of in their place, so that a layer can be done again.
    """

    def __init__(
        self,
        model: StreamedModel,
        ids: torch.Tensor,
        *,
        micro_batch: int,
        keep_inputs: bool = False,
        host_bytes: int | None = None,
        place: str | None = None,
        graph_bytes: int = 0,
        journal: Path | None = None,
    ) -> None:
        self.model = model
        self.kept = KeptResults(len(model.layers), graph_bytes)
        self.ids = ids
        self.keep_inputs = keep_inputs
        self.slices = [slice(i, min(i + micro_batch, len(ids))) for i in range(0, len(ids), micro_batch)]
        self.calls: list[list[LayerCall]] = []
        shared = _SharedArguments()
        slots = len(model.layers) + 1 if keep_inputs else 1
        self.hidden: HiddenStore | None = None
        with model.outside():
            for part in self.slices:
                entering, calls = model.capture(ids[part])
                self.calls.append([shared.intern(call) for call in calls])
                if self.hidden is None:
                    shape = (slots, *ids.shape, entering.shape[-1])
                    self.hidden = self._make_store(shape, entering.dtype, host_bytes, place, journal)
                self.hidden.put(0, part, entering)

    def _make_store(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        host_bytes: int | None,
        place: str | None,
        journal: Path | None,
    ) -> HiddenStore:
        self.apart: HiddenStore | None = None
        if journal is None:
            return HiddenStore(shape, dtype, host_bytes, device=self.model.device, place=place)
        self.apart = HiddenStore((2, *shape[1:]), dtype, None, path=journal / "gradients.bin")
        return HiddenStore(shape, dtype, None, path=journal / "hidden.bin")

    def _gradient(self, layer: int) -> tuple[HiddenStore, int]:
        """Where dL/d(what enters layer i) is: in place of that, or beside it, in turn with the next layer's."""
        return (self.store, self._slot(layer)) if self.apart is None else (self.apart, layer % 2)

    @property
    def store(self) -> HiddenStore:
        """The hidden states."""
        assert self.hidden is not None
        return self.hidden

    def _slot(self, layer: int) -> int:
        return layer if self.keep_inputs else 0

    def fork(
        self, number: int, layer: int, host_bytes: int | None = None, place: str | None = None
    ) -> TokenStream:
        """A copy of the first micro-batches, up to `number` blocks, as they stand before `layer`."""
        twin = object.__new__(TokenStream)
        twin.model, twin.keep_inputs, twin.apart = self.model, False, None
        twin.kept = KeptResults(len(self.model.layers), 0)
        twin.slices = [part for part in self.slices if part.start < number]
        twin.ids = self.ids[: twin.slices[-1].stop]
        twin.calls = self.calls[: len(twin.slices)]
        shape = (1, *twin.ids.shape, self.store.shape[-1])
        device = self.model.device
        twin.hidden = HiddenStore(shape, self.store.dtype, host_bytes, device=device, place=place)
        for part in twin.slices:
            twin.hidden.put(0, part, self.store.get(self._slot(layer), part, self.model.device))
        return twin

    @torch.no_grad()
    def forward(self, number: int, layer: nn.Module) -> None:
        """Move every block through the resident layer `number`. Raises NumericsError on NaN or infinity."""
        finite = torch.ones((), dtype=torch.bool, device=self.model.device)
        if self.kept.left and self.kept.first is None:
            _, results = self._kept_results(number, layer, 0)
            self.kept.plan(results.nbytes * len(self.slices))
        keep = self.kept.wants(number)
        held: list[Results | None] = []
        for place, (part, calls) in enumerate(zip(self.slices, self.calls, strict=True)):
            if keep:
                output, results = self._kept_results(number, layer, place)
                held.append(self.kept.reserve(results))
            else:
                hidden = self.store.get(self._slot(number), part, self.model.device)
                output = self.model.run_layer(layer, hidden, calls[number])
            finite &= output.isfinite().all()
            self.store.put(self._slot(number + 1), part, output)
        if keep:
            self.kept.keep(number, held)
        check_finite(finite, number)

    def _graph(self, number: int, layer: nn.Module, place: int) -> Graph:
        """Run micro-batch `place` through the resident layer so that gradients can be taken."""
        seen: list[Seen] = []
        hidden = self.store.get(self._slot(number), self.slices[place], self.model.device)
        hidden.requires_grad_(True)
        with torch.enable_grad(), observed(self.model.ffns(number), lambda *flow: seen.append(flow)):
            output = self.model.run_layer(layer, hidden, self.calls[place][number])
        return Graph(hidden, output, seen)

    def _kept_results(self, number: int, layer: nn.Module, place: int) -> tuple[torch.Tensor, Results]:
        """What leaves the layer, and dear results on the way that need not be computed again.

        It is run as it will be run again: without gradients some kernels leave out what these need.
        """
        with Results() as results:
            output = self._graph(number, layer, place).output.detach()
        return output, results

    def backward(
        self,
        number: int,
        layer: nn.Module,
        observe: Observer,
        gradients: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Pull dL/d(output) of layer `number` back to its input, in place of the stored output.

        `observe` gets what went through each of the layer's FFNs. With `gradients`, by parameter path inside the layer,
        dL/d(parameter) is added to each, and `observe` also gets dL/d(FFN output).
        """
        (above, slot), (below, free) = self._gradient(number + 1), self._gradient(number)
        parameters = [layer.get_parameter(name).requires_grad_(True) for name in gradients or ()]
        kept = self.kept.take(number) or [None] * len(self.slices)
        for turn, part in enumerate(self.slices):
            results, kept[turn] = kept[turn], None
            with Replay(results) if results else contextlib.nullcontext():
                graph = self._graph(number, layer, turn)
            results = None  # its memory goes as soon as it has been used
            gradient = above.get(slot, part, self.model.device)
            seen = graph.seen
            ys = [y for *_, y in seen if y is not None] if gradients is not None else []
            inputs = (graph.hidden, *(u for _, _, u, _ in seen), *ys, *parameters)
            to_input, *others = torch.autograd.grad(graph.output, inputs, gradient)
            below.put(free, part, to_input)
            to_channels, to_outputs = others[: len(seen)], others[len(seen) : len(seen) + len(ys)]
            shape = graph.hidden.shape[:2]
            for place, ((unit, tokens, u, _), s) in enumerate(zip(seen, to_channels, strict=True)):
                blocks = (*shape, -1) if tokens is None else u.shape
                g = to_outputs[place] if ys else None
                observe(Flow(unit, part.start, tokens, u.detach().view(blocks), s.view(blocks), g))
            for total, found in zip((gradients or {}).values(), others[len(seen) + len(ys) :], strict=True):
                total += found
        for parameter in parameters:
            parameter.requires_grad_(False)

    def loss(self, with_gradient: bool = False) -> torch.Tensor:
        """Summed next-token cross-entropy in nats of each block, [N] float64, from the last layer's output.

        The last token of a block predicts nothing. With `with_gradient`, dL/d(last hidden state) takes the place of
        the stored output; L is the sum over all blocks.
        """
        nats = []
        with self.model.outside():
            for block in range(len(self.ids)):
                nats.append(self._block_loss(block, with_gradient))
                self.model.heap.settle()
        return torch.stack(nats).cpu()

    def _block_loss(self, block: int, with_gradient: bool) -> torch.Tensor:
        """Summed loss of one block, through the head a slice of tokens at a time."""
        device = self.model.device
        slot, part = self._slot(len(self.model.layers)), slice(block, block + 1)
        hidden = self.store.get(slot, part, device)[0]
        gradient = torch.zeros_like(hidden)
        targets = self.ids[block, 1:].to(device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for rows in head_slices(self.model, len(targets)):
            states = hidden[rows].detach().requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                logits = self.model.logits(states).float()
                piece = functional.cross_entropy(logits, targets[rows], reduction="sum")
            if with_gradient:
                (gradient[rows],) = torch.autograd.grad(piece, states)
            total += piece.detach().double()
        if with_gradient:
            store, free = self._gradient(len(self.model.layers))
            store.put(free, part, gradient[None])
        return total


def check_finite(finite: torch.Tensor, number: int) -> None:
    """Raise NumericsError, naming the layer, unless its output was finite."""
    if not finite:
        raise NumericsError(
            "NaN or infinity in the hidden states",
            where=f"the output of layer {number}",
            next_step="check the checkpoint's weights, or use --dtype float32",
        )


def head_slices(model: StreamedModel, tokens: int) -> Iterator[slice]:
    """Slices of so few tokens each that their logits fit in HEAD_ELEMENTS."""
    step = max(1, HEAD_ELEMENTS // model.model.config.get_text_config().vocab_size)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


class _SharedArguments:
    """Keeps one copy of arguments that are equal for every micro-batch, as masks and rotary tables are."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def intern(self, call: LayerCall) -> LayerCall:
        return LayerCall(self._same(call.args), self._same(call.kwargs))

    def _same(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            for known in self.tensors:
                if known is value or (
                    known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value)
                ):
                    return known
            self.tensors.append(value)
            return value
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(self._same(item) for item in value)
        if type(value) is dict:
            return {key: self._same(item) for key, item in value.items()}
        return value
