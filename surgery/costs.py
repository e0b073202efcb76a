"""What an index will take, said before it starts: bytes moved, operations, memory; and how a budget is shared out.

Symbols: N blocks of T tokens, L layers, D hidden_size, F the FFN channels a token goes through in a layer, V vocabulary,
s bytes of the compute dtype. The estimates err upwards; `tests/benchmarks/scale.py` sets them beside what was used.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from surgery.devices import TOKENS_PER_STEP, amount, room
from surgery.errors import MemoryBudgetError
from surgery.heap import SHARE
from surgery.machine import Machine
from surgery.sizes import Sizes
from surgery.skeleton import Skeleton

if TYPE_CHECKING:
    from surgery.indexing import RunOptions


@dataclass(frozen=True)
class IndexCosts:
    """What one index takes on one machine.

    `micro_batch` blocks go through a layer together. `hidden_bytes` are the stored layer inputs, kept `hidden_on` device,
    memory or disk. `graph_bytes` may be spent on what the backward pass would compute again; it is expected to do for
    `graph_layers` layers. `host_bytes` and `device_bytes` are peaks, above what the libraries take; `smallest_bytes` is the
    smallest --memory that would do. `flops` are those of one forward pass, one backward pass to the activations, and the
    layers computed again.
    """

    micro_batch: int
    hidden_bytes: int
    hidden_on: str
    graph_bytes: int
    graph_layers: int
    host_bytes: int
    device_bytes: int
    smallest_bytes: int
    read_bytes: int
    write_bytes: int
    flops: float

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Seconds for arithmetic and for reading, which overlap: the larger one bounds the run."""
        return {"compute": self.flops / machine.flops, "read": self.read_bytes / machine.read}

    def as_json(self) -> dict[str, Any]:
        """The `costs` of `surgeon index --dry-run --json`."""
        return asdict(self)


def index_costs(
    skeleton: Skeleton, blocks: int, block_size: int, options: RunOptions, second_order: bool = False
) -> IndexCosts:
    """Costs of indexing `blocks` x `block_size` tokens, sharing out `options.memory`.

    On a GPU the same sharing is done with the memory that is free there, and `options.memory` is for the host's part.
    Raises MemoryBudgetError, naming the smallest budget that would do, when one block's way through one layer outgrows it.
    """
    sizes = Sizes.of(skeleton, options.dtype, block_size, options.device.type)
    tokens = blocks * block_size
    on_device = options.device.type == "cuda"
    fixed = sizes.fixed(blocks, second_order, merging=not on_device)  # which the host does
    budget = room(options.device) if on_device else options.memory
    smallest = fixed + sizes.step(1)
    check_budget(smallest, budget, options.device.type)
    step = max(1, TOKENS_PER_STEP[options.device.type] // block_size)
    while step > 1 and fixed + sizes.step(step) > budget:
        step //= 2
    used = fixed + sizes.step(step)
    hidden = (sizes.layers + 1) * tokens * sizes.hidden * options.dtype.itemsize
    if on_device:
        fits_host = hidden <= options.memory
        place = "device" if 2 * hidden <= budget - used else "memory" if fits_host else "disk"
    else:
        budget -= options.memory // SHARE  # for what the C library holds free
        place = "memory" if hidden <= budget - used else "disk"
    used += hidden * (place == ("device" if on_device else "memory"))
    graphs = 0 if second_order else max(0, budget - used) // (2 if on_device else 1)
    per_layer = sizes.kept_token * tokens
    graphs *= per_layer > 0  # else nothing there is dear
    kept = min(sizes.layers, graphs // max(1, per_layer))
    used += kept * per_layer
    forward = 2.0 * tokens * (sizes.active + sizes.attention)
    spared = (forward - 2.0 * tokens * sizes.again) * kept / max(1, sizes.layers)
    pinned = 2 * sizes.layer + sizes.merging + hidden * (place == "memory")
    return IndexCosts(
        micro_batch=step,
        hidden_bytes=hidden,
        hidden_on=place,
        graph_bytes=graphs,
        graph_layers=kept,
        host_bytes=pinned if on_device else used,
        device_bytes=used if on_device else 0,
        smallest_bytes=2 * sizes.layer + sizes.merging if on_device else smallest,
        read_bytes=2 * sizes.inside + 2 * sizes.outside,
        write_bytes=hidden if place == "disk" else 0,
        flops=3 * forward - spared + 4.0 * tokens * sizes.head,
    )


def check_budget(smallest: int, budget: int, device: str) -> None:
    """Raise MemoryBudgetError when not even the smallest way fits."""
    if smallest <= budget:
        return
    raise MemoryBudgetError(
        "one layer and one block of tokens outgrow the memory budget",
        where=f"{device} memory",
        expected=f"at least {amount(smallest)}",
        found=amount(budget),
        next_step="use a smaller --block-size, or a machine with more memory"
        if device == "cuda"
        else f"give --memory {-(-smallest // (1 << 20))}MiB or more, or a smaller --block-size",
    )
