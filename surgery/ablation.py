"""Ablation: what the model loses without chosen scalars, activations or channels, each condition beside the dense model.

All conditions share one walk over the layers: a condition's blocks branch off from the dense model's where it first
differs, are run with its changes made to the resident layer, and the layer is put back for the next.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from surgery.calibration import TokenBlocks
from surgery.checkpoint import Checkpoint
from surgery.devices import micro_batch
from surgery.divergence import measure
from surgery.ffn import Ffn, observed
from surgery.index import Track, untracked
from surgery.indexing import RunOptions
from surgery.stream import StreamedModel
from surgery.super_weights import down_of
from surgery.tokens import TokenStream

Place = tuple[str, int]  # FFN and output row (hidden dimension) of a super activation


@dataclass(frozen=True)
class Scale:
    """Multiply scalars W[rows[i], columns[i]] of an FFN's down projection by `factor`; 0 removes them."""

    unit: str
    rows: torch.Tensor
    columns: torch.Tensor
    factor: float = 0.0

    def apply(self, ffns: list[Ffn], _: nn.Module) -> int:
        """Change the resident layer; returns how many scalars that is."""
        weight = down_of(ffns, self.unit)
        rows, columns = self.rows.to(weight.device), self.columns.to(weight.device)
        weight[rows, columns] = weight[rows, columns] * self.factor
        return len(rows)


@dataclass(frozen=True)
class Drop:
    """Remove channels of an FFN: zero their columns of the down projection."""

    unit: str
    channels: torch.Tensor

    def apply(self, ffns: list[Ffn], _: nn.Module) -> int:
        """Change the resident layer; returns how many channels that is."""
        weight = down_of(ffns, self.unit)
        weight[:, self.channels.to(weight.device)] = 0
        return len(self.channels)


@dataclass(frozen=True)
class DropLargest:
    """Remove the largest weights by magnitude, `fraction` of every matrix of the layer, except `kept`.

    The control of The Super Weight, table 1; `kept` are (FFN, row, column) of super weights. The share is rounded to whole
    scalars, and where it comes to none in any matrix the largest matrix loses one.
    """

    fraction: float
    kept: tuple[tuple[str, int, int], ...] = ()

    def apply(self, ffns: list[Ffn], layer: nn.Module) -> int:
        """Change the resident layer; returns how many scalars that is."""
        held = [
            (unit, row, column, down_of(ffns, unit)[row, column].clone()) for unit, row, column in self.kept
        ]
        matrices = sorted((p.data for p in layer.parameters() if p.dim() > 1), key=torch.numel)
        counts = [round(self.fraction * matrix.numel()) for matrix in matrices]
        counts[-1] += not any(counts)
        for matrix, count in zip(matrices, counts, strict=True):
            flat = matrix.view(-1)
            flat[flat.abs().topk(count).indices] = 0
        gone = sum(counts)
        for unit, row, column, value in held:
            weight = down_of(ffns, unit)
            gone -= int(weight[row, column] != value)
            weight[row, column] = value
        return gone


@dataclass(frozen=True)
class Restore:
    """Put a super activation back after its weight went: the dense model's, or its mean over blocks.

    In every block, the down projection's output at `row` is set at the token where the dense model's is largest.
    """

    unit: str
    row: int
    mean: bool = False

    def apply(self, _: list[Ffn], __: nn.Module) -> int:
        """Nothing in the weights changes."""
        return 0


class Edit(Protocol):
    """A change of the resident layer."""

    def apply(self, ffns: list[Ffn], layer: nn.Module, /) -> int:
        """Make it; returns how many scalars, channels or matrices that is."""
        ...


@dataclass(frozen=True)
class Condition:
    """A named set of edits by layer; `group` says what experiment it belongs to."""

    name: str
    group: str
    edits: dict[int, list[Edit]] = field(default_factory=dict)
    x: float | None = None

    @property
    def first(self) -> int:
        """The first layer that differs from the dense model's."""
        return min(self.edits, default=0)


@dataclass(frozen=True)
class Outcome:
    """A condition measured: `changed` scalars or channels, perplexity, bits a byte of text, KL(dense || this) in nats.

    `factor` is its perplexity over the original's on the same `tokens` predicted tokens; `x` the swept quantity.
    """

    condition: str
    group: str
    changed: int
    perplexity: float
    factor: float
    bits_per_byte: float
    kl: float
    tokens: int
    x: float | None = None


