"""Measured matrix-product and read rates of this machine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from surgery.engine.device import TOKENS_PER_STEP, wide_dtype
from surgery.engine.open_model import Model

PROBE_SECONDS = 0.5
PROBE_BYTES = 256 << 20
WIDE_PROBE = 1024


@dataclass(frozen=True)
class Machine:
    """Measured rates.

    - `flops`: operations per second of a matrix product in the compute dtype.
    - `read`: bytes per second read from the checkpoint.
    - `float32_flops`, `float64_flops`: operations per second in float32 and float64; 0 if not measured.
    """

    flops: float
    read: float
    float32_flops: float = 0.0
    float64_flops: float = 0.0

    def as_json(self) -> dict[str, float]:
        """The `machine` entry of a dry run's JSON, without rates that were not measured."""
        rates = {
            "flops_per_second": self.flops,
            "read_bytes_per_second": self.read,
            "float32_flops_per_second": self.float32_flops,
            "float64_flops_per_second": self.float64_flops,
        }
        return {name: rate for name, rate in rates.items() if rate}


def measure_machine(model: Model, wide: bool = False) -> Machine:
    """Measure, for about a second, the rates of a model's matrix products and of reading its weights.

    With `wide`, another second measures float32 and float64 products, which repairs use.
    """
    checkpoint, meta_model, options = model.checkpoint, model.meta_model, model.run
    largest = max(
        (
            entry
            for stored_parameters in meta_model.layer_parameters
            for p in stored_parameters
            for entry in map(checkpoint.tensors.__getitem__, p.stored)
        ),
        key=lambda entry: entry.numel,
    )
    rows, columns = largest.shape[-2:] if len(largest.shape) > 1 else (largest.numel, 1)
    tokens = TOKENS_PER_STEP[options.device.type]
    weight = torch.randn(rows, columns, device=options.device).to(options.dtype)
    inputs = torch.randn(tokens, columns, device=options.device).to(options.dtype)
    flops = _rate(lambda: inputs @ weight.T, 2.0 * tokens * rows * columns, options.device)
    started, read = time.perf_counter(), 0
    for entry in checkpoint.tensors.values():
        checkpoint.read(entry.name)
        read += entry.nbytes
        if read >= PROBE_BYTES or time.perf_counter() - started > PROBE_SECONDS:
            break
    read_rate = read / max(1e-9, time.perf_counter() - started)
    wide_flops = []
    for dtype in (torch.float32, wide_dtype(options.device)) if wide else ():
        square = torch.randn(WIDE_PROBE, WIDE_PROBE, device=options.device).to(dtype)
        multiply = functools.partial(torch.matmul, square, square)
        wide_flops.append(_rate(multiply, 2.0 * WIDE_PROBE**3, options.device))
    return Machine(flops, read_rate, *wide_flops)


def _rate(run: Callable[[], object], operations: float, device: torch.device) -> float:
    """Operations per second of `run`, which takes `operations`, measured for PROBE_SECONDS."""

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
    return operations * count / (time.perf_counter() - started)
