"""Allocation: how many channels each layer keeps when layers may have different widths."""

from __future__ import annotations

import heapq

import torch


def allocate(damages: list[torch.Tensor], step: int, floors: list[int], budget: int) -> list[int]:
    """Widths, multiples of `step`, that minimise the summed damage within `budget` channels (greedy).

    damages[i] [F_i + 1]: cost of keeping the best k channels of layer i, for k = 0 … F_i, not increasing.
    Each layer starts at its floor. The layer whose next step saves the most damage per channel is widened
    first. A step may span several multiples, so that damages need not be convex. A full layer counts as a
    multiple. floors[i] is the smallest number of channels that layer i may keep; floors are kept even where
    they exceed `budget` in sum.
    """
    grids = [_grid(len(damage) - 1, step, floor) for damage, floor in zip(damages, floors, strict=True)]
    widths = [grid[0] for grid in grids]
    remaining = budget - sum(widths)
    queue: list[tuple[float, int, int]] = []

    def offer(layer: int) -> None:
        best = _best_step(
            damages[layer],
            [w for w in grids[layer] if widths[layer] < w <= widths[layer] + remaining],
            widths[layer],
        )
        if best is not None:
            heapq.heappush(queue, (-best[0], layer, best[1]))

    for layer in range(len(grids)):
        offer(layer)
    while queue:
        _, layer, target = heapq.heappop(queue)
        if target <= widths[layer] or target - widths[layer] > remaining:
            if target > widths[layer]:
                offer(layer)  # the rest of the budget may allow a smaller step
            continue
        remaining -= target - widths[layer]
        widths[layer] = target
        offer(layer)
    return widths


def _grid(width: int, step: int, floor: int) -> list[int]:
    first = min(width, max(step, -(-floor // step) * step))
    return sorted({*range(first, width, step), width}) if first < width else [width]


def _best_step(damage: torch.Tensor, targets: list[int], width: int) -> tuple[float, int] | None:
    """The step from `width` that saves most damage per channel: (saving per channel, new width), or None."""
    chords = [(float(damage[width] - damage[target]) / (target - width), target) for target in targets]
    return max(chords, key=lambda chord: (chord[0], -chord[1])) if chords else None


def ranking(score: torch.Tensor, protected: torch.Tensor) -> torch.Tensor:
    """Channel indices [F] from most to least important: protected channels, then by score, then by index."""
    ranked = score.clone()
    ranked[protected] = torch.inf
    return ranked.sort(descending=True, stable=True).indices


def score_damage(score: torch.Tensor, protected: torch.Tensor) -> torch.Tensor:
    """Sum of the removed scores when the first k channels of `ranking` are kept, [F + 1] for k = 0 … F."""
    damage = score.double()
    removed = damage[ranking(damage, protected)].flip(0).cumsum(0).flip(0)
    return torch.cat([removed, removed.new_zeros(1)])


def standardised(score: torch.Tensor) -> torch.Tensor:
    """z-scores within a layer, shifted so that the smallest is 0 (FLAP's adaptive search, AAAI 2024)."""
    centred = score.double() - score.double().mean()
    z = centred / centred.std().clamp_min(torch.finfo(torch.float64).tiny)
    return z - z.min()
