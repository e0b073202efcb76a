"""What forward passes take: perplexity, ablations, traces, activation statistics; and how a budget is divided
for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.budget.budget import Budget, Cost, refuse_below
from surgery.budget.model_size import HEAD_COPIES, ModelSize
from surgery.engine.device import TOKENS_PER_STEP
from surgery.engine.loss import HEAD_ELEMENTS
from surgery.engine.run_options import RunOptions
from surgery.model.meta_model import MetaModel

EDIT_BYTES = 20  # per weight of a matrix whose copy is rounded to 8 bits: float32 copies
ROUNDING_BYTES = 32  # per weight of a quantised matrix: float32 copies, codes and tried clips


@dataclass(frozen=True)
class StreamShape:
    """`copies` streams of `blocks` x `block_size` tokens that go through the layers together."""

    blocks: int
    block_size: int
    copies: int = 1


@dataclass(frozen=True)
class PassJob:
    """One forward pass of `streams` over the layers.

    With `preserves_layer` a copy of each layer is kept while it is edited. With `compares` predictions of all
    streams are compared at the end, block by block. `last_tokens` are positions whose logits [V] are all held
    at once. `edit_bytes` are taken beside a layer for each weight of its largest matrix, while it is edited;
    `beside` are other bytes; `beside_head` other bytes at the end of the pass, where logits are computed.
    """

    streams: tuple[StreamShape, ...]
    preserves_layer: bool = False
    compares: bool = False
    last_tokens: int = 0
    edit_bytes: int = 0
    beside: int = 0
    beside_head: int = 0

    @property
    def block_size(self) -> int:
        """Tokens of the longest block."""
        return max((shape.block_size for shape in self.streams), default=1)

    @property
    def tokens(self) -> int:
        """Tokens of all streams."""
        return sum(shape.copies * shape.blocks * shape.block_size for shape in self.streams)


@dataclass(frozen=True, kw_only=True)
class PassCost(Cost):
    """What one forward pass takes; `step_tokens` tokens, in whole blocks, go through a layer together."""

    step_tokens: int

    def blocks_together(self, block_size: int) -> int:
        """Blocks of that size that go through a layer together."""
        return max(1, self.step_tokens // block_size)


def pass_cost(meta_model: MetaModel, job: PassJob, run: RunOptions) -> PassCost:
    """Cost of a forward pass within `run.memory`, or on a GPU within its memory.

    Raises MemoryBudgetError, naming the smallest budget that would do, when one block in one layer exceeds
    it.
    """
    size, budget = ModelSize.of(meta_model, run.dtype, job.block_size, run.device.type), Budget.of(run)
    s, vocabulary = run.dtype.itemsize, size.head // size.hidden
    copies = sum(shape.copies for shape in job.streams)
    head = HEAD_COPIES * 4 * min(HEAD_ELEMENTS, job.block_size * vocabulary)
    if job.compares:
        head = size.compared_bytes(job.block_size) + copies * job.block_size * size.hidden * s
    at_ends = size.other_resident + max(head, 2 * 4 * job.last_tokens * vocabulary) + job.beside_head
    merging = size.merging * (not budget.on_device)  # which the host does
    layers = (2 + job.preserves_layer) * size.layer + merging + job.edit_bytes * size.matrix + job.beside

    arguments = 8 * sum(shape.blocks * shape.block_size for shape in job.streams) + 4 * job.block_size**2

    def peak(tokens: int) -> int:  # arguments are token ids, and a layer's attention mask
        return max(at_ends, layers + size.saved_token * tokens) + arguments

    smallest = budget.smallest(peak(job.block_size))
    budget.check(smallest)
    host = (2 * size.layer + size.merging) * budget.on_device
    if budget.on_device:
        budget.check_host(host)
    hidden = job.tokens * size.hidden * s
    place = budget.place(hidden, peak(job.block_size), host)
    resident = hidden * (place == budget.first_place)
    step = max(job.block_size, TOKENS_PER_STEP[run.device.type])
    while step > job.block_size and peak(step) + resident > budget.usable:
        step = max(job.block_size, step // 2)
    used = peak(step) + resident
    return PassCost(
        micro_batch=max(1, step // job.block_size),
        step_tokens=step,
        hidden_bytes=hidden,
        hidden_on=place,
        **budget.peaks(used, smallest, hidden, place, host),
        read_bytes=size.layers_stored + 2 * size.other_stored,
        write_bytes=hidden * (place == "disk"),
        flops=2.0 * job.tokens * (size.active + size.attention + size.head),
    )


def rounding_cost(meta_model: MetaModel, run: RunOptions) -> PassCost:
    """Cost of quantising a checkpoint tensor by tensor, on the CPU. Raises MemoryBudgetError."""
    needed = ROUNDING_BYTES * ModelSize.of(meta_model, run.dtype, 1).matrix
    smallest = Budget.of(run).smallest(needed)
    refuse_below(smallest, run.memory, "host")
    return PassCost(
        micro_batch=1,
        step_tokens=1,
        hidden_bytes=0,
        hidden_on="memory",
        host_bytes=needed,
        device_bytes=0,
        smallest_bytes=smallest,
        read_bytes=meta_model.checkpoint.nbytes,
        write_bytes=meta_model.checkpoint.nbytes,
        flops=0.0,
    )


def merged_cost(costs: list[PassCost]) -> PassCost:
    """The cost of passes that run one after another: the peaks of memory, the sums of what is moved and
    computed.
    """
    first = max(costs, key=lambda cost: cost.smallest_bytes)
    return PassCost(
        micro_batch=first.micro_batch,
        step_tokens=first.step_tokens,
        hidden_bytes=max(cost.hidden_bytes for cost in costs),
        hidden_on=max(costs, key=lambda cost: cost.hidden_bytes).hidden_on,
        host_bytes=max(cost.host_bytes for cost in costs),
        device_bytes=max(cost.device_bytes for cost in costs),
        smallest_bytes=first.smallest_bytes,
        read_bytes=sum(cost.read_bytes for cost in costs),
        write_bytes=sum(cost.write_bytes for cost in costs),
        flops=sum(cost.flops for cost in costs),
    )
