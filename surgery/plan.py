"""ResizePlan: which channels of which layer stay, and why. Made before a byte is written, and never changed after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from surgery.errors import PlanError
from surgery.importance import METHODS, PROTECTING
from surgery.index import ChannelIndex

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
GROUP_SIZES = (32, 64, 128, 256)
NARROW_MODEL = 4096


@dataclass(frozen=True)
class LayerPlan:
    """One layer: `kept` sorted channel indices [K]; `protected` those that may not go.

    `supernodes` there were and `supernodes_kept` there are; `lp_share_top` is the share of the layer's LP mass held by
    its supernodes, `lp_kept` the share held by the kept channels.
    """

    kept: torch.Tensor
    protected: torch.Tensor
    supernodes: int
    supernodes_kept: int
    lp_share_top: float
    lp_kept: float


@dataclass(frozen=True)
class ResizePlan:
    """The cut of a whole model. `sparsity` is the fraction of channels removed, after rounding."""

    method: str
    seed: int
    multiple_of: int
    width_before: int
    width_after: int
    layers: tuple[LayerPlan, ...]
    super_weights: tuple[dict[str, Any], ...]

    @property
    def sparsity(self) -> float:
        """Fraction of FFN channels removed, in [0, 1)."""
        return 1 - self.width_after / self.width_before

    def as_json(self) -> dict[str, Any]:
        """The `plan` entry of surgeon.json."""
        return {
            "method": self.method,
            "allocation": "uniform",
            "repair": "none",
            "seed": self.seed,
            "sparsity": self.sparsity,
            "multiple_of": self.multiple_of,
            "width_before": self.width_before,
            "width_after": self.width_after,
            "divides": deployability(self.width_after),
            "layers": [
                {
                    "width": len(layer.kept),
                    "supernodes": layer.supernodes,
                    "supernodes_kept": layer.supernodes_kept,
                    "lp_share_top": layer.lp_share_top,
                    "lp_kept": layer.lp_kept,
                    "protected": layer.protected.tolist(),
                    "kept": layer.kept.tolist(),
                }
                for layer in self.layers
            ],
        }


def rounded_width(width: int, sparsity: float, multiple_of: int) -> int:
    """Channels to keep: (1 - sparsity) * width to the nearest multiple; the whole width where sparsity is 0.

    Raises PlanError for a sparsity outside [0, 1), a width that rounds to zero, or a cut that rounds to nothing.
    """
    if not (math.isfinite(sparsity) and 0 <= sparsity < 1):
        raise PlanError(
            "sparsity out of range", where="--sparsity", expected="0 <= sparsity < 1", found=str(sparsity)
        )
    if multiple_of < 1:
        raise PlanError("not a multiple", where="--multiple-of", expected="1 or more", found=str(multiple_of))
    if sparsity == 0:
        return width
    kept = round((1 - sparsity) * width / multiple_of) * multiple_of
    smaller = f"use a smaller --multiple-of (now {multiple_of}) or --intermediate-size"
    if kept < 1:
        raise PlanError("the width would be zero", expected="at least one channel", next_step=smaller)
    if kept >= width:
        raise PlanError(
            f"rounding to a multiple of {multiple_of} removes nothing",
            expected=f"a width below {width}",
            found=f"{kept} at sparsity {sparsity}",
            next_step=smaller,
        )
    return kept


def default_multiple(width: int) -> int:
    """128, or 64 where the FFN is narrower than 4096 (design.md, Widths)."""
    return 128 if width >= NARROW_MODEL else 64


def make_plan(
    index: ChannelIndex,
    *,
    method: str = "scar-prot",
    sparsity: float | None = None,
    width: int | None = None,
    multiple_of: int | None = None,
    seed: int = 42,
) -> ResizePlan:
    """Choose the channels to keep from an index, the same number in every layer.

    Give `sparsity` in [0, 1) or an exact `width`. The SCAR methods never remove supernodes nor the column of a super
    weight; baselines protect nothing, and the plan says what they lose. Raises PlanError for a cut that can't be made.
    """
    if method not in METHODS:
        raise PlanError("unknown method", expected=", ".join(METHODS), found=method)
    before = index.layers[0].width
    multiple = default_multiple(before) if multiple_of is None else multiple_of
    if (sparsity is None) == (width is None):
        raise PlanError("give either a sparsity or a width", where="--sparsity, --intermediate-size")
    after = rounded_width(before, sparsity, multiple) if sparsity is not None else width
    assert after is not None
    if not 1 <= after <= before:
        raise PlanError(
            "width out of range", where="--intermediate-size", expected=f"1 to {before}", found=str(after)
        )
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for number, layer in enumerate(index.layers):
        score = METHODS[method](layer, generator).double()
        columns = torch.tensor([w.column for w in index.super_weights if w.layer == number], dtype=torch.long)
        protected = (
            torch.unique(torch.cat([layer.supernodes, columns])) if method in PROTECTING else columns[:0]
        )
        if len(protected) > after:
            raise PlanError(
                "more channels are protected than would be kept",
                where=f"layer {number}",
                expected=f"at most {after}",
                found=str(len(protected)),
                next_step="keep more channels",
            )
        kept = keep_highest(score, protected, after)
        survivors = int(torch.isin(layer.supernodes, kept).sum())
        top, held = (mass(layer.statistics["loss_proxy"], chosen) for chosen in (layer.supernodes, kept))
        layers.append(LayerPlan(kept, protected, len(layer.supernodes), survivors, top, held))
    return ResizePlan(
        method=method,
        seed=seed,
        multiple_of=multiple,
        width_before=before,
        width_after=after,
        layers=tuple(layers),
        super_weights=tuple(_moved(index, layers)),
    )


def mass(loss_proxy: torch.Tensor, channels: torch.Tensor) -> float:
    """Share of the LP mass [F] that some channels hold, in [0, 1]."""
    values = loss_proxy.double()
    total = float(values.sum())
    return float(values[channels].sum()) / total if total > 0 else 0.0


def keep_highest(score: torch.Tensor, protected: torch.Tensor, count: int) -> torch.Tensor:
    """Sorted indices [count] of the highest scores [F], the protected ones first; ties go to the lower index."""
    ranked = score.clone()
    ranked[protected] = torch.inf
    return ranked.sort(descending=True, stable=True).indices[:count].sort().values


def _moved(index: ChannelIndex, layers: list[LayerPlan]) -> list[dict[str, Any]]:
    """Super weights with the column they have after the cut; None where their channel was removed."""
    moved = []
    for weight in index.super_weights:
        place = (layers[weight.layer].kept == weight.column).nonzero()
        new = int(place[0]) if len(place) else None
        moved.append({**weight.as_json(), "column_before": weight.column, "column": new})
    return moved


def deployability(width: int) -> dict[str, list[int]]:
    """Quantisation group size -> tensor-parallel sizes whose product with it divides the width."""
    return {
        str(group): [size for size in TENSOR_PARALLEL_SIZES if width % (size * group) == 0]
        for group in GROUP_SIZES
    }
