"""Matched controls of a structure: as many weights of the same places that nothing was found in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from surgery.engine.layer_edits import Edits
from surgery.index.structures import Part, Structure
from surgery.model.ffn import Ffn, ffn_named

KINDS = {
    "scalar": ("same row", "same magnitude", "same layer"),
    "column": ("same magnitude", "same layer"),
    "row": ("same magnitude", "same layer"),
}


@dataclass(frozen=True)
class RemoveControl:
    """Remove, instead of W[row, column] (None: every row, every column), another of the same shape.

    "same row": another scalar of the row, drawn at random. "same magnitude": the scalar, column or row whose
    magnitude (L2 norm) is nearest. "same layer": any other of the matrix, drawn at random. `avoided` are the
    places of the structure, which are not drawn. The draw is fixed by the place.
    """

    ffn: str
    row: int | None
    column: int | None
    like: str
    avoided: tuple[tuple[int | None, int | None], ...]

    def apply(self, ffns: list[Ffn], _: nn.Module) -> int:
        """Change the resident layer; returns the number of scalars removed."""
        weight = ffn_named(ffns, self.ffn).down_weight()
        sizes = self._sizes(weight)
        flat = sizes.flatten()
        allowed = torch.ones_like(sizes, dtype=torch.bool)
        for row, column in self.avoided:
            allowed[self._at(row, column)] = False
        if self.like == "same row":
            own_row = torch.zeros_like(allowed)
            own_row[self.row] = True
            allowed &= own_row
        places = allowed.flatten().nonzero()[:, 0]
        if not len(places):
            return 0
        if self.like == "same magnitude":
            own = sizes[self._at(self.row, self.column)].flatten()[0]
            chosen = int(places[(flat[places] - own).abs().argmin()])
        else:
            seed = (self.row or 0) * 1_000_003 + (self.column or 0)
            drawn = torch.randint(len(places), (1,), generator=torch.Generator().manual_seed(seed))
            chosen = int(places[int(drawn)])
        row, column = divmod(chosen, sizes.shape[1])
        target = weight[row] if self.column is None else weight[:, column]
        if self.row is not None and self.column is not None:
            target = weight[row, column]
        target.zero_()
        return target.numel()

    def _sizes(self, weight: torch.Tensor) -> torch.Tensor:
        """Magnitudes [D, F] of scalars, [1, F] of columns or [D, 1] of rows."""
        magnitudes = weight.float().abs()
        if self.row is None:
            return magnitudes.square().sum(0, keepdim=True).sqrt()
        return magnitudes.square().sum(1, keepdim=True).sqrt() if self.column is None else magnitudes

    def _at(self, row: int | None, column: int | None) -> tuple[slice, slice]:
        """Where a place lies in `_sizes`."""
        rows = slice(None) if self.row is None or row is None else slice(row, row + 1)
        columns = slice(None) if self.column is None or column is None else slice(column, column + 1)
        return rows, columns


def control_edits(structure: Structure) -> dict[str, Edits]:
    """Edits of the controls of a structure, by what is matched: a control of each of its parts, together."""
    kinds = [Structure((part,)).kind for part in structure.parts]
    shared = [like for like in KINDS["scalar"] if all(like in KINDS[kind] for kind in kinds)]
    found: dict[str, Edits] = {}
    for like in shared:
        for part in structure.parts:
            found.setdefault(like, {}).setdefault(part.layer, []).append(_control(part, structure, like))
    return found


def _control(part: Part, structure: Structure, like: str) -> RemoveControl:
    avoided = tuple((p.row, p.column) for p in structure.parts if (p.layer, p.ffn) == (part.layer, part.ffn))
    return RemoveControl(part.ffn, part.row, part.column, like, avoided)
