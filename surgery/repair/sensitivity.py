"""Sensitivity: KL to the dense model with one layer pruned to each of five widths, for every layer.

One forward pass. At each layer, for each width, the best channels by score are kept and refitted by least
squares; a copy of a few calibration blocks branches off through that layer and runs on beside the others,
each layer being read once for all branches. Layers differ by a factor of fifty, and no score predicts it. The
measure is KL divergence from the dense model rather than loss: it can't be negative and, on so few tokens,
has far less noise.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from surgery.budget.sensitivity_cost import FIT_BLOCKS, FRACTIONS, SensitivityCost, measured_blocks
from surgery.engine.device import wide_dtype
from surgery.engine.hooks import observed
from surgery.engine.loss import measure_divergence
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.errors import PlanError
from surgery.model.families import DENSE
from surgery.model.meta_model import MetaModel
from surgery.progress import Progress, no_progress
from surgery.repair.least_squares import Moments, inverse_power, least_squares

RIDGE = 0.01


def measure_sensitivity(
    model: StreamedModel,
    ids: torch.Tensor,
    orders: list[torch.Tensor],
    cost: SensitivityCost,
    progress: Progress[Any] = no_progress,
) -> list[torch.Tensor]:
    """KL(dense || pruned), in nats a token, that each layer costs at every width, [F + 1], linear between
    measured widths.

    `ids` [N, T] are calibration blocks; `orders[i]` the channels of layer i, the most worth keeping first;
    `cost` says how it is run. Raises PlanError for a model whose layers have anything but one dense FFN.
    """
    check_sensitivity_measurable(model.meta_model)
    count = len(model.layers)
    fitted, held_out = split_blocks(ids)
    base = TokenStream(model, held_out, micro_batch=cost.micro_batch)
    fit = TokenStream(model, fitted, micro_batch=cost.micro_batch)
    branches: list[tuple[int, int, TokenStream]] = []
    for number, layer in progress(model.stream_layers(range(count)), "sensitivity", count):
        for _, _, branch in branches:
            branch.forward(number, layer)
        branches += _branch(model, fit, base, number, layer, orders[number], cost.branches_on)
        base.forward(number, layer)
        fit.forward(number, layer)
    costs: list[dict[int, float]] = [{} for _ in range(count)]
    measured = measure_divergence(model, base, [branch for *_, branch in branches])
    for (number, width, _), found in zip(branches, measured, strict=True):
        costs[number][width] = found.kl
    return [_interpolate(cost, len(order)) for cost, order in zip(costs, orders, strict=True)]


def split_blocks(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of calibration blocks [N, T], those that are refitted on and those that are measured, the last ones.

    Blocks that a refit has seen would flatter it; where there is only one block, both are that.
    """
    few = measured_blocks(*ids.shape)
    return (ids[:-few] if len(ids) > few else ids)[:FIT_BLOCKS], ids[-few:]


def check_sensitivity_measurable(meta_model: MetaModel) -> None:
    """Raise PlanError for a model whose layers have anything but one dense FFN."""
    if any([ffn.name for ffn in ffns] != [DENSE] for ffns in meta_model.ffns):
        raise PlanError(
            "sensitivity is measured for models with one dense FFN in every layer",
            where=meta_model.checkpoint.name,
            next_step="use --allocation score",
        )


@torch.no_grad()
def _branch(
    model: StreamedModel,
    fit: TokenStream,
    base: TokenStream,
    number: int,
    layer: nn.Module,
    order: torch.Tensor,
    place: str,
) -> list[tuple[int, int, TokenStream]]:
    """Copies of `base` at the output of the resident layer, pruned to each width; the layer is as before
    afterwards.
    """
    weight = model.ffns(number)[0].down_weight()
    original = weight.clone()
    gram = _channel_gram(model, fit, number, layer)
    branches = []
    for width in sorted({max(1, round(fraction * len(order))) for fraction in FRACTIONS}):
        _narrow(weight, original, gram, order[:width])
        branch = base.fork(len(base.ids), number, place)
        branch.forward(number, layer)
        branches.append((number, width, branch))
    weight.copy_(original)
    return branches


def _channel_gram(model: StreamedModel, fit: TokenStream, number: int, layer: nn.Module) -> torch.Tensor:
    """Second moments [F, F] of all channels of the layer's FFN, tokens weighted as in repair."""
    width = model.ffns(number)[0].width
    total = torch.zeros(width, width, dtype=wide_dtype(model.device), device=model.device)
    seen: list[torch.Tensor] = []
    with observed(model.ffns(number), lambda call: seen.append(call.u)):
        for part, calls in zip(fit.slices, fit.calls, strict=True):
            output = model.run_layer(layer, fit.store.get(0, part, model.device), calls[number])
            u = seen.pop().flatten(0, -2).float() * inverse_power(output).flatten().sqrt()[:, None]
            total += u.T @ u
    return total


def _narrow(weight: torch.Tensor, original: torch.Tensor, gram: torch.Tensor, channels: torch.Tensor) -> None:
    """Write into down projection `weight` [D, F] its `original` with only `channels`, refitted by `gram`."""
    kept = channels.sort().values.to(weight.device)
    if len(kept) == weight.shape[1]:
        weight.copy_(original)
        return
    weight.zero_()
    weight[:, kept] = (original[:, kept].double() + _refit(gram, original, kept)).to(weight.dtype)


def _refit(gram: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Change of the kept columns that best makes up for the removed ones, from all channels' moments."""
    nothing = gram.new_zeros(())  # is left while all channels stay
    whole = Moments(gram, gram.new_zeros(weight.shape), nothing, nothing)
    return least_squares(whole.of_kept(kept, weight), RIDGE)


def _interpolate(costs: dict[int, float], width: int) -> torch.Tensor:
    """Costs at all widths, never rising with width: linear between measured widths, extrapolated below."""
    known = sorted(costs)
    points = {width: 0.0}
    for place in reversed(known):
        points[place] = max(costs[place], points[min(p for p in points if p > place)])
    places = sorted(points)
    curve = torch.zeros(width + 1, dtype=torch.float64)
    for left, right in pairwise(places):
        curve[left : right + 1] = torch.linspace(
            points[left], points[right], right - left + 1, dtype=torch.float64
        )
    slope = (points[places[0]] - points[places[1]]) / (places[1] - places[0])
    for place in range(places[0]):
        curve[place] = points[places[0]] + slope * (places[0] - place)
    return curve
