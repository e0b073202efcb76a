"""Points of a frontier: a model as it is, rounded, cut, healed, or cut and rounded; and their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgery.cut.ffn_channels import planned_cut
from surgery.cut.groups import Cut
from surgery.cut.tensors import edited_specs
from surgery.engine.open_model import Model
from surgery.errors import UsageError
from surgery.plan.widths import width_changes
from surgery.quantize.autoround import MULTIPLE
from surgery.quantize.packed_size import packed_specs
from surgery.quantize.plan import check_roundable, plan_quantization
from surgery.quantize.rounding import Scheme

GROUPS = (128, 64, 32, 16)  # group sizes tried, largest first


@dataclass(frozen=True)
class Point:
    """One way to make a model smaller.

    `sparsity` is the share of FFN channels cut, None for none; `healed` are tokens that the cut was trained
    on afterwards; `scheme` rounds the weights, None for none. `other` names another model in place of this
    one, and `key` tells its files from those of another model of that name.
    """

    sparsity: float | None = None
    healed: int = 0
    scheme: Scheme | None = None
    other: str | None = None
    key: str = ""

    @property
    def base(self) -> str:
        """The folder that the point is, or is rounded from."""
        if self.other is not None:
            return f"other-{self.key}"
        if self.sparsity is None:
            return "dense"
        return f"cut-{100 * self.sparsity:g}" + (f"-healed-{self.healed}" if self.healed else "")

    @property
    def name(self) -> str:
        """Name for tables, such as "cut 25%, healed, INT4 sym group 64"."""
        if self.other is not None:
            return self.other
        parts = [] if self.sparsity is None else [f"cut {100 * self.sparsity:g}%"]
        parts += ["healed"] if self.healed else []
        parts += [self.scheme.name] if self.scheme else []
        return ", ".join(parts) or "dense"

    @property
    def slug(self) -> str:
        """Name for files."""
        if self.scheme is None:
            return self.base
        by = f"-{self.scheme.rounding}" if self.scheme.tuned else ""
        return f"{self.base}-int{self.scheme.bits}-{self.scheme.size}{by}"

    @property
    def is_cut(self) -> bool:
        """Whether channels were cut."""
        return self.sparsity is not None

    @property
    def tuned(self) -> bool:
        """Whether AutoRound rounds it."""
        return self.scheme is not None and self.scheme.tuned


def all_points(
    sparsities: Sequence[float],
    schemes: Sequence[Scheme],
    heal_tokens: int = 0,
    other: str | None = None,
    key: str = "",
) -> list[Point]:
    """Dense, and for every sparsity cut and healed, each as it is and rounded by every scheme; another model.

    Points of one base follow each other.
    """
    points = [Point(), *(Point(scheme=scheme) for scheme in schemes)]
    for sparsity in sparsities:
        for healed in (0, heal_tokens) if heal_tokens else (0,):
            points.append(Point(sparsity, healed))
            points += [Point(sparsity, healed, scheme) for scheme in schemes]
    return points + ([Point(other=other, key=key)] if other is not None else [])


def default_schemes(model: Model, sparsities: Sequence[float], multiple_of: int | None) -> list[Scheme]:
    """INT8 and INT4 at the largest of GROUPS that divides every row, and INT4 at 32 where that is smaller.

    Raises UnsupportedModelError for a model whose matrices can't be rounded, UsageError for rows that none of
    GROUPS divides.
    """
    sizes = [
        size
        for size in GROUPS
        if all(not columns % size for columns in _columns(model, sparsities, multiple_of))
    ]
    if not sizes:
        raise UsageError(
            "no group size divides the rows of all matrices",
            where=model.name,
            expected=f"one of {', '.join(map(str, GROUPS))}",
            next_step="give --no-round, or other --sparsity or --multiple-of",
        )
    return [
        Scheme(8, symmetric=True, size=sizes[0]),
        Scheme(4, symmetric=True, size=sizes[0]),
        *([Scheme(4, symmetric=True, size=32)] if sizes[0] > 32 else []),
    ]


def check_schemes(
    model: Model, schemes: Sequence[Scheme], sparsities: Sequence[float], multiple_of: int | None
) -> None:
    """Raise UsageError for a group size that does not divide the rows of a point."""
    for scheme in schemes:
        every = _columns(model, sparsities, multiple_of)
        bad = [columns for columns in every if columns % scheme.size]
        if bad:
            raise UsageError(
                "the group size does not divide a matrix's rows",
                where="--round",
                expected=f"a divisor of {min(bad)}",
                found=str(scheme.size),
            )
        odd = [columns for columns in every if columns % MULTIPLE]
        if scheme.tuned and odd:
            raise UsageError(
                f"AutoRound rounds matrices whose sides are multiples of {MULTIPLE}",
                where="--round",
                found=str(min(odd)),
                next_step=f"round to nearest, or give --multiple-of {MULTIPLE}",
            )


def _columns(model: Model, sparsities: Sequence[float], multiple_of: int | None) -> set[int]:
    """Row lengths of the matrices that are rounded, of the model and of every cut."""
    check_roundable(model.meta_model)
    names = plan_quantization(model.meta_model, [], Scheme(4, symmetric=True), "none").tensors
    cuts = [_cut(model, sparsity, multiple_of) for sparsity in (None, *sparsities)]
    specs = [edited_specs(model.checkpoint, cut.edits) for cut in cuts]
    return {each[name].shape[1] for each in specs for name in names}


def _cut(model: Model, sparsity: float | None, multiple_of: int | None) -> Cut:
    """The cut of a point with the right widths; its channels are not chosen yet. Raises PlanError."""
    if sparsity is None:
        return Cut((), {}, {}, model.checkpoint.config)
    changes = width_changes(model.meta_model.widths(), sparsity, None, multiple_of)
    return planned_cut(model.meta_model, changes)


def predicted_bytes(
    model: Model, point: Point, weights: list[dict[str, Any]], multiple_of: int | None
) -> int:
    """Bytes of a point's tensors before it is made. `weights` are the super weights, whose modules stay."""
    cut = _cut(model, point.sparsity, multiple_of)
    if point.scheme is None:
        specs = edited_specs(model.checkpoint, cut.edits)
    else:
        specs = packed_specs(model.meta_model, cut, point.scheme, weights)
    return sum(spec.nbytes for spec in specs.values())
