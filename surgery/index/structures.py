"""Structures of down_proj that can matter as one: a scalar, a column, a row, a pair, or more together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from surgery.engine.layer_edits import Edits, Remove
from surgery.index.spikes import RowSpike
from surgery.index.super_weights import SuperWeight

MAX_SCALARS, MAX_ROWS = 16, 16  # candidates measured: those of the most prompts, then of the largest output
MAX_PAIRED = 6  # candidates of which every two are measured
MAX_NAMED = 8  # parts that a name lists


@dataclass(frozen=True)
class Part:
    """W[row, column] of one FFN's down_proj; without a row it is the column, without a column the row."""

    layer: int
    ffn: str
    row: int | None
    column: int | None

    @property
    def name(self) -> str:
        """As a reader sees it: layer, FFN (unless it is the layer's only one), and place."""
        where = f"layer {self.layer}" + ("" if self.ffn == "dense" else f" {self.ffn}")
        if self.row is None:
            return f"{where} column {self.column}"
        return f"{where} row {self.row}" if self.column is None else f"{where} [{self.row}, {self.column}]"

    def covers(self, other: Part) -> bool:
        """Whether all weights of `other` are weights of this part."""
        return (
            (self.layer, self.ffn) == (other.layer, other.ffn)
            and self.row in (None, other.row)
            and self.column in (None, other.column)
        )

    def meets(self, other: Part) -> bool:
        """Whether the two have a weight in common."""
        return (
            (self.layer, self.ffn) == (other.layer, other.ffn)
            and (self.row is None or other.row in (None, self.row))
            and (self.column is None or other.column in (None, self.column))
        )


