"""DenseReference: the dense model's hidden states that a repair aims at, and how each layer adds to its
residual stream.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from surgery.budget.repair_cost import held_out_blocks
from surgery.engine import distributed
from surgery.engine.hidden_store import HiddenStore
from surgery.engine.hooks import FfnCall, module_outputs, observed
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.model.ffn import Ffn
from surgery.repair.least_squares import adds
from surgery.repair.mixture import adds_experts


class DenseReference:
    """Calibration blocks in the dense model: `run` each resident layer, then `step` to the next.

    Between the two, `stream` holds the layer's input and `leaving` its output. In a layer that is `additive`
    (it adds its only FFN's output, unscaled, to the residual stream) `before` is the stream before the FFN,
    and `attention` names the linear whose output, added to the layer's input, makes it; None where no linear
    does. A layer is a `mixture` where it adds its routed experts' outputs, times the router's weights.
    Several prunings may share one reference. `place` is where hidden states are stored, as for `HiddenStore`.

    The last blocks, one in HELD_OUT and at least one, are held out: they choose ridges and the final norm's
    scale. `first_held` is the first of them. With `shared`, the blocks `ids` [N, T] are shared out to all
    processes: each has some of them, for which `first_held` may lie outside, and all say the same of a layer.
    """

    def __init__(
        self,
        model: StreamedModel,
        ids: torch.Tensor,
        micro_batch: int,
        place: str = "device",
        *,
        shared: bool = False,
    ) -> None:
        self.model = model
        self.place = place
        self.shared = shared
        own = distributed.shard(len(ids)) if shared else slice(0, len(ids))
        held_out = held_out_blocks(len(ids))
        self.held_out_tokens = held_out * ids.shape[1]
        self.first_held = len(ids) - held_out - own.start
        self.stream = TokenStream(model, ids[own], micro_batch=micro_batch, place=place)
        width = self.stream.store.shape[-1]
        self.leaving, self.before = self._store(width), self._store(width)
        self._channels: HiddenStore | None = None
        self.additive = False
        self.attention: str | None = None
        self.mixture = False

    def _store(self, width: int) -> HiddenStore:
        shape = (1, *self.stream.ids.shape, width)
        return HiddenStore(shape, self.stream.store.dtype, self.model.device, self.place)

    def channels(self, width: int) -> HiddenStore:
        """A store for at least `width` FFN channels of every token, for one pruning at a time."""
        if self._channels is None or self._channels.shape[-1] < width:
            self._channels = None  # free the old one's memory first
            self._channels = self._store(width)
        return self._channels

    @torch.no_grad()
    def run(self, number: int, layer: nn.Module) -> None:
        """Run the resident layer, its weights as the checkpoint has them."""
        ffns = self.model.ffns(number)
        additive = self._is_additive(number, layer, ffns)
        attention = self._attention_output(number, layer) if additive else None
        said = (additive, attention, adds_experts(ffns, partial(self._first, number, layer)))
        self.additive, self.attention, self.mixture = distributed.first_value(said) if self.shared else said

        def use(part: slice, output: torch.Tensor, calls: list[FfnCall]) -> None:
            self.leaving.put(0, part, output)
            if self.additive:
                self.before.put(0, part, output - calls[0].y.view_as(output))

        self.stream.run_observed(number, layer, use)

    def step(self) -> None:
        """Go to the next layer: this layer's output is its input."""
        self.stream.hidden, self.leaving = self.leaving, self.stream.store

    def _is_additive(self, number: int, layer: nn.Module, ffns: list[Ffn]) -> bool:
        if len(ffns) != 1 or ffns[0].stacked:
            return False
        _, output, added = self._try(number, layer)
        with module_outputs({"ffn": ffns[0].module}, lambda _, out: torch.zeros_like(out)):
            without = self._first(number, layer)
        return adds(output - without, added, output)

    def _attention_output(self, number: int, layer: nn.Module) -> str | None:
        site = self.model.ffns(number)[0].site
        linears = {
            name: module
            for name, module in layer.named_modules()
            if name not in {*site.in_projections, site.down} and type(module).__name__ in ("Linear", "Conv1D")
        }
        outputs: dict[str, torch.Tensor] = {}
        with module_outputs(linears, lambda name, output: outputs.__setitem__(name, output)):
            entering, output, from_ffn = self._try(number, layer)
        added = output - from_ffn - entering
        for name, found in outputs.items():
            if found.numel() == added.numel() and adds(added, found.view_as(added), output):
                return name
        return None

    def _first(self, number: int, layer: nn.Module) -> torch.Tensor:
        """Output of a layer for the first micro-batch."""
        return self.model.run_layer(layer, self._entering(), self.stream.calls[0][number])

    def _entering(self) -> torch.Tensor:
        """Input of the layer for the first micro-batch."""
        return self.stream.store.get(0, self.stream.slices[0], self.model.device)

    def _try(self, number: int, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input and output of a layer with one FFN, and that FFN's output, on the first micro-batch."""
        outputs: list[torch.Tensor] = []
        # a copy: some layers (Falcon's) add to the FFN's output in place
        with observed(self.model.ffns(number), lambda call: outputs.append(call.y.clone())):
            output = self._first(number, layer)
        return self._entering(), output, outputs[0].view_as(output)
