"""How many channels each layer keeps, when layers need not keep the same number."""

from __future__ import annotations

import heapq

import torch


def allocate(damages: list[torch.Tensor], step: int, floors: list[int], budget: int) -> list[int]:
    """Widths, multiples of `step`, that cost least in sum and stay within `budget` channels.

    damages[i] [F_i + 1]: cost of keeping the best k channels of layer i, for k = 0 … F_i, not increasing. From its
    floor each layer is widened a step at a time, always the one whose next step saves most a channel; a step that
    saves little before one that saves much is taken together with it, so that curves need not be convex. A full
    layer counts as a multiple. floors[i] is the fewest channels layer i may keep; what they sum to is always granted.
    """
    grids = [_grid(len(damage) - 1, step, floor) for damage, floor in zip(damages, floors, strict=True)]
    widths = [grid[0] for grid in grids]
    left = budget - sum(widths)
    queue: list[tuple[float, int, int]] = []

    def offer(layer: int) -> None:
        best = _best_step(
            damages[layer],
            [w for w in grids[layer] if widths[layer] < w <= widths[layer] + left],
            widths[layer],
        )
        if best is not None:
            heapq.heappush(queue, (-best[0], layer, best[1]))

    for layer in range(len(grids)):
        offer(layer)
    while queue:
        _, layer, target = heapq.heappop(queue)
        if target <= widths[layer] or target - widths[layer] > left:
            if target > widths[layer]:
                offer(layer)  # that far it can no longer go, but perhaps a part of the way
            continue
        left -= target - widths[layer]
        widths[layer] = target
        offer(layer)
    return widths


def _grid(width: int, step: int, floor: int) -> list[int]:
    first = min(width, max(step, -(-floor // step) * step))
    return sorted({*range(first, width, step), width}) if first < width else [width]


def _best_step(damage: torch.Tensor, targets: list[int], width: int) -> tuple[float, int] | None:
    """(saving a channel, width to go to) of the steepest chord from `width`."""
    chords = [(float(damage[width] - damage[target]) / (target - width), target) for target in targets]
    return max(chords, key=lambda chord: (chord[0], -chord[1])) if chords else None


def ranking(score: torch.Tensor, protected: torch.Tensor) -> torch.Tensor:
    """Channels [F], the most worth keeping first: protected ones, then by score; ties go to the lower index."""
    ranked = score.clone()
    ranked[protected] = torch.inf
    return ranked.sort(descending=True, stable=True).indices


def score_damage(score: torch.Tensor, protected: torch.Tensor) -> torch.Tensor:
    """Sum of the scores that go when the best k channels stay, [F + 1] for k = 0 … F; protected ones stay first."""
    damage = score.double()
    gone = damage[ranking(damage, protected)].flip(0).cumsum(0).flip(0)
    return torch.cat([gone, gone.new_zeros(1)])


def standardised(score: torch.Tensor) -> torch.Tensor:
    """z-scores within a layer, shifted to be positive: layers compared as FLAP's adaptive search does (AAAI 2024)."""
    centred = score.double() - score.double().mean()
    z = centred / centred.std().clamp_min(torch.finfo(torch.float64).tiny)
    return z - z.min()