@dataclass(frozen=True)
class Structure:
    """Parts that are removed together, in order of layer."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Structure:
        """The structure of these parts, each once, sorted by place."""
        key = [
            (p.layer, p.ffn, -1 if p.row is None else p.row, -1 if p.column is None else p.column, p)
            for p in set(parts)
        ]
        return cls(tuple(p for *_, p in sorted(key, key=lambda entry: entry[:4])))

    @property
    def kind(self) -> str:
        """ "scalar", "column" or "row" of one part; "pair" of two; "joint" of more."""
        if len(self.parts) > 1:
            return "pair" if len(self.parts) == 2 else "joint"
        (part,) = self.parts
        return "column" if part.row is None else "row" if part.column is None else "scalar"

    @property
    def name(self) -> str:
        """The names of its parts; of more than MAX_NAMED, their number and layers."""
        if len(self.parts) > MAX_NAMED:
            layers = sorted({part.layer for part in self.parts})
            where = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
            return f"{len(self.parts)} parts of {where} together"
        return " + ".join(part.name for part in self.parts)

    def contains(self, other: Structure) -> bool:
        """Whether `other` is a proper part of it."""
        return self != other and all(any(mine.covers(p) for mine in self.parts) for p in other.parts)

    def repeats(self, other: Structure) -> bool:
        """Whether each part of `other` has weights in common with it: both may be the same spikes."""
        return self != other and all(any(mine.meets(p) for mine in self.parts) for p in other.parts)

    def edits(self, mean: bool = False) -> Edits:
        """Edits that remove it, or set what it adds to the residual stream to its mean."""
        found: Edits = {}
        for part in self.parts:
            found.setdefault(part.layer, []).append(Remove(part.ffn, part.row, part.column, mean))
        return found

    def as_json(self) -> list[dict[str, Any]]:
        """Its parts, for JSON."""
        return [asdict(part) for part in self.parts]


def scalar(weight: SuperWeight) -> Structure:
    """A candidate weight as a structure."""
    return Structure((Part(weight.layer, weight.ffn, weight.row, weight.column),))


def column(weight: SuperWeight) -> Structure:
    """The column of a candidate weight."""
    return Structure((Part(weight.layer, weight.ffn, None, weight.column),))


def row(one: SuperWeight | RowSpike) -> Structure:
    """The row of a candidate weight or of a row spike."""
    return Structure((Part(one.layer, one.ffn, one.row, None),))


@dataclass(frozen=True)
class Candidates:
    """What the detector found, as structures to measure.

    weights: candidate scalars, the clearest first. rows: row spikes. other_weights, other_rows: those beyond
    MAX_SCALARS and MAX_ROWS, which are measured together only.
    """

    weights: list[SuperWeight]
    rows: list[RowSpike]
    other_weights: list[SuperWeight]
    other_rows: list[RowSpike]

    @classmethod
    def of(cls, weights: list[SuperWeight], rows: list[RowSpike]) -> Candidates:
        """The clearest candidates, at most MAX_SCALARS and MAX_ROWS."""
        scalars = sorted(weights, key=lambda w: (-w.prompts, -abs(w.output), w.place))
        spikes = sorted(rows, key=lambda r: (-r.prompts, -abs(r.output), r.place))
        kept, more = scalars[:MAX_SCALARS], scalars[MAX_SCALARS:]
        return cls(kept, spikes[:MAX_ROWS], more, spikes[MAX_ROWS:])

    @property
    def found(self) -> list[SuperWeight | RowSpike]:
        """Everything that was found."""
        return [*self.weights, *self.rows, *self.other_weights, *self.other_rows]

    def rest(self) -> list[Structure]:
        """The less clear candidates as one structure; none without any."""
        others = [*map(scalar, self.other_weights), *map(row, self.other_rows)]
        return [_together(others)] if others else []

    def singles(self) -> list[Structure]:
        """Every scalar, every column and every row, each once."""
        found = [make(weight) for make in (scalar, column, row) for weight in self.weights]
        return list(dict.fromkeys([*found, *map(row, self.rows)]))

    def columns(self) -> list[Structure]:
        """The columns, clearest first."""
        return list(dict.fromkeys(column(weight) for weight in self.weights))

    def rows_of_layers(self) -> list[Structure]:
        """The rows with a spike in each layer, as one structure a layer."""
        by_layer: dict[int, list[Structure]] = {}
        for one in self._spikes():
            by_layer.setdefault(one.layer, []).append(row(one))
        return [_together(rows) for _, rows in sorted(by_layer.items())]

    def groups(self) -> list[Structure]:
        """Structures that could act together.

        Columns that write one row of the residual stream, in whatever layers; columns of one layer; all
        columns. Rows of one layer, of every two layers, and of all; the same row in all layers. Everything.
        """
        sets: list[list[Structure]] = []
        for key in ("row", "layer", "ffn"):
            by_key: dict[Any, list[Structure]] = {}
            for weight in self.weights:
                by_key.setdefault(getattr(weight, key), []).append(column(weight))
            sets += by_key.values()
        by_row: dict[int, list[Structure]] = {}
        for one in self._spikes():
            by_row.setdefault(one.row, []).append(row(one))
        layers, rows = self.rows_of_layers(), [row(one) for one in self._spikes()]
        sets += [*by_row.values(), *([one] for one in layers)]
        sets += [[one, other] for one, other in combinations(layers[:MAX_PAIRED], 2)]
        sets += [self.columns(), rows, [*self.columns(), *rows]]
        return list(dict.fromkeys(group for group in map(_together, sets) if len(group.parts) > 1))

    def _spikes(self) -> list[SuperWeight | RowSpike]:
        """Everything found, weights and rows."""
        return [*self.weights, *self.rows]


def _together(members: list[Structure]) -> Structure:
    """All parts of several structures as one."""
    return Structure.of(part for one in members for part in one.parts)


def pairs(units: list[Structure]) -> list[Structure]:
    """Every two of the first MAX_PAIRED units."""
    return [Structure.of((*a.parts, *b.parts)) for a, b in combinations(units[:MAX_PAIRED], 2)]
