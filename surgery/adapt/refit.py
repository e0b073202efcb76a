"""Refits what an adapter's down projection reads, from what the dense model's layers and the cut one's hold.

A of down reads all F channels of the dense model, u [T, F]; cut, it reads the kept ones of the cut model,
v [T, K]. A repair made the weights W_down predict the output of all channels from v; this does the same for
A, row by row, by the same least squares (`repair.least_squares`):

    minimise over A' [r, K]   sum_t w_t ||A u_t - A' v_t||^2 + ridge * tr(dA S dA'),   A' = A_kept + dA

with one over the token's power in the dense residual stream as w_t. B stays, and so does all that A' reads no
better on held-out blocks than A_kept does. The repaired weights alone do not say this map: they are D numbers
for each kept channel where A needs r others, and D is less than F.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.adapt.adapt import A, Carrier
from surgery.adapt.carry import Target
from surgery.budget.model_size import ModelSize
from surgery.budget.pass_cost import PassCost, PassJob, StreamShape, pass_cost
from surgery.budget.repair_cost import held_out_blocks
from surgery.cut.tensors import Take, TensorEdit
from surgery.engine.hooks import FfnCall, observed
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.errors import CalibrationError, UsageError
from surgery.progress import Progress, no_progress
from surgery.repair.least_squares import Refit, SplitMoments, inverse_power, least_squares, refit
from surgery.text import TokenBlocks

GRAM_BYTES = 48  # per pair of kept channels: two float64 moments, and the copies that solving makes


@dataclass(frozen=True)
class DownRefit:
    """The refitted A' [r, K] of one down projection, and how well it reads the dense channels.

    `refit` has the ridge and the unexplained shares of A u on held-out blocks, with A_kept and with A'.
    """

    a: torch.Tensor
    refit: Refit


def check_dense(carrier: Carrier, dense: Model) -> None:
    """Raise UsageError unless `dense` has the channels that the folder was cut from."""
    widths = {
        (number, ffn.name): ffn.width for number, ffns in enumerate(dense.meta_model.ffns) for ffn in ffns
    }
    for target in carrier.down.values():
        assert target.ffn is not None
        if widths.get(target.ffn) != target.shape[1]:
            raise UsageError(
                "this is not the model that the folder was cut from",
                where=dense.name,
                expected=f"{target.shape[1]} channels in layer {target.ffn[0]}, {target.ffn[1]}",
                found=str(widths.get(target.ffn, "none")),
                next_step="name it with --dense",
            )


def refit_json(found: dict[str, DownRefit], text: TokenBlocks) -> dict[str, Any]:
    """The entry `refit` of the adapter's surgeon.json: on what, and for each module how well."""
    modules = {
        module: {
            "ridge": one.refit.ridge,
            "held_out_before": one.refit.before,
            "held_out_after": one.refit.after,
        }
        for module, one in found.items()
    }
    return {"text": text.as_json(), "modules": modules}


def refit_cost(carrier: Carrier, dense: Model, blocks: int, block_size: int) -> PassCost:
    """What the pass over both models takes. Raises MemoryBudgetError."""
    size = ModelSize.of(dense.meta_model, dense.run.dtype, block_size, dense.run.device.type)
    kept = max((len(one.columns) for one in carrier.down.values() if one.columns is not None), default=0)
    beside = 2 * size.layer + GRAM_BYTES * kept**2
    job = PassJob((StreamShape(blocks, block_size, copies=2),), beside=beside)
    return pass_cost(dense.meta_model, job, dense.run)


@torch.no_grad()
def refit_down(
    carrier: Carrier, dense: Model, ids: torch.Tensor, progress: Progress[Any] = no_progress
) -> dict[str, DownRefit]:
    """Module -> refit of every adapted down projection, on blocks of token ids [N, T].

    Both models run side by side, one layer of each in memory. Raises CalibrationError for fewer than two
    blocks, UsageError for another dense model, MemoryBudgetError.
    """
    check_dense(carrier, dense)
    if len(ids) < 2:
        raise CalibrationError("refitting takes two blocks of text or more", found=str(len(ids)))
    cost = refit_cost(carrier, dense, *ids.shape)
    step = cost.blocks_together(ids.shape[1])
    models = [StreamedModel(dense), StreamedModel(carrier.model)]
    streams = [TokenStream(model, ids, micro_batch=step, place=cost.hidden_on) for model in models]
    numbers = range(len(models[0].layers))
    layers = zip(*(model.stream_layers(numbers) for model in models), strict=True)
    found: dict[str, DownRefit] = {}
    for (number, wide), (_, narrow) in progress(layers, "layers", len(numbers)):
        here = {t.ffn[1]: t for t in carrier.down.values() if t.ffn is not None and t.ffn[0] == number}
        layer = _LayerRefit(carrier, here, streams, len(ids) - held_out_blocks(len(ids)))
        layer.run_dense(number, wide)
        layer.run_cut(number, narrow)
        found |= layer.solved()
    return found


class _LayerRefit:
    """The refits of one layer: A u of every token from the dense model, then moments with the cut one's v."""

    def __init__(
        self, carrier: Carrier, targets: dict[str, Target], streams: list[TokenStream], first_held: int
    ) -> None:
        self.dense, self.cut = streams
        self.targets = targets
        self.first_held = first_held
        device = self.dense.model.device
        self.full: dict[str, torch.Tensor] = {}
        self.kept: dict[str, torch.Tensor] = {}
        for name, target in targets.items():
            assert target.columns is not None
            full = carrier.adapter.tensors[f"{target.module}.{A}"].float().to(device)
            self.full[name] = full
            self.kept[name] = TensorEdit("", (Take(1, target.columns.to(device)),)).apply(full)
        self.wanted: dict[str, list[torch.Tensor]] = {name: [] for name in targets}
        self.moments: dict[str, SplitMoments] = {}

    def run_dense(self, number: int, layer: nn.Module) -> None:
        """Move the dense stream through its layer; keeps A u [n T, r] of every micro-batch."""

        def use(call: FfnCall) -> None:
            if call.ffn in self.targets:
                self.wanted[call.ffn].append(call.u.flatten(0, -2).float() @ self.full[call.ffn].T)

        with observed(self.dense.model.ffns(number), use):
            self.dense.forward(number, layer)

    def run_cut(self, number: int, layer: nn.Module) -> None:
        """Move the cut stream through its layer, and add its channels v to the moments."""
        done = dict.fromkeys(self.targets, 0)

        def use(call: FfnCall) -> None:
            if call.ffn not in self.targets:
                return
            name, batch = call.ffn, done[call.ffn]
            done[name] += 1
            part, kept = self.dense.slices[batch], self.kept[name]
            if name not in self.moments:
                rank, inputs = kept.shape
                self.moments[name] = SplitMoments.zeros(rank, inputs, kept.device, self.first_held)
            weights = inverse_power(self.dense.last_hidden(part))  # the one slot holds the layer's output
            wanted, self.wanted[name][batch] = self.wanted[name][batch], torch.empty(0)
            self.moments[name].add(part, call.u, wanted, kept, weights)

        with observed(self.cut.model.ffns(number), use):
            self.cut.forward(number, layer)

    def solved(self) -> dict[str, DownRefit]:
        """Module -> refit; A_kept stays where no ridge reads held-out blocks better."""
        found = {}
        for name, moments in self.moments.items():
            result, a = refit(moments, least_squares), self.kept[name]
            if result.change is not None:
                a = (a.to(result.change) + result.change).float()
            found[self.targets[name].module] = DownRefit(a.cpu(), result.without_change())
        return found
