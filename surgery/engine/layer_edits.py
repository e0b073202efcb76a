"""Edits of a resident layer's down projections: scalars, columns and rows removed, scaled, set to their mean.

Some edits only change weights. Others also write into the output of a down projection; `written_outputs`
opens the hooks they need. What these write is taken from the dense model's run of the same layer (`Dense`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import nn

from surgery.engine.hooks import FfnCall, module_outputs, observed
from surgery.model.ffn import Ffn, ffn_named

Place = tuple[str, int]  # FFN and output row (hidden dimension) of a super activation


class Edit(Protocol):
    """A change of the resident layer."""

    def apply(self, ffns: list[Ffn], layer: nn.Module, /) -> int:
        """Change the layer; returns the number of scalars, channels or matrices changed."""
        ...


Edits = dict[int, list[Edit]]  # by layer


@dataclass(frozen=True)
class Scale:
    """Multiply scalars W[rows[i], columns[i]] of an FFN's down projection by `factor`; 0 removes them."""

    ffn: str
    rows: torch.Tensor
    columns: torch.Tensor
    factor: float = 0.0

    def apply(self, ffns: list[Ffn], _: nn.Module) -> int:
        """Change the resident layer; returns the number of scalars changed."""
        weight = ffn_named(ffns, self.ffn).down_weight()
        rows, columns = self.rows.to(weight.device), self.columns.to(weight.device)
        weight[rows, columns] = weight[rows, columns] * self.factor
        return len(rows)


@dataclass(frozen=True)
class Drop:
    """Remove channels of an FFN by setting their columns of the down projection to zero."""

    ffn: str
    channels: torch.Tensor

    def apply(self, ffns: list[Ffn], _: nn.Module) -> int:
        """Change the resident layer; returns the number of channels removed."""
        weight = ffn_named(ffns, self.ffn).down_weight()
        weight[:, self.channels.to(weight.device)] = 0
        return len(self.channels)


@dataclass(frozen=True)
class DropLargest:
    """Set the largest weights by magnitude to zero, `fraction` of every matrix of the layer, except `kept`.

    This is the control of The Super Weight, table 1; `kept` are (FFN, row, column) of super weights. The
    number of scalars per matrix is rounded. If it is zero in every matrix, one scalar of the largest matrix
    is removed.
    """

    fraction: float
    kept: tuple[tuple[str, int, int], ...] = ()

    def apply(self, ffns: list[Ffn], layer: nn.Module) -> int:
        """Change the resident layer; returns the number of scalars changed."""
        kept = [
            (name, row, column, ffn_named(ffns, name).down_weight()[row, column].clone())
            for name, row, column in self.kept
        ]
        matrices = sorted((p.data for p in layer.parameters() if p.dim() > 1), key=torch.numel)
        counts = [round(self.fraction * matrix.numel()) for matrix in matrices]
        counts[-1] += not any(counts)
        for matrix, count in zip(matrices, counts, strict=True):
            flat = matrix.view(-1)
            flat[flat.abs().topk(count).indices] = 0
        changed = sum(counts)
        for name, row, column, value in kept:
            weight = ffn_named(ffns, name).down_weight()
            changed -= int(weight[row, column] != value)
            weight[row, column] = value
        return changed


@dataclass(frozen=True)
class Restore:
    """Restore a super activation whose weight is removed: to its dense value, or to its mean over blocks.

    In every block, the down projection's output at `row` is set at the token where the |output| of the dense
    model is largest.
    """

    ffn: str
    row: int
    mean: bool = False

    def apply(self, _: list[Ffn], __: nn.Module) -> int:
        """Leaves the weights unchanged; returns 0."""
        return 0


@dataclass(frozen=True)
class Remove:
    """Remove W[row, column] of an FFN's down projection; None stands for every row, or every column.

    With `mean`, what the removed weights W_r added to the output, u W_r^T [D], is set to its mean over the
    tokens of the dense model, mean(u) W_r^T, instead of to zero. Experts have no such mean: their tokens
    change with routing.
    """

    ffn: str
    row: int | None
    column: int | None
    mean: bool = False

    def apply(self, ffns: list[Ffn], _: nn.Module) -> int:
        """Change the resident layer; returns the number of scalars removed."""
        weight = self._weights(ffns)
        weight.zero_()
        return weight.numel()

    def offset(self, ffns: list[Ffn], mean_u: torch.Tensor) -> torch.Tensor:
        """Mean [D] of what the weights add to the output, before they are removed; `mean_u` is [F]."""
        weight = ffn_named(ffns, self.ffn).down_weight()
        rows, columns = self._slices()
        offset = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
        offset[rows] = self._weights(ffns).float() @ mean_u.float()[columns]
        return offset

    def _slices(self) -> tuple[slice, slice]:
        """Rows and columns, as slices."""
        rows, columns = (slice(None) if i is None else slice(i, i + 1) for i in (self.row, self.column))
        return rows, columns

    def _weights(self, ffns: list[Ffn]) -> torch.Tensor:
        """The weights to remove, as a view of the resident matrix."""
        rows, columns = self._slices()
        return ffn_named(ffns, self.ffn).down_weight()[rows, columns]


