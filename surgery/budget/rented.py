"""Machines of Hugging Face Jobs: which of them a job fits, and what it takes and costs there at about.

`data/job_flavors.json` has their sizes and prices, with its source and date. A job is priced with `Cost` as a
dry run is, at rates that nobody measured on these machines: on CPUs, this machine's rate by thread; on GPUs,
SUSTAINED of what the maker states.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from surgery.budget.budget import Cost
from surgery.budget.machine import Machine

GB = 10**9
SUSTAINED = 1 / 3  # share of a GPU's stated rate that streamed layers are assumed to reach
DOWNLOAD = 100e6  # bytes per second from and to the Hub, assumed
DISK = 500e6  # bytes per second, assumed
START_SECONDS = 300  # until the machine runs and the packages are installed, assumed
MARGIN = 2.0  # the timeout over the estimate
LEAST_TIMEOUT = 1800  # seconds
MODEL_SHARE = 0.5  # of a machine's memory: the default of --memory


@dataclass(frozen=True)
class Flavor:
    """A machine of Hugging Face Jobs. `dollars` are by the hour; sizes are bytes, rates FLOP/s (none: CPUs).

    `tflops` are rates in the compute dtype, float32 and float64.
    """

    name: str
    vcpus: int
    memory: float
    disk: float
    dollars: float
    gpu_memory: float = 0.0
    tflops: tuple[float, ...] = ()

    def machine(self, here: Machine, threads: int) -> Machine:
        """The rates that a job is priced with; `here` was measured with `threads` threads."""
        if self.tflops:
            return Machine(SUSTAINED * self.tflops[0] * 1e12, DISK, *(x * 1e12 for x in self.tflops[1:]))
        cores = self.vcpus / 2 / threads  # two virtual CPUs are the threads of one core
        return Machine(here.flops * cores, DISK, here.float32_flops * cores, here.float64_flops * cores)

    def lacks(self, needs: JobNeeds) -> str | None:
        """What a job needs more of than the machine has; None where it fits."""
        if needs.memory > MODEL_SHARE * self.memory:
            return "memory"
        if self.gpu_memory and needs.memory > self.gpu_memory:
            return "GPU memory"
        return "disk" if needs.disk > self.disk else None


@dataclass(frozen=True)
class JobNeeds:
    """What a job takes: `costs` of its parts, bytes of `memory` and `disk`, bytes down and up the network."""

    costs: tuple[Cost, ...]
    downloaded: int
    uploaded: int

    @property
    def memory(self) -> int:
        """The smallest --memory that all parts do with."""
        return max(cost.smallest_bytes for cost in self.costs)

    @property
    def disk(self) -> int:
        """The model, the result, and hidden states that went to disk in the worst case."""
        return self.downloaded + self.uploaded + max(2 * cost.hidden_bytes for cost in self.costs)


@dataclass(frozen=True)
class Offer:
    """A job on a flavour: about how many `seconds` it takes; what it `lacks` to run there, or None."""

    flavor: Flavor
    seconds: float
    lacks: str | None

    @property
    def dollars(self) -> float:
        """Price of the estimated time, which is billed by the minute."""
        return math.ceil(self.seconds / 60) / 60 * self.flavor.dollars

    @property
    def timeout(self) -> int:
        """Seconds after which the job is stopped, in whole half hours: MARGIN times the estimate."""
        return max(LEAST_TIMEOUT, math.ceil(MARGIN * self.seconds / 1800) * 1800)

    @property
    def most_dollars(self) -> float:
        """Price of a job that runs into its timeout."""
        return self.timeout / 3600 * self.flavor.dollars

    def as_json(self) -> dict[str, Any]:
        """The offer, for programs."""
        return {
            "flavor": self.flavor.name,
            "seconds": round(self.seconds),
            "dollars": round(self.dollars, 4),
            "timeout_seconds": self.timeout,
            "dollars_at_timeout": round(self.most_dollars, 4),
            "lacks": self.lacks,
        }


def read_flavors() -> tuple[dict[str, Any], list[Flavor]]:
    """(Source and date of the table, its flavours)."""
    text = resources.files("surgery").joinpath("data/job_flavors.json").read_text(encoding="utf-8")
    content = json.loads(text)
    flavors = [
        Flavor(
            name=row["name"],
            vcpus=row["vcpus"],
            memory=row["memory_gb"] * GB,
            disk=row["disk_gb"] * GB,
            dollars=row["dollars"],
            gpu_memory=row.get("gpu_memory_gb", 0) * GB,
            tflops=tuple(row.get("tflops", ())),
        )
        for row in content.pop("flavors")
    ]
    return content, flavors


def offers(needs: JobNeeds, here: Machine, threads: int) -> list[Offer]:
    """A job on every flavour: those that it fits first, the cheapest first, of equal price the fastest."""
    _, flavors = read_flavors()
    made = [_offer(flavor, needs, flavor.machine(here, threads)) for flavor in flavors]
    return sorted(made, key=lambda one: (one.lacks is not None, one.dollars, one.seconds))


def _offer(flavor: Flavor, needs: JobNeeds, machine: Machine) -> Offer:
    moved = (needs.downloaded + needs.uploaded) / DOWNLOAD
    computing = sum(max(cost.seconds(machine).values()) for cost in needs.costs)
    return Offer(flavor, START_SECONDS + moved + computing, flavor.lacks(needs))


def timeout_word(seconds: int) -> str:
    """Seconds as `hf jobs` takes a timeout: 5400 as 90m, 7200 as 2h."""
    return f"{seconds // 3600}h" if seconds % 3600 == 0 else f"{seconds // 60}m"


def job_words(
    flavor: str, timeout: int, package: str, command: Sequence[str], volumes: Sequence[str] = ()
) -> list[str]:
    """The words of `hf jobs uv run` for a command of surgeon; the token is passed on by name, as a secret."""
    words = ["hf", "jobs", "uv", "run", "--flavor", flavor, "--timeout", timeout_word(timeout)]
    words += ["-s", "HF_TOKEN", "--with", package]
    for volume in volumes:
        words += ["-v", volume]
    return [*words, "--", *command]
