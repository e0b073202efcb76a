"""Budget: how much memory a command may use, what it is refused with, and where hidden states go.

Every command that has `--memory` divides it here: a cost module adds up what a job needs, a `Budget` says
whether that fits. `Cost` is what all cost modules return and what every `--dry-run` prints.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from surgery.budget.machine import Machine
from surgery.byte_units import format_bytes
from surgery.engine.device import TOKENS_PER_STEP, free_device_bytes, total_device_bytes
from surgery.engine.malloc import SHARE
from surgery.engine.run_options import RunOptions
from surgery.errors import MemoryBudgetError


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one job takes on one machine.

    `micro_batch` blocks go through a layer together. `hidden_bytes` are the hidden states between layers,
    stored `hidden_on` device, memory or disk. `host_bytes` and `device_bytes` are peaks, above what the
    libraries take; `smallest_bytes` is the smallest --memory that would do. `read_bytes` and `write_bytes`
    are moved to and from the disk; `flops` are operations in the compute dtype.
    """

    micro_batch: int
    hidden_bytes: int
    hidden_on: str
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
        """The `costs` of a dry run's JSON."""
        return asdict(self)


class Peaks(TypedDict):
    """Three fields of a `Cost`."""

    host_bytes: int
    device_bytes: int
    smallest_bytes: int


@dataclass(frozen=True)
class Budget:
    """`limit` bytes where a job computes, of which `usable` may be planned with; `host` is --memory.

    On a CPU `limit` is --memory, and an eighth of it is left to pages that the C library holds free. On a GPU
    `limit` is the memory of the device, and --memory is for what stays on the host.
    """

    limit: int
    usable: int
    host: int
    on_device: bool
    device: str

    @classmethod
    def of(cls, run: RunOptions, *, free_only: bool = False) -> Budget:
        """The budget of a run; with `free_only` a GPU's memory counts as far as it is free now."""
        if run.device.type == "cuda":
            limit = free_device_bytes(run.device) if free_only else total_device_bytes(run.device)
            return cls(limit, limit, run.memory, True, run.device.type)
        return cls(run.memory, run.memory - run.memory // SHARE, run.memory, False, run.device.type)

    def smallest(self, needed: int) -> int:
        """The limit at which `needed` bytes are usable."""
        return needed if self.on_device else needed * SHARE // (SHARE - 1) + 1

    def check(self, smallest: int) -> None:
        """Raise MemoryBudgetError unless the limit is at least `smallest` bytes."""
        refuse_below(smallest, self.limit, self.device)

    def check_host(self, smallest: int) -> None:
        """Raise MemoryBudgetError unless --memory is at least `smallest` bytes."""
        refuse_below(smallest, self.host, "host")

    def place(self, hidden: int, used: int, host_used: int = 0) -> str:
        """Where `hidden` bytes of hidden states go, beside `used` bytes: device, memory or disk, the first
        that fits.

        `host_used` is what else --memory must hold where the job computes on a GPU.
        """
        if used + hidden <= self.usable:
            return "device" if self.on_device else "memory"
        if self.on_device and host_used + hidden <= self.host:
            return "memory"
        return "disk"

    def peaks(self, used: int, smallest: int, hidden: int, place: str, host: int) -> Peaks:
        """The fields of a `Cost` that say how much memory is used where.

        `used` bytes are taken where the job computes, hidden states there included; on a GPU `host` bytes
        are taken beside it, and `hidden` where their place is memory.
        """
        if not self.on_device:
            return {"host_bytes": used, "device_bytes": 0, "smallest_bytes": smallest}
        beside = host + hidden * (place == "memory")
        return {"host_bytes": beside, "device_bytes": used, "smallest_bytes": host}

    @property
    def first_place(self) -> str:
        """Where hidden states are while they fit beside what is computed."""
        return "device" if self.on_device else "memory"


def refuse_below(smallest: int, limit: int, where: str) -> None:
    """Raise MemoryBudgetError when `limit` bytes of `where` (cpu, host, cuda) are fewer than `smallest`."""
    if smallest <= limit:
        return
    raise MemoryBudgetError(
        "one layer and one block of tokens exceed the memory budget",
        where=f"{where} memory",
        expected=f"at least {format_bytes(smallest)}",
        found=format_bytes(limit),
        next_step="use a smaller --block-size, or a machine with more memory"
        if where == "cuda"
        else f"give --memory {-(-smallest // (1 << 20))}MiB or more, or a smaller block size",
    )


def largest_micro_batch(block_size: int, device: str) -> int:
    """Blocks that go through a layer together where memory allows: enough tokens for matrix products at full
    rate.
    """
    return max(1, TOKENS_PER_STEP[device] // block_size)
