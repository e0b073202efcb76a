"""Ablation: measures a model with chosen scalars, activations or channels changed or removed.

All conditions share one pass over the layers, next to the dense model. A condition starts from a copy of the
dense hidden states at its first edited layer. In each layer, the condition's edits are applied to the
resident weights, its blocks run through the layer, and the weights are restored for the next condition.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from surgery.budget.pass_cost import PassCost, PassJob, StreamShape, pass_cost
from surgery.engine.hooks import FfnCall, module_outputs, observed, preserved
from surgery.engine.loss import measure_divergence
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.model.ffn import Ffn, ffn_named
from surgery.progress import Progress, no_progress
from surgery.text import TokenBlocks

Place = tuple[str, int]  # FFN and output row (hidden dimension) of a super activation


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


class Edit(Protocol):
    """A change of the resident layer."""

    def apply(self, ffns: list[Ffn], layer: nn.Module, /) -> int:
        """Change the layer; returns the number of scalars, channels or matrices changed."""
        ...


@dataclass(frozen=True)
class Condition:
    """A named set of edits by layer; `group` names its experiment, `x` is the swept quantity."""

    name: str
    group: str
    edits: dict[int, list[Edit]] = field(default_factory=dict)
    x: float | None = None

    @property
    def first(self) -> int:
        """The first edited layer."""
        return min(self.edits, default=0)


@dataclass(frozen=True)
class Outcome:
    """Measurements of a condition.

    `changed` counts scalars or channels. `factor` is its perplexity divided by that of the original model on
    the same `tokens` predicted tokens. `bits_per_byte` is per byte of text. `kl` is the mean over tokens of
    KL(dense || condition) in nats. `x` is the swept quantity.
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
    opened: Model,
    conditions: list[Condition],
    blocks: TokenBlocks,
    progress: Progress[Any] = no_progress,
    *,
    edit_bytes: int = 0,
) -> list[Outcome]:
    """Measure the original model and every condition on `blocks`, in one pass over the layers.

    `edit_bytes` as in `ablation_cost`. Raises MemoryBudgetError.
    """
    cost = ablation_cost(opened, len(conditions), *blocks.ids.shape, edit_bytes=edit_bytes)
    model, place = StreamedModel(opened), cost.hidden_on
    step = cost.blocks_together(blocks.ids.shape[1])
    dense = TokenStream(model, blocks.ids.long(), micro_batch=step, place=place)
    branches: list[TokenStream | None] = [None for _ in conditions]
    changed = [0 for _ in conditions]
    count = len(model.layers)
    for number, layer in progress(model.stream_layers(range(count)), "layers", count):
        ffns = model.ffns(number)
        for i, condition in enumerate(conditions):
            if condition.edits and condition.first == number:
                branches[i] = dense.fork(len(dense.ids), number, place)
        wanted = {
            (edit.ffn, edit.row)
            for c in conditions
            for edit in c.edits.get(number, [])
            if isinstance(edit, Restore)
        }
        spikes = _forward_dense(dense, number, layer, ffns, wanted)
        for i, condition in enumerate(conditions):
            branch = branches[i]
            if branch is None:
                continue
            edits = condition.edits.get(number, [])
            with preserved(layer) if edits else contextlib.nullcontext():
                changed[i] += sum(edit.apply(ffns, layer) for edit in edits)
                with _restored(ffns, edits, spikes, dense.ids.shape[1]):
                    branch.forward(number, layer)
    measured = measure_divergence(model, dense, [dense, *(b if b is not None else dense for b in branches)])
    outcomes = []
    for condition, count, found in zip(
        [Condition("original", "original"), *conditions], [0, *changed], measured, strict=True
    ):
        bits = found.nats / math.log(2) / blocks.predicted_bytes
        factor = found.perplexity / measured[0].perplexity
        row = (condition.name, condition.group, count, found.perplexity, factor, bits, found.kl, found.tokens)
        outcomes.append(Outcome(*row, condition.x))
    return outcomes


def ablation_cost(
    opened: Model, conditions: int, blocks: int, block_size: int, *, edit_bytes: int = 0
) -> PassCost:
    """Cost of measuring `conditions` conditions, whose edits take `edit_bytes` for each weight of a matrix.

    Raises MemoryBudgetError.
    """
    shapes = (StreamShape(blocks, block_size, conditions + 1),)
    job = PassJob(shapes, preserves_layer=True, compares=True, edit_bytes=edit_bytes)
    return pass_cost(opened.meta_model, job, opened.run)


def _forward_dense(
    dense: TokenStream, number: int, layer: nn.Module, ffns: list[Ffn], wanted: set[Place]
) -> dict[Place, tuple[torch.Tensor, torch.Tensor]]:
    """Run the dense blocks through the layer; returns token and value, [N] each, at every wanted place."""
    size = dense.ids.shape[1]
    found: dict[Place, list[tuple[torch.Tensor, torch.Tensor]]] = {place: [] for place in wanted}

    def record(call: FfnCall) -> None:
        for name, row in wanted:
            if name == call.ffn and call.tokens is None:
                values = call.y[..., row].reshape(-1, size)
                at = values.abs().argmax(1)
                found[name, row].append((at, values.gather(1, at[:, None])[:, 0]))

    with observed(ffns, record):
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
    """While open, super activations are written into the outputs of the down projections."""
    with contextlib.ExitStack() as stack:
        for edit in edits:
            if not isinstance(edit, Restore) or (edit.ffn, edit.row) not in spikes:
                continue
            at, values = spikes[edit.ffn, edit.row]
            values = values.float().mean().to(values.dtype).expand_as(values) if edit.mean else values
            write = _writer(edit.row, at, values, block_size)
            stack.enter_context(module_outputs({edit.ffn: ffn_named(ffns, edit.ffn).module}, write))
        yield


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
