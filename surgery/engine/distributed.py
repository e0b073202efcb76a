"""Data parallelism over token blocks: sharding and collectives for processes started by torchrun.

With one process every function is a no-op. The backend is gloo on CPUs and NCCL on GPUs. Rank and world size
come from the environment that torchrun sets.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

from surgery.errors import DistributedError, UsageError

if TYPE_CHECKING:
    from surgery.checkpoint.reader import Checkpoint


T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # long enough for a rank with a slow disk


def world_size() -> int:
    """Number of processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def processes_here() -> int:
    """Number of processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


def local_rank() -> int:
    """Place of this process among those of this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def rank() -> int:
    """Rank of this process, from 0. Rank 0 writes files and messages."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def init(device: torch.device) -> None:
    """Initialise the process group once; a no-op for one process.

    Raises DistributedError when the other processes can't be reached.
    """
    if world_size() > 1 and not distributed.is_initialized():
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # where NCCL computes what has no tensors, a barrier
        backend = "nccl" if device.type == "cuda" else "gloo"
        interface = interface_towards(os.environ["MASTER_ADDR"])
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        with translate_errors():
            distributed.init_process_group(backend, timeout=TIMEOUT)


def interface_towards(host: str) -> str | None:
    """Name of the network interface that routes to `host`; None when it can't be determined.

    By default gloo uses the interface that the local host name resolves to, which is often the loopback.
    """
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            address = probe.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs()
    names = [name for name, found in interfaces.items() for entry in found if entry.address == address]
    return names[0] if names else None


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
    """Raise DistributedError, with a one-line message, for a RuntimeError of torch.distributed."""
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(
            "the connection to another process of this job failed",
            where=f"rank {rank()} of {world_size()}",
            found=str(error).splitlines()[0][:200],
            next_step="look for the first rank that failed; the same command goes on where the job stopped",
        ) from error


def destroy() -> None:
    """Destroy the process group, if there is one."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def shard(blocks: int) -> slice:
    """This rank's contiguous slice of `blocks` blocks; slice lengths differ by at most one."""
    size, remainder = divmod(blocks, world_size())
    start = rank() * size + min(rank(), remainder)
    return slice(start, start + size + (rank() < remainder))


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; returns `values`. Raises DistributedError."""
    if world_size() > 1:
        with translate_errors():
            distributed.all_reduce(values)
    return values


def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
    """Maximum over ranks, in place; returns `values`. Raises DistributedError."""
    if world_size() > 1:
        with translate_errors():
            distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return values


def all_reduce_min(values: torch.Tensor) -> torch.Tensor:
    """Minimum over ranks, in place; returns `values`. Raises DistributedError."""
    if world_size() > 1:
        with translate_errors():
            distributed.all_reduce(values, distributed.ReduceOp.MIN)
    return values


def all_true(known: list[bool], device: torch.device) -> list[bool]:
    """Elementwise AND of `known` over all ranks. Raises DistributedError."""
    flags = torch.tensor(known, dtype=torch.int32, device=device)
    return [bool(flag) for flag in all_reduce_min(flags).tolist()]


def sum_numbers(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sum over ranks of float64 numbers on the CPU; `device` is where the backend computes.

    Raises DistributedError.
    """
    return all_reduce_sum(values.to(device)).cpu() if world_size() > 1 else values


def sum_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum over ranks of tensors of one dtype, in one exchange.

    All ranks have the same keys in the same order. Raises DistributedError.
    """
    if world_size() == 1 or not tensors:
        return tensors
    flat = all_reduce_sum(torch.cat([tensor.flatten() for tensor in tensors.values()]))
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {key: part.view_as(tensors[key]) for key, part in zip(tensors, parts, strict=True)}


def first_says(answer: bool, device: torch.device) -> bool:
    """The answer of rank 0, on all ranks. Raises DistributedError."""
    asked = torch.tensor(int(answer and rank() == 0), device=device)
    return bool(all_reduce_max(asked))


def first_value(value: T) -> T:
    """The value of rank 0, on all ranks. Raises DistributedError."""
    if world_size() == 1:
        return value
    sent = [value]
    with translate_errors():
        distributed.broadcast_object_list(sent, src=0)
    return sent[0]


class BroadcastReader:
    """Reads each tensor on one rank, in rotation, and broadcasts it to the others.

    All ranks must request the same tensors in the same order, from one thread at a time. The broadcasts use a
    gloo group of their own, so that they do not interleave with all-reduces of another thread. Raises
    DistributedError.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.turn = 0
        self.nbytes = 0  # bytes this rank read
        self.group: Any = None
        if world_size() > 1:
            with translate_errors():
                self.group = distributed.new_group(backend="gloo", timeout=TIMEOUT)

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` as stored, as `Checkpoint.read` returns it."""
        if self.group is None:
            return self.checkpoint.read(name)
        entry, owner = self.checkpoint.tensors[name], self.turn % world_size()
        self.turn += 1
        if owner == rank():
            tensor = self.checkpoint.read(name)
            self.nbytes += entry.nbytes
        else:
            tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        if entry.nbytes:
            with translate_errors():
                distributed.broadcast(tensor.view(-1).view(torch.uint8), owner, group=self.group)
        return tensor


def all_gather_rows(values: torch.Tensor) -> torch.Tensor:
    """Concatenate rows [n, ...] of all ranks in rank order; n may differ by rank. Raises DistributedError."""
    if world_size() == 1:
        return values
    return torch.cat(of_all([values.cpu()])).to(values.device)


def own_share(items: Sequence[T], what: str) -> list[T]:
    """This rank's `shard` of items. Raises UsageError for fewer items than processes; `what` names them."""
    if len(items) < world_size() > 1:
        raise UsageError(
            f"more processes than {what}", expected=f"at most {len(items)}", found=str(world_size())
        )
    return list(items[shard(len(items))])


def of_all(own: Sequence[T]) -> list[T]:
    """The items of all ranks, from each one's `own`, in rank order. Raises DistributedError."""
    if world_size() == 1:
        return list(own)
    gathered: list[Any] = [None] * world_size()
    with translate_errors():
        distributed.all_gather_object(gathered, list(own))
    return [item for items in gathered for item in items]


def barrier() -> None:
    """Wait until every rank has reached this call. Raises DistributedError."""
    if world_size() > 1:
        with translate_errors():
            distributed.barrier()
