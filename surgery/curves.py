"""What cutting one layer costs, measured: how far the whole model goes astray with that layer alone at a few widths.

One forward pass. At each layer, for each width, the best channels by score are kept and refitted by least squares; a
copy of a few calibration blocks branches off through that layer and runs on beside the others, each layer being read
once for all branches. Curves differ by a factor of fifty between layers, and not as any score foretells. The measure is
KL divergence from the dense model rather than loss: it can't be negative and, on as few tokens, is far less noisy.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from surgery.devices import wide_dtype
from surgery.divergence import measure
from surgery.errors import PlanError
from surgery.ffn import DENSE, observed
from surgery.index import Track, untracked
from surgery.repair import Moments, least_squares, token_weights
from surgery.repair_memory import solve_bytes
from surgery.skeleton import Skeleton
from surgery.stream import StreamedModel
from surgery.tokens import TokenStream

FRACTIONS = (0.0625, 0.125, 0.25, 0.5, 0.75)  # of the width kept
MEASURE_TOKENS = 2048  # of calibration text that each branch runs
FIT_BLOCKS = 32  # calibration blocks the refits of the branches are made on
RIDGE = 0.01


def measure_curves(
    model: StreamedModel,
    ids: torch.Tensor,
    orders: list[torch.Tensor],
    micro_batch: int,
    track: Track[Any] = untracked,
    branch_bytes: int | None = None,
) -> list[torch.Tensor]:
    """KL(dense || cut), in nats a token, that each layer costs at every width, [F + 1], straight between those measured.

    `ids` [N, T] are calibration blocks; `orders[i]` the channels of layer i, the most worth keeping first. Branches
    that outgrow `branch_bytes` go to disk. Raises PlanError for a model whose layers have anything but one dense FFN.
    """
    check_measurable(model.skeleton)
    count = len(model.layers)
    few = max(1, min(MEASURE_TOKENS // ids.shape[1], len(ids) // 4))
    share = None if branch_bytes is None else branch_bytes // (count * len(FRACTIONS))
    base = TokenStream(model, ids[-few:], micro_batch=micro_batch)
    rest = ids[:-few][:FIT_BLOCKS] if len(ids) > few else ids  # what a refit has learnt is no measure of it
    fit = TokenStream(model, rest, micro_batch=micro_batch)
    branches: list[tuple[int, int, TokenStream]] = []
    for number, layer in track(model.walk(range(count)), "curves", count):
        for _, _, branch in branches:
            branch.forward(number, layer)
        branches += _branch(model, fit, base, number, layer, orders[number], share)
        base.forward(number, layer)
        fit.forward(number, layer)
    costs: list[dict[int, float]] = [{} for _ in range(count)]
    measured = measure(model, base, [branch for *_, branch in branches])
    for (number, width, _), found in zip(branches, measured, strict=True):
        costs[number][width] = found.kl
    return [_curve(cost, len(order)) for cost, order in zip(costs, orders, strict=True)]


def curve_bytes(width: int, outputs: int) -> int:
    """Bytes of matrices that measuring a layer of F = `width` channels and D = `outputs` takes at its peak.

    All channels' moments [F, F] and, for the largest fraction kept, its own and what solving takes.
    """
    kept = round(max(FRACTIONS) * width)
    return 8 * (width**2 + kept**2 + outputs * (width + kept)) + solve_bytes(kept, outputs)


def check_measurable(skeleton: Skeleton) -> None:
    """Raise PlanError for a model whose layers have anything but one dense FFN."""
    if any([ffn.key for ffn in ffns] != [DENSE] for ffns in skeleton.ffns):
        raise PlanError(
            "curves are measured for models with one dense FFN in every layer",
            where=skeleton.checkpoint.name,
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
    share: int | None,
) -> list[tuple[int, int, TokenStream]]:
    """Copies of `base` behind the resident layer, cut to each width; the layer is as before afterwards."""
    ffn = model.ffns(number)[0]
    weight = ffn.down_weight()
    original = weight.clone()
    gram = _gram(model, fit, number, layer)
    branches = []
    for width in sorted({max(1, round(fraction * len(order))) for fraction in FRACTIONS}):
        kept = order[:width].sort().values.to(weight.device)
        weight.zero_()
        weight[:, kept] = (original[:, kept].double() + _refit(gram, original, kept)).to(weight.dtype)
        branch = base.fork(len(base.ids), number, share)
        branch.forward(number, layer)
        branches.append((number, width, branch))
    weight.copy_(original)
    return branches


def _gram(model: StreamedModel, fit: TokenStream, number: int, layer: nn.Module) -> torch.Tensor:
    """Second moments [F, F] of all channels of the layer's FFN, tokens weighted as in repair."""
    width = model.ffns(number)[0].width
    total = torch.zeros(width, width, dtype=wide_dtype(model.device), device=model.device)
    seen: list[torch.Tensor] = []
    with observed(model.ffns(number), lambda _, __, u, ___: seen.append(u)):
        for part, calls in zip(fit.slices, fit.calls, strict=True):
            output = model.run_layer(layer, fit.store.get(0, part, model.device), calls[number])
            u = seen.pop().flatten(0, -2).float() * token_weights(output).flatten().sqrt()[:, None]
            total += u.T @ u
    return total


def _refit(gram: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Change of the kept columns that best makes up for the removed ones, from the moments of all channels."""
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[kept] = False
    between = gram[removed][:, kept]
    part = Moments.zeros(weight.shape[0], len(kept), weight.device)
    part.gram, part.cross = gram[kept][:, kept], weight[:, removed].to(between) @ between
    return least_squares(part, RIDGE)


def _curve(costs: dict[int, float], width: int) -> torch.Tensor:
    """Costs at all widths, never rising with width: straight between those measured, steeper by as much below them."""
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
