"""Repair of the linear through which attention writes to the residual stream, before the FFN is repaired."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from surgery.budget.repair_cost import column_blocks
from surgery.engine.hooks import input_of
from surgery.engine.token_stream import TokenStream
from surgery.repair.dense_reference import DenseReference
from surgery.repair.least_squares import SplitMoments, refit, summed
from surgery.repair.methods import RepairMethod
from surgery.repair.stored_weights import LayerRepairResult, WeightDelta


def repair_attention(
    method: RepairMethod,
    dense: DenseReference,
    pruned: TokenStream,
    number: int,
    layer: nn.Module,
    budget: int | None,
    result: LayerRepairResult,
    kept: torch.Tensor | None = None,
    last: bool = False,
) -> None:
    """Refit linear `dense.attention` in place, so that the pruned stream before the FFN comes to the dense
    one's; with `last`, where the FFN goes, so that the one after the layer does.

    Its inputs are solved for in several column blocks, one after the other, where `budget` bytes ask for it.
    `kept` are the inputs that stay, where some heads go. What was done is noted in `result`.
    """
    name = dense.attention
    assert name is not None
    linear = layer.get_submodule(name)
    parameter = linear.weight
    assert isinstance(parameter, torch.Tensor)
    transposed = type(linear).__name__ == "Conv1D"
    weight = parameter.data.t() if transposed else parameter.data
    device = dense.model.device
    bias = getattr(linear, "bias", None)
    aim = dense.leaving if last else dense.before
    count = weight.shape[1] if kept is None else len(kept)
    for part_of in column_blocks(count, len(weight), budget):
        block = part_of if kept is None else kept.to(device)[part_of]
        size = weight[:, block].shape[1]
        moments = SplitMoments.zeros(len(weight), size, device, dense.first_held)
        for part, calls in zip(pruned.slices, pruned.calls, strict=True):
            entering = pruned.store.get(0, part, device)
            entered = input_of(linear, partial(dense.model.run_layer, layer, entering, calls[number]))
            target = aim.get(0, part, device) - entering
            wanted = target if bias is None else target - bias
            weights = method.weights(dense.leaving.get(0, part, device))
            moments.add(part, entered, wanted, weight, weights, columns=block)
        moments = summed(moments) if dense.shared else moments
        found = refit(moments, lambda m, ridge: method.solved(m, ridge, has_bias=False))
        if found.change is not None:
            columns = torch.arange(weight.shape[1], device=device)[block]
            result.note(f"{name}.weight", WeightDelta(found.change, columns, transposed))
            weight[:, block] = (weight[:, block].to(found.change) + found.change).to(weight.dtype)
        result.attention.append(found.without_change())
