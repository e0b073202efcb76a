"""What a job will take, in words and as JSON."""

from __future__ import annotations

from typing import Any

from surgery.budget.budget import Cost
from surgery.budget.heal_cost import HealCost
from surgery.budget.index_cost import IndexCost
from surgery.budget.machine import Machine
from surgery.budget.prune_cost import PruneCost
from surgery.byte_units import format_bytes, format_duration

PLACES = {"device": "on the device", "memory": "in memory", "disk": "in a file on disk"}


def index_cost_lines(cost: IndexCost, layers: int) -> list[str]:
    """Lines about an index, without time."""
    return [
        memory_line(cost),
        f"Layer inputs: {format_bytes(cost.hidden_bytes)}, kept {PLACES[cost.hidden_on]}; "
        f"blocks in a layer at once: {cost.micro_batch}; "
        f"activations cached for {cost.cached_layers} of {layers} layers",
        f"Weights read: {format_bytes(cost.read_bytes)}; {cost.flops / 1e12:,.1f} TFLOP",
        f"Before that, not counted: spikes are found and measured, {cost.proof_flops / 1e12:,.2f} TFLOP at "
        "most for each structure",
    ]


def prune_cost_lines(cost: PruneCost, passes: int = 1) -> list[str]:
    """Lines about one pass that prunes, or about each of several, without time."""
    times = f" in each of {passes} passes over the layers" if passes > 1 else ""
    lines = [memory_line(cost)]
    if cost.hidden_bytes:
        lines.append(_hidden_line(cost))
    if cost.repair_bytes:
        parts = f", {cost.repair_parts} passes over a layer" if cost.repair_parts > 1 else ""
        lines.append(f"Repair: {format_bytes(cost.repair_bytes)} of matrices at most{parts}")
    operations = f"{cost.flops / 1e12:,.1f} TFLOP"
    if cost.float64_flops:
        operations += (
            f", {cost.float32_flops / 1e12:,.1f} in float32, {cost.float64_flops / 1e12:,.1f} in float64"
        )
    moved = f"Bytes read: {format_bytes(cost.read_bytes)}, written: {format_bytes(cost.write_bytes)}"
    return [*lines, f"{moved}; {operations}{times}"]


def heal_cost_lines(cost: HealCost) -> list[str]:
    """Lines about a heal, without time."""
    kept = format_bytes(cost.keep_bytes) if cost.keep_bytes else "none"
    targets = {
        "disk": f"on disk: {format_bytes(cost.target_bytes)}",
        "recompute": "computed in every step",
        "none": "not needed",
    }[cost.targets]
    return [
        memory_line(cost),
        f"Trained numbers and their state: {format_bytes(cost.state_bytes)}, kept {PLACES[cost.state_on]}; "
        f"on disk for them: {format_bytes(cost.state_disk_bytes)}; targets {targets}",
        f"Layers that stay in memory: {kept} of the student; "
        f"activations that are not computed again: {format_bytes(cost.graph_bytes)} at most",
        _hidden_line(cost),
        f"Bytes read: {format_bytes(cost.read_bytes)}, written: {format_bytes(cost.write_bytes)}; "
        f"{cost.flops / 1e12:,.1f} TFLOP",
    ]


def pass_cost_lines(cost: Cost) -> list[str]:
    """Lines about forward passes, without time."""
    moved = f"Bytes read: {format_bytes(cost.read_bytes)}, written: {format_bytes(cost.write_bytes)}"
    hidden = [_hidden_line(cost)] if cost.hidden_bytes else []
    return [memory_line(cost), *hidden, f"{moved}; {cost.flops / 1e12:,.1f} TFLOP"]


def memory_line(cost: Cost) -> str:
    """The peak, and the smallest --memory that would do."""
    return (
        f"Memory: {format_bytes(cost.host_bytes)} at most"
        + (f", {format_bytes(cost.device_bytes)} on the device" if cost.device_bytes else "")
        + f" (--memory {-(-cost.smallest_bytes // (1 << 20))}MiB would do)"
    )


def _hidden_line(cost: Cost) -> str:
    return (
        f"Hidden states: {format_bytes(cost.hidden_bytes)}, kept {PLACES[cost.hidden_on]}; "
        f"blocks in a layer at once: {cost.micro_batch}"
    )


def time_line(cost: Cost, machine: Machine, passes: int = 1) -> str:
    """How long it takes at best, and what bounds it."""
    seconds = {kind: passes * value for kind, value in cost.seconds(machine).items()}
    slower = max(seconds, key=lambda kind: seconds[kind])
    bound = "arithmetic" if slower == "compute" else "reading"
    return (
        f"Time: {format_duration(seconds[slower])} at best, bound by {bound} (measured here: "
        f"{machine.flops / 1e9:,.0f} GFLOP/s, {machine.read / 1e6:,.0f} MB/s)"
    )


def cost_json(cost: Cost, machine: Machine, passes: int = 1) -> dict[str, Any]:
    """The same for programs; `seconds` are those of all passes, `costs` those of one."""
    seconds = {kind: passes * value for kind, value in cost.seconds(machine).items()}
    return {"costs": cost.as_json(), "machine": machine.as_json(), "seconds": seconds}
