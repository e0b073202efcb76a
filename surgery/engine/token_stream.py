"""TokenStream: runs blocks of tokens through the layers of a StreamedModel, forward and backward.

Shape letters: N blocks, T tokens of a block, D hidden_size, F intermediate_size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.engine.hidden_store import HiddenStore
from surgery.engine.hooks import FfnCall, observed
from surgery.engine.selective_recompute import ActivationCache, ReplayOps, SavedOps
from surgery.engine.streamed_model import LayerCall, StreamedModel
from surgery.errors import NumericsError


@dataclass(frozen=True)
class FfnActivations:
    """Activations and gradients of the FFN named `ffn`, for a micro-batch of n blocks from `first_block` on.

    - u, the down projection's input, and s = dL/du: [n, T, F], or [routed, F] for an expert.
    - `tokens` [routed]: positions of an expert's rows in the flattened n x T batch; None for other FFNs.
    - g = dL/dy [..., D], with y the down projection's output; None unless requested.
    """

    ffn: str
    first_block: int
    tokens: torch.Tensor | None
    u: torch.Tensor
    s: torch.Tensor
    g: torch.Tensor | None = None


Observer = Callable[[FfnActivations], None]


@dataclass
class LayerForward:
    """One micro-batch's forward pass in one layer: input, output, and the calls of the layer's FFNs."""

    hidden: torch.Tensor
    output: torch.Tensor
    calls: list[FfnCall]


class TokenStream:
    """The hidden states of N blocks of tokens between two layers, moved layer by layer in micro-batches.

    - `ids` [N, T]: token ids. `micro_batch`: blocks per micro-batch.
    - `keep_inputs`: store the input of every layer (slot i holds the input of layer i), which the backward
      pass needs. Otherwise one slot is overwritten by each layer.
    - `place`: where hidden states are stored, as for `HiddenStore`.
    - `cache_bytes`: budget for caching activations that the backward pass would otherwise recompute.
    - `journal`: a folder in which layer inputs and gradients are stored in files, so that an interrupted
      backward pass resumes.
    """

    def __init__(
        self,
        model: StreamedModel,
        ids: torch.Tensor,
        *,
        micro_batch: int,
        keep_inputs: bool = False,
        place: str = "device",
        cache_bytes: int = 0,
        journal: Path | None = None,
    ) -> None:
        self.model = model
        self.cache = ActivationCache(len(model.layers), cache_bytes)
        self.ids = ids
        self.keep_inputs = keep_inputs
        self.slices = [slice(i, min(i + micro_batch, len(ids))) for i in range(0, len(ids), micro_batch)]
        self.calls: list[list[LayerCall]] = []
        shared = _SharedArguments()
        slots = len(model.layers) + 1 if keep_inputs else 1
        self.hidden: HiddenStore | None = None
        with model.other_weights():
            for part in self.slices:
                first_input, calls = model.capture(ids[part])
                self.calls.append([shared.intern(call) for call in calls])
                if self.hidden is None:
                    shape = (slots, *ids.shape, first_input.shape[-1])
                    self._make_stores(shape, first_input.dtype, place, journal)
                self.store.put(0, part, first_input)

    def _make_stores(
        self, shape: tuple[int, ...], dtype: torch.dtype, place: str, journal: Path | None
    ) -> None:
        """Make the store of layer inputs and, with a journal, a second one for gradients."""
        device = self.model.device
        self.gradients: HiddenStore | None = None
        if journal is None:
            self.hidden = HiddenStore(shape, dtype, device, place)
            return
        self.gradients = HiddenStore((2, *shape[1:]), dtype, device, path=journal / "gradients.bin")
        self.hidden = HiddenStore(shape, dtype, device, path=journal / "hidden.bin")

    def _gradient(self, layer: int) -> tuple[HiddenStore, int]:
        """Store and slot of dL/d(input of layer `layer`).

        Without a journal the gradient overwrites that input; with one it takes one of two slots of its own
        store.
        """
        return (self.store, self._slot(layer)) if self.gradients is None else (self.gradients, layer % 2)

    @property
    def store(self) -> HiddenStore:
        """The store of hidden states."""
        assert self.hidden is not None
        return self.hidden

    def _slot(self, layer: int) -> int:
        return layer if self.keep_inputs else 0

    def last_hidden(self, blocks: slice) -> torch.Tensor:
        """Output [n, T, D] of the last layer, on the model's device."""
        return self.store.get(self._slot(len(self.model.layers)), blocks, self.model.device)

    def put_last_gradient(self, blocks: slice, gradient: torch.Tensor) -> None:
        """Store dL/d(output of the last layer) [n, T, D], from which `backward` starts."""
        store, slot = self._gradient(len(self.model.layers))
        store.put(slot, blocks, gradient)

    def fork(self, blocks: int, layer: int, place: str = "device") -> TokenStream:
        """A stream with a copy of the first micro-batches' hidden states at the input of `layer`.

        It takes every micro-batch that starts before block `blocks`.
        """
        twin = object.__new__(TokenStream)
        twin.model, twin.keep_inputs, twin.gradients = self.model, False, None
        twin.cache = ActivationCache(len(self.model.layers), 0)
        twin.slices = [part for part in self.slices if part.start < blocks]
        twin.ids = self.ids[: twin.slices[-1].stop]
        twin.calls = self.calls[: len(twin.slices)]
        shape = (1, *twin.ids.shape, self.store.shape[-1])
        twin.hidden = HiddenStore(shape, self.store.dtype, self.model.device, place)
        for part in twin.slices:
            twin.hidden.put(0, part, self.store.get(self._slot(layer), part, self.model.device))
        return twin

    @torch.no_grad()
    def forward(self, number: int, layer: nn.Module) -> None:
        """Run every block through the resident layer `number`. Raises NumericsError on NaN or infinity."""
        finite = torch.ones((), dtype=torch.bool, device=self.model.device)
        if self.cache.left and self.cache.first is None:
            _, saved = self._forward_saving(number, layer, 0)
            self.cache.plan(saved.nbytes * len(self.slices))
        use_cache = self.cache.wants(number)
        cached: list[SavedOps | None] = []
        for batch, (part, calls) in enumerate(zip(self.slices, self.calls, strict=True)):
            if use_cache:
                output, saved = self._forward_saving(number, layer, batch)
                cached.append(self.cache.reserve(saved))
            else:
                hidden = self.store.get(self._slot(number), part, self.model.device)
                output = self.model.run_layer(layer, hidden, calls[number])
            finite &= output.isfinite().all()
            self.store.put(self._slot(number + 1), part, output)
        if use_cache:
            self.cache.keep(number, cached)
        check_finite(finite, number)

    def _forward_with_graph(self, number: int, layer: nn.Module, batch: int) -> LayerForward:
        """Run micro-batch `batch` through the resident layer `number`, recording the autograd graph."""
        calls: list[FfnCall] = []
        hidden = self.store.get(self._slot(number), self.slices[batch], self.model.device)
        hidden.requires_grad_(True)
        with torch.enable_grad(), observed(self.model.ffns(number), calls.append):
            output = self.model.run_layer(layer, hidden, self.calls[batch][number])
        return LayerForward(hidden, output, calls)

    def _forward_saving(self, number: int, layer: nn.Module, batch: int) -> tuple[torch.Tensor, SavedOps]:
        """Output of micro-batch `batch`, and the outputs of expensive operations, saved for recomputation.

        It runs with gradients enabled, as the recomputation does: without, some kernels omit outputs that the
        backward pass needs.
        """
        with SavedOps() as saved:
            output = self._forward_with_graph(number, layer, batch).output.detach()
        return output, saved

    def run_observed(
        self, number: int, layer: nn.Module, use: Callable[[slice, torch.Tensor, list[FfnCall]], None]
    ) -> None:
        """Run every micro-batch through layer `number` and call `use(blocks, output, FFN calls)`.

        Nothing is stored. FFN outputs are copies, because some layers (Falcon's) add to the FFN's output in
        place.
        """
        ffn_calls: list[FfnCall] = []

        def record(call: FfnCall) -> None:
            ffn_calls.append(FfnCall(call.ffn, call.tokens, call.u, call.y.clone()))

        with observed(self.model.ffns(number), record):
            for part, calls in zip(self.slices, self.calls, strict=True):
                hidden = self.store.get(self._slot(number), part, self.model.device)
                use(part, self.model.run_layer(layer, hidden, calls[number]), ffn_calls)
                ffn_calls.clear()

    def backward(
        self,
        number: int,
        layer: nn.Module,
        observe: Observer,
        gradients: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Propagate dL/d(output) of layer `number` to its input.

        `observe` is called with the activations and gradients of each of the layer's FFNs. `gradients` maps
        parameter paths inside the layer to tensors; dL/d(parameter) is added to each, and `observe` also gets
        dL/d(FFN output).
        """
        output_store, output_slot = self._gradient(number + 1)
        input_store, input_slot = self._gradient(number)
        parameters = [layer.get_parameter(name).requires_grad_(True) for name in gradients or ()]
        cached = self.cache.take(number) or [None] * len(self.slices)
        for batch, part in enumerate(self.slices):
            saved, cached[batch] = cached[batch], None
            with ReplayOps(saved) if saved else contextlib.nullcontext():
                run = self._forward_with_graph(number, layer, batch)
            saved = None  # frees its memory before the gradients are computed
            gradient = output_store.get(output_slot, part, self.model.device)
            ys = [call.y for call in run.calls] if gradients is not None else []
            inputs = (run.hidden, *(call.u for call in run.calls), *ys, *parameters)
            d_input, *others = torch.autograd.grad(run.output, inputs, gradient)
            input_store.put(input_slot, part, d_input)
            count = len(run.calls)
            d_us, d_ys = others[:count], others[count : count + len(ys)]
            batch_shape = run.hidden.shape[:2]
            for i, (call, s) in enumerate(zip(run.calls, d_us, strict=True)):
                shape = (*batch_shape, -1) if call.tokens is None else call.u.shape
                g = d_ys[i] if ys else None
                u = call.u.detach().view(shape)
                observe(FfnActivations(call.ffn, part.start, call.tokens, u, s.view(shape), g))
            for total, d_parameter in zip((gradients or {}).values(), others[count + len(ys) :], strict=True):
                total += d_parameter
        for parameter in parameters:
            parameter.requires_grad_(False)


def check_finite(finite: torch.Tensor, number: int) -> None:
    """Raise NumericsError, naming the layer, unless its output was finite."""
    if not finite:
        raise NumericsError(
            "NaN or infinity in the hidden states",
            where=f"the output of layer {number}",
            next_step="check the checkpoint's weights, or use --dtype float32",
        )


class _SharedArguments:
    """Deduplicates argument tensors that are equal across micro-batches, such as masks and rotary tables."""

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
