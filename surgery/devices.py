"""Which device and dtype to compute with, and how much memory may be used."""

from __future__ import annotations

import os
import re

import torch

from surgery.checkpoint import Checkpoint
from surgery.errors import UsageError

DTYPE_OPTIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "ki": 1024,
    "mi": 1024**2,
    "gi": 1024**3,
    "ti": 1024**4,
}
TOKENS_PER_STEP = {"cpu": 2048, "cuda": 8192, "mps": 2048}  # tokens in a micro-batch


def pick_device(option: str) -> torch.device:
    """The device of `--device auto|cpu|cuda|cuda:N|mps`. Raises UsageError when it isn't there."""
    if option == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(option)
    except RuntimeError as error:
        raise UsageError("unknown device", expected="auto, cpu, cuda, cuda:N or mps", found=option) from error
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise UsageError("that device is not on this machine", found=option, next_step="use --device cpu")
    return device


def storage_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that holds most of the checkpoint's bytes."""
    held: dict[torch.dtype, int] = {}
    for entry in checkpoint.tensors.values():
        if entry.dtype.is_floating_point:
            held[entry.dtype] = held.get(entry.dtype, 0) + entry.nbytes
    return max(held, key=lambda dtype: held[dtype], default=torch.float32)


def check_dtype(option: str) -> None:
    """Raise UsageError for a --dtype there is not."""
    if option != "auto" and option not in DTYPE_OPTIONS:
        raise UsageError("unknown dtype", expected=f"auto, {', '.join(DTYPE_OPTIONS)}", found=option)


def pick_dtype(option: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype to compute in; `auto` keeps the checkpoint's where the device multiplies it in hardware.

    float16 computes in bfloat16, or in float32 where that is slow: gradients of a summed loss overflow float16.
    """
    check_dtype(option)
    if option != "auto":
        return DTYPE_OPTIONS[option]
    if storage_dtype(checkpoint) not in (torch.bfloat16, torch.float16):
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def parse_bytes(text: str) -> int:
    """Bytes of '8GiB', '500M', '1073741824'. Raises UsageError otherwise."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None:
        raise UsageError("not an amount of memory", expected="a number with a unit, as 8GiB", found=text)
    return int(float(match[1]) * UNITS[match[2] or ""])


def amount(count: int) -> str:
    """Bytes in KiB, MiB or GiB."""
    if count < 1 << 20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"


def default_memory() -> int:
    """Half of this machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def room(device: torch.device) -> int:
    """Bytes of an accelerator's own memory that may be filled: what is free now but for a tenth; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - total // 10)


def capacity(device: torch.device) -> int:
    """Bytes of an accelerator's own memory, but for a tenth, whatever else is in it now; 0 for a CPU."""
    return torch.cuda.mem_get_info(device)[1] * 9 // 10 if device.type == "cuda" else 0


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype sums are kept in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def micro_batch(block_size: int, device: torch.device) -> int:
    """Blocks that go through a layer together."""
    return max(1, TOKENS_PER_STEP[device.type] // block_size)
