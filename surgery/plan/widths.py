"""FFN widths: sparsities rounded to multiples, and which group and tensor-parallel sizes divide a width."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import PlanError

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
GROUP_SIZES = (32, 64, 128, 256)
NARROW_MODEL = 4096


@dataclass(frozen=True)
class WidthChange:
    """Width stored under a config key, before and after pruning.

    `per_layer` holds the width of each layer where layers differ (None: the layer has no such FFN); `after`
    is then the width of the widest layer.
    """

    key: str
    before: int
    after: int
    per_layer: tuple[int | None, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Its entry in `plan.widths`."""
        fields: dict[str, Any] = {"before": self.before, "after": self.after}
        return {**fields, "per_layer": list(self.per_layer)} if self.per_layer else fields


def rounded_width(width: int, sparsity: float, multiple_of: int) -> int:
    """Channels to keep: (1 - sparsity) * width rounded to the nearest multiple; `width` if sparsity is 0.

    Raises PlanError for a sparsity outside [0, 1), a multiple below 1, a width that rounds to zero, or one
    that rounds to `width` or more.
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
    """128, or 64 where the FFN is narrower than 4096."""
    return 128 if width >= NARROW_MODEL else 64


def width_changes(
    widths: dict[str, int], sparsity: float | None, width: int | None, multiple_of: int | None
) -> tuple[WidthChange, ...]:
    """New width of every config key in `widths`, for a `sparsity` or a `width`.

    Raises PlanError where rounding leaves no key with fewer channels (errors of `rounded_width`), where
    `width` is out of range, and where `width` is given for several keys.
    """
    if width is not None:
        if len(widths) > 1:
            raise PlanError(
                "this model has several FFN widths, so that one number does not say what to keep",
                where="--intermediate-size",
                found=", ".join(f"{key} {value}" for key, value in widths.items()),
                next_step="use --sparsity",
            )
        key, before = next(iter(widths.items()))
        if not 1 <= width <= before:
            raise PlanError(
                "width out of range", where="--intermediate-size", expected=f"1 to {before}", found=str(width)
            )
        return (WidthChange(key, before, width),)
    assert sparsity is not None
    changes, refusal = [], None
    for key, before in widths.items():
        multiple = default_multiple(before) if multiple_of is None else multiple_of
        try:
            changes.append(WidthChange(key, before, rounded_width(before, sparsity, multiple)))
        except PlanError as error:
            refusal = error
            changes.append(WidthChange(key, before, before))
    if refusal is not None and all(change.after == change.before for change in changes):
        raise refusal
    return tuple(changes)


def check_layer_widths(
    widths: dict[str, int], layer_widths: Sequence[int], layers: int, have: Collection[int]
) -> None:
    """Raise PlanError unless `layer_widths` are one width for each layer of a model with one FFN width.

    0 is for a layer without an FFN afterwards; the others are the layers `have`.
    """
    if len(widths) != 1 or len(layer_widths) != layers:
        raise PlanError(
            "these are not the widths of its layers",
            where="--layer-widths",
            expected=f"{layers} numbers" if len(widths) == 1 else "a model with one FFN width",
            found=f"{len(layer_widths)} numbers",
        )
    (before,) = widths.values()
    for number, width in enumerate(layer_widths):
        if not (1 <= width <= before if number in have else width == 0):
            raise PlanError(
                "not a width of this layer's FFN" if number in have else "this layer has no FFN afterwards",
                where=f"--layer-widths, layer {number}",
                expected=f"1 to {before}" if number in have else "0",
                found=str(width),
                next_step="" if width else "remove whole FFNs with --drop-ffn",
            )


def deployability(width: int) -> dict[str, list[int]]:
    """For each quantisation group size, the tensor-parallel sizes whose product with it divides the width."""
    return {
        str(group): [size for size in TENSOR_PARALLEL_SIZES if width % (size * group) == 0]
        for group in GROUP_SIZES
    }
