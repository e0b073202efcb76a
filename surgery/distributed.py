"""Several processes on one job, started by torchrun: who does which blocks, and how sums come together.

One process alone is the usual case: then every function here gives back what it got. gloo talks between CPUs, NCCL
between GPUs; torchrun's rendezvous and its environment say who is who.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from surgery.errors import DistributedError

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint

TIMEOUT = timedelta(hours=2)  # a slow disk at one end must not end the run


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def rank() -> int:
    """Which of them this one is, from 0; the first writes and talks."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def join(device: torch.device) -> None:
    """Meet the other processes, once; alone there is nobody to meet."""
    if world_size() > 1 and not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        interface = interface_towards(os.environ["MASTER_ADDR"])
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        with _together():
            distributed.init_process_group(backend, timeout=TIMEOUT)


def interface_towards(host: str) -> str | None:
    """The network interface through which `host` is reached, None where none can be told.

    gloo would take the one this machine's own name resolves to, which often is the loopback.
    """
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            mine = probe.getsockname()[0]
    except OSError:
        return None
    names = [name for name, known in psutil.net_if_addrs().items() for one in known if one.address == mine]
    return names[0] if names else None


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Say in one line that the others are gone, where torch would tell of sockets. Raises DistributedError."""
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(
            "the processes of this job lost each other",
            where=f"rank {rank()} of {world_size()}",
            found=str(error).splitlines()[0][:200],
            next_step="look for the first rank that failed; the same command goes on where the job stopped",
        ) from error


def leave() -> None:
    """Part from the others."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def shard(blocks: int) -> slice:
    """The contiguous share of `blocks` that is this process's, as even as can be."""
    size, more = divmod(blocks, world_size())
    start = rank() * size + min(rank(), more)
    return slice(start, start + size + (rank() < more))


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over processes, in place."""
    if world_size() > 1:
        with _together():
            distributed.all_reduce(values)
    return values


def largest(values: torch.Tensor) -> torch.Tensor:
    """Maximum over processes, in place."""
    if world_size() > 1:
        with _together():
            distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return values


def least(values: torch.Tensor) -> torch.Tensor:
    """Minimum over processes, in place."""
    if world_size() > 1:
        with _together():
            distributed.all_reduce(values, distributed.ReduceOp.MIN)
    return values


def everywhere(known: list[bool], device: torch.device) -> list[bool]:
    """Which of these hold in every process."""
    return [bool(one) for one in least(torch.tensor(known, dtype=torch.int32, device=device)).tolist()]


class SharedReading:
    """Reads tensors in turn with the other processes, which get them from whoever's turn it is.

    All must ask for the same tensors in the same order, in one thread at a time. The readers talk through gloo, in a group
    of their own, so that they don't come between sums that another thread forms meanwhile.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.turn = 0
        self.nbytes = 0  # read by this process
        self.group: Any = None
        if world_size() > 1:
            with _together():
                self.group = distributed.new_group(backend="gloo", timeout=TIMEOUT)

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored, as `Checkpoint.read`."""
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
            with _together():
                distributed.broadcast(tensor.view(-1).view(torch.uint8), owner, group=self.group)
        return tensor


def rows(values: torch.Tensor) -> torch.Tensor:
    """Rows [n, ...] of all processes, n their own each, in the order of ranks."""
    if world_size() == 1:
        return values
    found: list[Any] = [None] * world_size()
    with _together():
        distributed.all_gather_object(found, values.cpu())
    return torch.cat(found).to(values.device)


def wait() -> None:
    """Until all are here."""
    if world_size() > 1:
        with _together():
            distributed.barrier()
