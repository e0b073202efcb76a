"""What a run will take, in words."""

from __future__ import annotations

from typing import Any

from surgery.costs import IndexCosts, Machine


def amount(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def costs_lines(costs: IndexCosts, layers: int, machine: Machine | None = None) -> list[str]:
    """A few lines for people; with `machine` also how long it will take at best."""
    places = {"device": "on the device", "memory": "in memory", "disk": "in a file on disk"}
    lines = [
        f"Memory: {amount(costs.host_bytes)} at most"
        + (f", {amount(costs.device_bytes)} on the device" if costs.device_bytes else "")
        + f" (--memory {amount(costs.smallest_bytes)} would do)",
        f"Layer inputs: {amount(costs.hidden_bytes)}, kept {places[costs.hidden_on]}; {costs.micro_batch} blocks go through "
        f"a layer together; activations of {costs.graph_layers} of {layers} layers kept, the others computed again",
        f"Weights read: {amount(costs.read_bytes)}; {costs.flops / 1e12:,.1f} TFLOP",
    ]
    if machine is not None:
        seconds = machine.seconds(costs)
        slower = max(seconds, key=lambda kind: seconds[kind])
        bound = "arithmetic" if slower == "compute" else "reading"
        lines.append(
            f"Time: {duration(seconds[slower])} at best, bound by {bound} (measured here: {machine.flops / 1e9:,.0f} GFLOP/s, "
            f"{machine.read / 1e6:,.0f} MB/s)"
        )
    return lines


def costs_json(costs: IndexCosts, machine: Machine) -> dict[str, Any]:
    """The same for programs."""
    rates = {"flops_per_second": machine.flops, "read_bytes_per_second": machine.read}
    return {"costs": costs.as_json(), "machine": rates, "seconds": machine.seconds(costs)}
