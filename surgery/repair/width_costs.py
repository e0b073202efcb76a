"""What widths per layer cost together: KL to the dense model at given ones, and with one changed.

Sensitivity (`measure_sensitivity`) asks the same of a model whose other layers are whole. Costs do not add:
single ones say little about which layer of a model cut by half should get more. Here all layers have their
widths, what else a plan removes is gone, and every layer is repaired as a prune repairs it: on the pruned
model's own inputs, its attention too. Only for the other widths of a layer is the ridge not chosen again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from surgery.budget.sensitivity_cost import SensitivityCost
from surgery.cut.ffn_channels import ffn_group
from surgery.cut.groups import Cut
from surgery.cut.slice_edits import mask_members, sublayer_groups, without_members
from surgery.engine.hooks import preserved
from surgery.engine.loss import measure_divergence
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.plan.kind_plan import WHOLE_FFN
from surgery.progress import Progress, no_progress
from surgery.repair.dense_reference import DenseReference
from surgery.repair.layer_repair import LayerRepair, apply_change
from surgery.repair.least_squares import Moments, refit
from surgery.repair.methods import RepairMethod
from surgery.repair.sensitivity import split_blocks
from surgery.repair.stored_weights import LayerRepairResult


@dataclass(frozen=True)
class WidthCosts:
    """`kl` at the widths; `others[layer][width]` with that layer at another width. Nats a token."""

    kl: float
    others: list[dict[int, float]]


@torch.no_grad()
def measure_width_costs(
    model: StreamedModel,
    ids: torch.Tensor,
    orders: list[torch.Tensor],
    widths: list[int],
    others: list[list[int]],
    cut: Cut,
    method: RepairMethod,
    cost: SensitivityCost,
    progress: Progress[Any] = no_progress,
) -> WidthCosts:
    """KL(dense || pruned) of all layers at `widths`, and with one of them at one of `others`.

    `ids` [N, T], `orders` and `cost` are as of `measure_sensitivity`, as are the blocks that are measured and
    those that layers are repaired on, by `method`. `cut` says what goes besides FFN channels; a layer without
    an FFN has width 0. One pass over the layers; every other width is a copy of the hidden states that
    branches off at its layer, through later layers that are repaired for `widths`.
    """
    count = len(model.layers)
    fitted, held_out = split_blocks(ids)
    dense = TokenStream(model, held_out, micro_batch=cost.micro_batch)
    pruned = dense.fork(len(held_out), 0, cost.branches_on)
    branches: list[tuple[int, int, TokenStream]] = []
    refits = _Refits(model, fitted, orders, cut, method, cost)
    for number, layer in progress(model.stream_layers(range(count)), "widths", count):
        dense.forward(number, layer)
        refits.reference(number, layer)
        if number not in cut.skipped:
            earlier = list(branches)
            with preserved(layer):
                refits.begin(number, layer, widths[number], max([widths[number], *others[number]]))
                for width in others[number]:
                    refits.narrow(width)
                    branch = pruned.fork(len(held_out), number, cost.branches_on)
                    branch.forward(number, layer)
                    branches.append((number, width, branch))
                refits.end()
                with refits.narrowed():
                    for _, _, branch in earlier:
                        branch.forward(number, layer)
                    pruned.forward(number, layer)
        refits.step()
    found = measure_divergence(model, dense, [pruned, *(branch for *_, branch in branches)])
    costs: list[dict[int, float]] = [{} for _ in range(count)]
    for (number, width, _), one in zip(branches, found[1:], strict=True):
        costs[number][width] = one.kl
    return WidthCosts(found[0].kl, costs)


class _Refits:
    """Repairs resident layers at any width of their FFN; all widths of a layer from the same moments.

    For every layer call `reference`; then, unless it goes, `begin`, `narrow` for each width that is tried,
    and `end`; then `step`.
    """

    def __init__(
        self,
        model: StreamedModel,
        ids: torch.Tensor,
        orders: list[torch.Tensor],
        cut: Cut,
        method: RepairMethod,
        cost: SensitivityCost,
    ) -> None:
        self.model, self.orders, self.method = model, orders, method
        others = sublayer_groups(cut)
        self.mask = mask_members(others, cut.kept)
        self.bare = {
            layer for (layer, group), kept in cut.kept.items() if group == WHOLE_FFN and not len(kept)
        }
        self.dense: DenseReference | None = None
        if method.changes_weights:
            self.dense = DenseReference(model, ids, cost.micro_batch, cost.branches_on)
            self.repair = LayerRepair(self.dense, replace(cut, kept=dict(cut.kept)), method)

    def reference(self, number: int, layer: nn.Module) -> None:
        """Run the layer as the dense model has it."""
        if self.dense is not None:
            self.dense.run(number, layer)

    def step(self) -> None:
        """Go to the next layer."""
        if self.dense is not None:
            self.dense.step()

    def begin(self, number: int, layer: nn.Module, width: int, widest: int) -> None:
        """Mask what goes besides channels, repair the attention, collect the moments of the channels of the
        `widest` that is tried, and choose the ridge for the width that the layer is to have.
        """
        self.number, self.resident, self.width = number, layer, width
        self.moments: Moments | None = None
        self.additive = False
        if self.dense is None:
            self.mask(number, layer)
        else:
            self.additive = self.repair.before_ffn(number, layer, LayerRepairResult())
        if number in self.bare:
            return
        (self.ffn,) = self.model.ffns(number)
        bias = self.ffn.down_bias()
        self.weight, self.bias = self.ffn.down_weight().clone(), None if bias is None else bias.clone()
        if self.dense is not None:
            self.tried = self._kept(widest)
            self.repair.kept[number, self.ffn.name] = self.tried.cpu()
            columns = {self.ffn.name: slice(0, widest)}
            found = self.repair.ffn_moments(number, layer, self.additive, columns, {}, last=True)
            split = found[self.ffn.name]
            self.best = refit(split.of_kept(*self._among(self._kept(width))), self._solve)
            self.moments = split.train + split.held_out

    def narrow(self, width: int) -> None:
        """Keep the best `width` channels of the FFN, refitted; a whole FFN stays as it is, unless it is to
        make up for what earlier layers lost.
        """
        weight, bias = self.ffn.down_weight(), self.ffn.down_bias()
        kept = self._kept(width)
        weight.zero_()
        weight[:, kept] = self.weight[:, kept]
        if bias is not None and self.bias is not None:
            bias.copy_(self.bias)
        if self.moments is None or (len(kept) == self.ffn.width and not self.additive):
            return
        change = self.best.change
        if width != self.width and self.best.ridge is not None:
            change = self._solve(self.moments.of_kept(*self._among(kept)), self.best.ridge)
        if change is not None:
            apply_change(self.ffn, kept, change, LayerRepairResult())

    def _kept(self, width: int) -> torch.Tensor:
        return self.orders[self.number][:width].sort().values.to(self.model.device)

    def _among(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of `kept` among the channels that moments were collected of, and the weights of those."""
        return torch.searchsorted(self.tried, kept), self.weight[:, self.tried]

    def _solve(self, moments: Moments, ridge: float) -> torch.Tensor:
        return self.method.solved(moments, ridge, self.ffn.bias_name is not None)

    def narrowed(self) -> AbstractContextManager[None]:
        """Within the block, the layer runs at its width alone, which takes less time than with masks."""
        if self.number in self.bare:
            return nullcontext()
        return without_members(self.resident, ffn_group(self.number, self.ffn), self._kept(self.width))

    def end(self) -> None:
        """Leave the layer at its width, and move the pruned stream that layers are repaired on through it."""
        if self.number not in self.bare:
            self.narrow(self.width)
        if self.dense is None or not self.method.follows_pruned:
            return
        if self.additive and self.number not in self.bare:
            self.repair.add_ffn_output(self.number)
        else:
            self.repair.pruned.forward(self.number, self.resident)
