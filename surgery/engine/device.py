"""The compute device, its memory, and the dtype of accumulators."""

from __future__ import annotations

import os

import torch

from surgery.engine.distributed import local_rank, world_size
from surgery.errors import UsageError

TOKENS_PER_STEP = {"cpu": 2048, "cuda": 8192, "mps": 2048}  # tokens in a micro-batch


def pick_device(option: str) -> torch.device:
    """The device of `--device auto|cpu|cuda|cuda:N|mps`. Raises UsageError when it is not available.

    Of the processes that torchrun started on a machine each takes a GPU of its own, unless one is named.
    """
    if option == "auto":
        other = "mps" if torch.backends.mps.is_available() else "cpu"
        option = "cuda" if torch.cuda.is_available() else other
    try:
        device = torch.device(option)
    except RuntimeError as error:
        raise UsageError("unknown device", expected="auto, cpu, cuda, cuda:N or mps", found=option) from error
    if str(device) == "cuda" and world_size() > 1:  # no index
        device = torch.device("cuda", local_rank())
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise UsageError(
            "that device is not on this machine", found=str(device), next_step="use --device cpu"
        )
    return device


def default_memory() -> int:
    """Half of this machine's physical memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def free_device_bytes(device: torch.device) -> int:
    """Usable free CUDA memory in bytes: what is free now, less a tenth of the total; 0 for other devices."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - total // 10)


def total_device_bytes(device: torch.device) -> int:
    """Nine tenths of the total CUDA memory in bytes, regardless of current use; 0 for other devices."""
    return torch.cuda.mem_get_info(device)[1] * 9 // 10 if device.type == "cuda" else 0


def wide_dtype(device: torch.device) -> torch.dtype:
    """The accumulator dtype for sums: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
