"""The channels of one layer as one pool, and the sample of them that a figure draws.

Shapes: F channels of a layer's main FFN, or of all its routed experts together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.chart import Series
from surgery.index.channel_index import LayerIndex

DRAWN = 150  # points of each group in the scatter plot of one layer
SEED = 12345
DIGITS = 4  # significant digits of a drawn point


@dataclass(frozen=True)
class Pool:
    """All channels of a layer's main FFN, or of all its routed experts concatenated.

    `statistics` by name [F]. `core` (the supernodes), `halo` and `top` are channel indices; `top` holds, for
    each statistic, as many of its largest channels as there are supernodes.
    """

    statistics: dict[str, torch.Tensor]
    core: torch.Tensor
    halo: torch.Tensor
    top: dict[str, torch.Tensor]


def pool(layer: LayerIndex) -> Pool:
    """The channels of a layer's routed experts, concatenated, or of its main FFN if it has no experts."""
    names = ("loss_proxy", "activation_power", "weight_norm", "halo_connectivity", "halo_redundancy")
    values: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    core: list[torch.Tensor] = []
    halo: list[torch.Tensor] = []
    top: dict[str, list[torch.Tensor]] = {"activation_power": [], "weight_norm": []}
    start = 0
    for part in layer.main:
        own = {**part.statistics, "weight_norm": part.weight_norm}
        for name in names:
            values[name].append(own[name].float())
        core.append(part.supernodes + start)
        halo.append(part.halo + start)
        for name, found in top.items():
            found.append(torch.topk(own[name], len(part.supernodes)).indices + start)
        start += part.width
    return Pool(
        {name: torch.cat(value) for name, value in values.items()},
        torch.cat(core),
        torch.cat(halo),
        {name: torch.cat(found) for name, found in top.items()},
    )


def drawn_note() -> str:
    """What every scatter plot leaves out."""
    return (
        f"In each layer at most {DRAWN} channels of each group are drawn, chosen at random (seed {SEED}); "
        f"the legend gives the counts. Coordinates are rounded to {DIGITS} digits. Zeros can't be drawn on a "
        "log scale."
    )


def rounded(value: float) -> float:
    """A coordinate rounded to DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}")


def others(count: int, *members: torch.Tensor) -> torch.Tensor:
    """Indices in range(count) that are in none of the groups."""
    outside = torch.ones(count, dtype=torch.bool)
    for group in members:
        outside[group] = False
    return outside.nonzero().flatten()


def sample(members: torch.Tensor, count: int, number: int) -> torch.Tensor:
    """At most `count` of some indices, at random; layer `number` seeds the choice."""
    generator = torch.Generator().manual_seed(SEED + number)
    return members[torch.randperm(len(members), generator=generator)[:count]]


def point_series(
    name: str, x: torch.Tensor, y: torch.Tensor, members: torch.Tensor, number: int, style: str
) -> Series:
    """A sample of some channels as points (x, y), without those where either is zero or below."""
    chosen = sample(members, DRAWN, number)
    pairs = zip(x[chosen].tolist(), y[chosen].tolist(), strict=True)
    points = [(rounded(a), rounded(b)) for a, b in pairs if a > 0 and b > 0]
    return Series(name, points=points, of=len(members), style=style)
