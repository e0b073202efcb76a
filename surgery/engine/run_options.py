"""RunOptions: device, compute dtype and memory budget of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from surgery.byte_units import parse_bytes
from surgery.checkpoint.manifest import versions
from surgery.checkpoint.reader import Checkpoint
from surgery.engine.device import default_memory, pick_device
from surgery.errors import UsageError

DTYPE_OPTIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RunOptions:
    """Device, compute dtype, and memory budget: bytes of host memory beyond what the libraries take."""

    device: torch.device
    dtype: torch.dtype
    memory: int

    @classmethod
    def choose(
        cls,
        checkpoint: Checkpoint,
        device: str = "auto",
        dtype: str = "auto",
        memory: str | int | None = None,
    ) -> RunOptions:
        """Options for a checkpoint. `memory` is bytes or text as "8GiB"; half of the machine's by default.

        Raises UsageError for a device this machine lacks, an unknown dtype, or a `memory` text that can't be
        parsed.
        """
        chosen = pick_device(device)
        if memory is None:
            budget = default_memory()
        else:
            budget = parse_bytes(memory) if isinstance(memory, str) else memory
        return cls(chosen, pick_dtype(dtype, checkpoint, chosen), budget)

    def as_json(self) -> dict[str, Any]:
        """The `run` entry of index.json."""
        return {"device": self.device.type, "dtype": self.dtype_name, "versions": versions()}

    @property
    def dtype_name(self) -> str:
        """The compute dtype as `--dtype` names it."""
        return str(self.dtype).removeprefix("torch.")


def storage_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating-point dtype with the most bytes in the checkpoint; float32 if it has none."""
    nbytes: dict[torch.dtype, int] = {}
    for entry in checkpoint.tensors.values():
        if entry.dtype.is_floating_point:
            nbytes[entry.dtype] = nbytes.get(entry.dtype, 0) + entry.nbytes
    return max(nbytes, key=lambda dtype: nbytes[dtype], default=torch.float32)


def check_dtype(option: str) -> None:
    """Raise UsageError for an unknown --dtype."""
    if option != "auto" and option not in DTYPE_OPTIONS:
        raise UsageError("unknown dtype", expected=f"auto, {', '.join(DTYPE_OPTIONS)}", found=option)


def pick_dtype(option: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The compute dtype of a `--dtype` option. Raises UsageError for an unknown one.

    `auto` is bfloat16 for a bfloat16 or float16 checkpoint on a device that supports bfloat16 in hardware,
    float32 otherwise. It never chooses float16, because gradients of a summed loss overflow it.
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