def run_ablations(
    checkpoint: Checkpoint,
    conditions: list[Condition],
    blocks: TokenBlocks,
    options: RunOptions,
    track: Track[Any] = untracked,
) -> list[Outcome]:
    """Measure the original and every condition on `blocks`, in one walk over the layers."""
    model = StreamedModel(checkpoint, options.device, options.dtype, memory=options.memory)
    share = options.memory // (2 * (len(conditions) + 1))
    step = micro_batch(blocks.ids.shape[1], options.device)
    dense = TokenStream(model, blocks.ids.long(), micro_batch=step, host_bytes=share)
    branches: list[TokenStream | None] = [None for _ in conditions]
    changed = [0 for _ in conditions]
    count = len(model.layers)
    for number, layer in track(model.walk(range(count)), "layers", count):
        ffns = model.ffns(number)
        for place, condition in enumerate(conditions):
            if condition.edits and condition.first == number:
                branches[place] = dense.fork(len(dense.ids), number, share)
        wanted = {
            (edit.unit, edit.row)
            for c in conditions
            for edit in c.edits.get(number, [])
            if isinstance(edit, Restore)
        }
        spikes = _forward_dense(dense, number, layer, ffns, wanted)
        original = {name: p.data.clone() for name, p in layer.named_parameters()}
        for place, condition in enumerate(conditions):
            branch = branches[place]
            if branch is None:
                continue
            edits = condition.edits.get(number, [])
            changed[place] += sum(edit.apply(ffns, layer) for edit in edits)
            with _restored(ffns, edits, spikes, dense.ids.shape[1]):
                branch.forward(number, layer)
            if edits:
                for name, parameter in layer.named_parameters():
                    parameter.data.copy_(original[name])
    measured = measure(model, dense, [dense, *(b if b is not None else dense for b in branches)])
    outcomes = []
    for condition, count, found in zip(
        [Condition("original", "original"), *conditions], [0, *changed], measured, strict=True
    ):
        bits = found.nats / math.log(2) / blocks.predicted_bytes
        factor = found.perplexity / measured[0].perplexity
        row = (condition.name, condition.group, count, found.perplexity, factor, bits, found.kl, found.tokens)
        outcomes.append(Outcome(*row, condition.x))
    return outcomes


def _forward_dense(
    dense: TokenStream, number: int, layer: nn.Module, ffns: list[Ffn], wanted: set[Place]
) -> dict[Place, tuple[torch.Tensor, torch.Tensor]]:
    """Move the dense blocks on; returns token and value, [N] each, of every super activation asked for."""
    size = dense.ids.shape[1]
    found: dict[Place, list[tuple[torch.Tensor, torch.Tensor]]] = {place: [] for place in wanted}

    def keep(unit: str, tokens: torch.Tensor | None, _: torch.Tensor, y: torch.Tensor) -> None:
        for name, row in wanted:
            if name == unit and tokens is None:
                values = y[..., row].reshape(-1, size)
                at = values.abs().argmax(1)
                found[name, row].append((at, values.gather(1, at[:, None])[:, 0]))

    with observed(ffns, keep):
        dense.forward(number, layer)
    return {
        place: (torch.cat([at for at, _ in parts]), torch.cat([value for _, value in parts]))
        for place, parts in found.items()
        if parts
    }


@contextlib.contextmanager
def _restored(
    ffns: list[Ffn],
    edits: list[Edit],
    spikes: dict[Place, tuple[torch.Tensor, torch.Tensor]],
    block_size: int,
) -> Iterator[None]:
    """While open, super activations are written into what the down projections put out, block after block."""
    handles = []
    for edit in edits:
        if not isinstance(edit, Restore) or (edit.unit, edit.row) not in spikes:
            continue
        at, values = spikes[edit.unit, edit.row]
        values = values.float().mean().to(values.dtype).expand_as(values) if edit.mean else values
        (ffn,) = [ffn for ffn in ffns if edit.unit in ffn.units]
        handles.append(ffn.module.register_forward_hook(_writer(edit.row, at, values, block_size)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _writer(row: int, at: torch.Tensor, values: torch.Tensor, block_size: int) -> Callable[..., torch.Tensor]:
    """A hook that sets output [block, at[block], row] to values[block], for blocks that come in order."""
    done = 0

    def write(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal done
        changed = output.clone()
        view = changed.view(
            -1, block_size, changed.shape[-1]
        )  # some families flatten blocks before their FFN
        blocks = torch.arange(len(view), device=output.device)
        part = slice(done, done + len(view))
        view[blocks, at[part], row] = values[part]
        done += len(view)
        return changed

    return write
