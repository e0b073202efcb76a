"""The dense model's side of a repair: what enters and leaves each layer, and how the layer adds to its residual stream."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from surgery.ffn import Ffn, observed
from surgery.hidden import HiddenStore
from surgery.repair import adds
from surgery.stream import StreamedModel
from surgery.tokens import TokenStream

Seen = list[tuple[str, torch.Tensor | None, torch.Tensor, torch.Tensor]]
STORES = 3  # entering, leaving and before the FFN


class DenseStream:
    """Calibration blocks on their way through the dense model: `run` each resident layer, then `step`.

    Between the two, `stream` holds what enters the layer and `leaving` what leaves it. In a layer that is `additive` (it
    adds its only FFN's output, as it is, to the residual stream) `before` is the stream before the FFN, and `attention`
    names the linear whose output, added to what enters, makes it; None where none can be told. Several prunings may use
    one dense stream. `place` is where its hidden states go, as of `HiddenStore`.
    """

    def __init__(
        self, model: StreamedModel, ids: torch.Tensor, micro_batch: int, place: str | None = None
    ) -> None:
        self.model = model
        self.place = place
        self.stream = TokenStream(model, ids, micro_batch=micro_batch, place=place)
        width = self.stream.store.shape[-1]
        self.leaving, self.before = self._store(width), self._store(width)
        self._channels: HiddenStore | None = None
        self.additive = False
        self.attention: str | None = None

    def _store(self, width: int) -> HiddenStore:
        shape = (1, *self.stream.ids.shape, width)
        dtype, device = self.stream.store.dtype, self.model.device
        return HiddenStore(shape, dtype, None, device=device, place=self.place)

    def channels(self, width: int) -> HiddenStore:
        """Room for `width` FFN channels of every token or more, for one pruning at a time."""
        if self._channels is None or self._channels.shape[-1] < width:
            self._channels = None  # the old one's memory first
            self._channels = self._store(width)
        return self._channels

    @torch.no_grad()
    def run(self, number: int, layer: nn.Module) -> None:
        """Run the resident layer, its weights as the checkpoint has them."""
        ffns = self.model.ffns(number)
        self.additive = self._is_additive(number, layer, ffns)
        self.attention = self._attention_output(number, layer) if self.additive else None

        def use(part: slice, output: torch.Tensor, seen: Seen) -> None:
            self.leaving.put(0, part, output)
            if self.additive:
                self.before.put(0, part, output - seen[0][3].view_as(output))

        run_observed(self.stream, number, layer, use)

    def step(self) -> None:
        """Go on to the next layer: what left is what enters."""
        self.stream.hidden, self.leaving = self.leaving, self.stream.store

    def _is_additive(self, number: int, layer: nn.Module, ffns: list[Ffn]) -> bool:
        if len(ffns) != 1 or ffns[0].stacked:
            return False
        entering, output, added = self._try(number, layer)
        handle = ffns[0].module.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
        try:
            without = self.model.run_layer(layer, entering, self.stream.calls[0][number])
        finally:
            handle.remove()
        return adds(output - without, added, output)

    def _attention_output(self, number: int, layer: nn.Module) -> str | None:
        site = self.model.ffns(number)[0].site
        inside = {*site.rows, site.down}
        outputs: dict[str, torch.Tensor] = {}
        handles = []
        for name, module in layer.named_modules():
            if name not in inside and type(module).__name__ in ("Linear", "Conv1D"):

                def keep(_: nn.Module, __: object, output: torch.Tensor, key: str = name) -> None:
                    outputs[key] = output

                handles.append(module.register_forward_hook(keep))
        try:
            entering, output, from_ffn = self._try(number, layer)
        finally:
            for handle in handles:
                handle.remove()
        added = output - from_ffn - entering
        for name, found in outputs.items():
            if found.numel() == added.numel() and adds(added, found.view_as(added), output):
                return name
        return None

    def _try(self, number: int, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What enters a layer with one FFN, what leaves it, and what its FFN puts out, on the first micro-batch."""
        entering = self.stream.store.get(0, self.stream.slices[0], self.model.device)
        seen: Seen = []
        with observed(self.model.ffns(number), functools.partial(_note, seen)):
            output = self.model.run_layer(layer, entering, self.stream.calls[0][number])
        return entering, output, seen[0][3].view_as(output)


def _note(
    seen: Seen, unit: str, tokens: torch.Tensor | None, channels: torch.Tensor, output: torch.Tensor
) -> None:
    """Remember what went through an FFN; its output as it is now, since some layers (Falcon's) add to it in place."""
    seen.append((unit, tokens, channels, output.clone()))


def run_observed(
    stream: TokenStream, number: int, layer: nn.Module, use: Callable[[slice, torch.Tensor, Seen], None]
) -> None:
    """Run every micro-batch and call `use(blocks, output, what went through each FFN)`; the stream stays where it is."""
    seen: Seen = []
    with observed(stream.model.ffns(number), functools.partial(_note, seen)):
        for part, calls in zip(stream.slices, stream.calls, strict=True):
            entering = stream.store.get(0, part, stream.model.device)
            use(part, stream.model.run_layer(layer, entering, calls[number]), seen)
            seen.clear()
