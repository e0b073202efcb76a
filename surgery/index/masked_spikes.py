"""Second round of the search: spikes that appear only where those of the first round are taken out.

A model can hold a spare: a channel that stays silent while another makes the spike, and makes it when the
other is gone. Each then hides the other from a search, and from an ablation of one at a time. In the second
round a prompt runs beside itself without every channel found so far; what spikes there is found, taken out
too, and so on through the layers.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.index.spikes import MAX_PER_LAYER, RowSpike, creates_spike, ffn_activations, largest_spike
from surgery.index.super_weights import SuperWeight
from surgery.model.ffn import ffn_named


class MaskedSearch:
    """Searches one prompt for masked spikes, with the channels and rows found so far set to zero.

    Call `forward` with each resident layer.
    """

    def __init__(self, model: StreamedModel) -> None:
        self.model = model
        self.without: TokenStream | None = (
            None  # the prompt without what was found; None while that is nothing
        )

    def forward(
        self, number: int, layer: nn.Module, before: TokenStream, known: list[SuperWeight | RowSpike]
    ) -> list[SuperWeight | RowSpike]:
        """Run the prompt without what was found before and without `known`, which this layer holds.

        `before` is the intact prompt before the layer. Returns what else makes a spike. All weights are
        restored at the end.
        """
        if self.without is None:
            if not known:
                return []
            self.without = before
        ffns = self.model.ffns(number)
        originals = {ffn.name: ffn.down_weight().clone() for ffn in ffns if not ffn.stacked or known}
        found: list[SuperWeight | RowSpike] = []
        for one in known:
            self._take_out(number, one)
        while True:
            trial = self.without.fork(1, number)
            activations = ffn_activations(self.model, number, layer, trial)
            residual = trial.store.get(0, slice(0, 1), self.model.device)[0]
            spikes = [
                largest_spike(number, name, seen, ffn_named(ffns, name).down_weight(), originals[name])
                for name, seen in activations.items()
                if name in originals
            ]
            spikes = [one for one in spikes if one is not None and creates_spike(one, residual)]
            if not spikes or len(found) == MAX_PER_LAYER:
                break
            spike = max((one for one in spikes if one is not None), key=lambda one: abs(one.output))
            peak = float(residual[spike.token, spike.row])
            found.append(
                replace(spike, round=2, residual=peak)
                if isinstance(spike, SuperWeight)
                else replace(spike, round=2)
            )
            self._take_out(number, spike)
        self.without = trial
        for name, original in originals.items():
            ffn_named(ffns, name).down_weight().copy_(original)
        return found

    def _take_out(self, number: int, one: SuperWeight | RowSpike) -> None:
        """Set the channel of a weight, or the row of a row spike, to zero in the resident layer."""
        weight = ffn_named(self.model.ffns(number), one.ffn).down_weight()
        if isinstance(one, SuperWeight):
            weight[:, one.column] = 0
        else:
            weight[one.row] = 0
