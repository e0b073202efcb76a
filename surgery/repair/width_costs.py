"""What widths per layer cost together: KL to the dense model at given ones, and with one changed.

Sensitivity (`measure_sensitivity`) asks the same of a model whose other layers are whole. Costs do not add:
single ones say little about which layer of a model cut by half should get more. Here all layers have their
widths, with the cheaper refit of sensitivity in place of the repair, and what else a plan removes is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from surgery.budget.sensitivity_cost import SensitivityCost
from surgery.cut.groups import Cut
from surgery.cut.slice_edits import mask_members, sublayer_groups
from surgery.engine.hooks import preserved
from surgery.engine.loss import measure_divergence
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.progress import Progress, no_progress
from surgery.repair.sensitivity import channel_gram, narrow, split_blocks


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
    cost: SensitivityCost,
    moments: dict[int, torch.Tensor] | None = None,
    progress: Progress[Any] = no_progress,
) -> WidthCosts:
    """KL(dense || pruned) of all layers at `widths`, and with one of them at one of `others`.

    `ids` [N, T], `orders` and `cost` are as of `measure_sensitivity`, as are the blocks that are measured and
    those that are refitted on. `cut` says what goes besides FFN channels; a layer without an FFN has width 0.
    One pass over the layers; every other width is a copy of the hidden states that branches off at its layer.
    Channels' moments are those of the dense model, by layer: they are added to `moments`, where that is
    given, and taken from there once they all are.
    """
    count = len(model.layers)
    fitted, held_out = split_blocks(ids)
    dense = TokenStream(model, held_out, micro_batch=cost.micro_batch)
    need = {number for number, width in enumerate(widths) if width}
    kept = moments if moments is not None and need <= moments.keys() else None
    fit = TokenStream(model, fitted, micro_batch=cost.micro_batch) if kept is None else None
    pruned = dense.fork(len(held_out), 0, cost.branches_on)
    branches: list[tuple[int, int, TokenStream]] = []
    mask = mask_members(sublayer_groups(cut), cut.kept)
    for number, layer in progress(model.stream_layers(range(count)), "widths", count):
        gram = kept[number] if kept is not None and widths[number] else None
        if fit is not None:
            gram = channel_gram(model, fit, number, layer) if widths[number] else None
            fit.forward(number, layer)
            if moments is not None and gram is not None:
                moments[number] = gram
        dense.forward(number, layer)
        if number in cut.skipped:
            continue
        earlier = list(branches)
        with preserved(layer):
            mask(number, layer)
            if gram is not None:
                weight = model.ffns(number)[0].down_weight()
                original = weight.clone()
                for width in others[number]:
                    narrow(weight, original, gram, orders[number][:width])
                    branch = pruned.fork(len(held_out), number, cost.branches_on)
                    branch.forward(number, layer)
                    branches.append((number, width, branch))
                narrow(weight, original, gram, orders[number][: widths[number]])
            for _, _, branch in earlier:
                branch.forward(number, layer)
            pruned.forward(number, layer)
    found = measure_divergence(model, dense, [pruned, *(branch for *_, branch in branches)])
    costs: list[dict[int, float]] = [{} for _ in range(count)]
    for (number, width, _), one in zip(branches, found[1:], strict=True):
        costs[number][width] = one.kl
    return WidthCosts(found[0].kl, costs)
