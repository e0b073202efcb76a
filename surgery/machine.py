"""How fast this machine multiplies and reads, measured."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgery.checkpoint import Checkpoint
from surgery.devices import TOKENS_PER_STEP, wide_dtype
from surgery.skeleton import Skeleton

if TYPE_CHECKING:
    from surgery.indexing import RunOptions

PROBE_SECONDS = 0.5
PROBE_BYTES = 256 << 20
WIDE_PROBE = 1024


@dataclass(frozen=True)
class Machine:
    """Measured: operations a second of a matrix product in the compute dtype, bytes a second read from the checkpoint.

    The other two are operations a second in float32 and float64, where they were asked for.
    """

    flops: float
    read: float
    float32_flops: float = 0.0
    float64_flops: float = 0.0

    def as_json(self) -> dict[str, float]:
        """The `machine` of a dry run's JSON; rates that were not asked for are left out."""
        rates = {
            "flops_per_second": self.flops,
            "read_bytes_per_second": self.read,
            "float32_flops_per_second": self.float32_flops,
            "float64_flops_per_second": self.float64_flops,
        }
        return {name: rate for name, rate in rates.items() if rate}


def measure_machine(
    checkpoint: Checkpoint, skeleton: Skeleton, options: RunOptions, wide: bool = False
) -> Machine:
    """Spend about a second to see how fast this machine multiplies matrices of this model and reads its weights.

    With `wide` another one on float32 and float64, which repairs are computed in.
    """
    largest = max(
        (
            entry
            for assemblies in skeleton.inside
            for a in assemblies
            for entry in map(checkpoint.tensors.__getitem__, a.stored)
        ),
        key=lambda entry: entry.numel,
    )
    rows, columns = largest.shape[-2:] if len(largest.shape) > 1 else (largest.numel, 1)
    tokens = TOKENS_PER_STEP[options.device.type]
    weight = torch.randn(rows, columns, device=options.device).to(options.dtype)
    inputs = torch.randn(tokens, columns, device=options.device).to(options.dtype)
    rate = _rate(lambda: inputs @ weight.T, 2.0 * tokens * rows * columns, options.device)
    started, read = time.perf_counter(), 0
    for entry in checkpoint.tensors.values():
        checkpoint.read(entry.name)
        read += entry.nbytes
        if read >= PROBE_BYTES or time.perf_counter() - started > PROBE_SECONDS:
            break
    reading = read / max(1e-9, time.perf_counter() - started)
    others = []
    for dtype in (torch.float32, wide_dtype(options.device)) if wide else ():
        square = torch.randn(WIDE_PROBE, WIDE_PROBE, device=options.device).to(dtype)
        multiply = functools.partial(torch.matmul, square, square)
        others.append(_rate(multiply, 2.0 * WIDE_PROBE**3, options.device))
    return Machine(rate, reading, *others)


def _rate(run: Callable[[], object], each: float, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    wait()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < PROBE_SECONDS:
        run()
        wait()
        count += 1
    return each * count / (time.perf_counter() - started)
