"""What a run will take, in words."""

from __future__ import annotations

from typing import Any

from surgery.costs import IndexCosts
from surgery.cut_costs import CutCosts
from surgery.devices import amount
from surgery.machine import Machine


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


PLACES = {"device": "on the device", "memory": "in memory", "disk": "in a file on disk"}


def costs_lines(costs: IndexCosts, layers: int, machine: Machine | None = None) -> list[str]:
    """A few lines for people; with `machine` also how long it will take at best."""
    lines = [
        _memory(costs),
        f"Layer inputs: {amount(costs.hidden_bytes)}, kept {PLACES[costs.hidden_on]}; {costs.micro_batch} blocks go through "
        f"a layer together; dear results of {costs.graph_layers} of {layers} layers kept, the others computed again",
        f"Weights read: {amount(costs.read_bytes)}; {costs.flops / 1e12:,.1f} TFLOP",
    ]
    return lines if machine is None else [*lines, _time(costs.seconds(machine), machine)]


def cut_costs_lines(costs: CutCosts, machine: Machine | None = None, walks: int = 1) -> list[str]:
    """The same of a cut, or of so many walks over the layers that each make some."""
    times = f" in each of {walks} walks over the layers" if walks > 1 else ""
    lines = [_memory(costs)]
    if costs.hidden_bytes:
        lines.append(
            f"Hidden states: {amount(costs.hidden_bytes)}, kept {PLACES[costs.hidden_on]}; blocks in a layer at once: "
            f"{costs.micro_batch}"
        )
    if costs.repair_bytes:
        passes = f", {costs.repair_parts} passes over a layer" if costs.repair_parts > 1 else ""
        lines.append(f"Repair: {amount(costs.repair_bytes)} of matrices at most{passes}")
    operations = f"{costs.flops / 1e12:,.1f} TFLOP"
    if costs.float64_flops:
        operations += (
            f", {costs.float32_flops / 1e12:,.1f} in float32, {costs.float64_flops / 1e12:,.1f} in float64"
        )
    lines.append(
        f"Bytes read: {amount(costs.read_bytes)}, written: {amount(costs.write_bytes)}; {operations}{times}"
    )
    if machine is not None:
        seconds = {kind: walks * value for kind, value in costs.seconds(machine).items()}
        lines.append(_time(seconds, machine))
    return lines


def _memory(costs: IndexCosts | CutCosts) -> str:
    return (
        f"Memory: {amount(costs.host_bytes)} at most"
        + (f", {amount(costs.device_bytes)} on the device" if costs.device_bytes else "")
        + f" (--memory {-(-costs.smallest_bytes // (1 << 20))}MiB would do)"
    )


def _time(seconds: dict[str, float], machine: Machine) -> str:
    slower = max(seconds, key=lambda kind: seconds[kind])
    bound = "arithmetic" if slower == "compute" else "reading"
    return (
        f"Time: {duration(seconds[slower])} at best, bound by {bound} (measured here: {machine.flops / 1e9:,.0f} GFLOP/s, "
        f"{machine.read / 1e6:,.0f} MB/s)"
    )


def costs_json(costs: IndexCosts | CutCosts, machine: Machine, walks: int = 1) -> dict[str, Any]:
    """The same for programs; `seconds` are those of all walks, `costs` those of one."""
    seconds = {kind: walks * value for kind, value in costs.seconds(machine).items()}
    return {"costs": costs.as_json(), "machine": machine.as_json(), "seconds": seconds}