def edit_key(edit: Any) -> Hashable:
    """What an edit does, as a value: two edits with equal keys change a layer in the same way."""
    if not is_dataclass(edit):
        return id(edit)
    values: list[Hashable] = [type(edit).__qualname__]
    for one in fields(edit):
        value: Any = getattr(edit, one.name)
        if isinstance(value, torch.Tensor):
            value = tuple(value.flatten().tolist())
        plain = value is None or isinstance(value, str | int | float | tuple)
        values.append(value if plain else id(value))
    return tuple(values)


@dataclass
class Dense:
    """What edits of a layer take from the dense model's run of it.

    spikes: token and value, [N] each, of the largest |output| of a block, by FFN and row.
    means: mean over all tokens of the down projection's input, [F] float64, by FFN.
    """

    spikes: dict[Place, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    means: dict[str, torch.Tensor] = field(default_factory=dict)


def run_dense(forward: Callable[[], None], ffns: list[Ffn], edits: Iterable[Edit], block_size: int) -> Dense:
    """Call `forward`, which runs the dense blocks through the resident layer; returns what `edits` need."""
    wanted = {(edit.ffn, edit.row) for edit in edits if isinstance(edit, Restore)}
    averaged = {edit.ffn for edit in edits if isinstance(edit, Remove) and edit.mean}
    parts: dict[Place, list[tuple[torch.Tensor, torch.Tensor]]] = {place: [] for place in wanted}
    sums: dict[str, tuple[torch.Tensor, int]] = {}

    def record(call: FfnCall) -> None:
        if call.tokens is not None:
            return
        if call.ffn in averaged:
            u = call.u.reshape(-1, call.u.shape[-1])
            total, count = sums.get(call.ffn, (torch.zeros(u.shape[1], device=u.device), 0))
            sums[call.ffn] = total + u.sum(0, dtype=torch.float32), count + len(u)
        for name, row in wanted:
            if name == call.ffn:
                values = call.y[..., row].reshape(-1, block_size)
                at = values.abs().argmax(1)
                parts[name, row].append((at, values.gather(1, at[:, None])[:, 0]))

    with observed(ffns, record) if wanted or averaged else contextlib.nullcontext():
        forward()
    spikes = {
        place: (torch.cat([at for at, _ in found]), torch.cat([value for _, value in found]))
        for place, found in parts.items()
        if found
    }
    return Dense(spikes, {name: total / count for name, (total, count) in sums.items()})


@contextlib.contextmanager
def written_outputs(ffns: list[Ffn], edits: list[Edit], dense: Dense, block_size: int) -> Iterator[None]:
    """While open, edits that write into outputs of down projections do so.

    Open it before `apply`: the mean of a contribution is computed from the weights that are then removed.
    """
    with contextlib.ExitStack() as stack:
        for edit in edits:
            if isinstance(edit, Restore) and (edit.ffn, edit.row) in dense.spikes:
                at, values = dense.spikes[edit.ffn, edit.row]
                values = values.float().mean().to(values.dtype).expand_as(values) if edit.mean else values
                write = _writer(edit.row, at, values, block_size)
            elif isinstance(edit, Remove) and edit.mean:
                write = _adder(edit.offset(ffns, dense.means[edit.ffn]))
            else:
                continue
            stack.enter_context(module_outputs({edit.ffn: ffn_named(ffns, edit.ffn).module}, write))
        yield


def _adder(offset: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A hook that adds `offset` [D] to every token's output."""
    return lambda _, output: output + offset.to(output.dtype)


def _writer(row: int, at: torch.Tensor, values: torch.Tensor, block_size: int) -> Callable[..., torch.Tensor]:
    """A hook that sets output [block, at[block], row] to values[block]; blocks must arrive in order."""
    done = 0

    def write(_: str, output: torch.Tensor) -> torch.Tensor:
        nonlocal done
        changed = output.clone()
        # Some families flatten blocks before their FFN.
        view = changed.view(-1, block_size, changed.shape[-1])
        blocks = torch.arange(len(view), device=output.device)
        part = slice(done, done + len(view))
        view[blocks, at[part], row] = values[part]
        done += len(view)
        return changed

    return write
