"""What a job on a rented machine is said to take and cost, by hand, and the data it is priced with."""

from __future__ import annotations

import pytest

from surgery.budget.budget import Cost
from surgery.budget.machine import Machine
from surgery.budget.rented import (
    DISK,
    DOWNLOAD,
    START_SECONDS,
    SUSTAINED,
    JobNeeds,
    job_words,
    offers,
    read_flavors,
    timeout_word,
)

HERE = Machine(flops=1e12, read=1e9, float32_flops=5e11, float64_flops=1e11)


def cost(flops: float = 0.0, smallest: int = 1 << 30, hidden: int = 0, read: int = 0) -> Cost:
    """A cost with only what matters here."""
    return Cost(
        micro_batch=1,
        hidden_bytes=hidden,
        hidden_on="memory",
        host_bytes=smallest,
        device_bytes=0,
        smallest_bytes=smallest,
        read_bytes=read,
        write_bytes=0,
        flops=flops,
    )


def priced(needs: JobNeeds) -> dict[str, tuple[float, float, str | None]]:
    """Flavour -> seconds, dollars, what is lacking."""
    return {one.flavor.name: (one.seconds, one.dollars, one.lacks) for one in offers(needs, HERE, threads=2)}


def test_seconds_and_dollars_are_those_by_hand() -> None:
    flops, read, moved = 3.6e15, 50 * 10**9, 10 * 10**9
    found = priced(JobNeeds((cost(flops), cost(read=read)), moved, moved))
    fixed = START_SECONDS + 2 * moved / DOWNLOAD + read / DISK
    cpu = fixed + flops / (1e12 * 8 / 2 / 2)  # 4 cores where 1e12 is of 2 threads
    assert found["cpu-upgrade"][0] == pytest.approx(cpu)
    assert found["cpu-upgrade"][1] == pytest.approx(-(-cpu // 60) / 60 * 0.03)
    assert found["a100-large"][0] == pytest.approx(fixed + flops / (312e12 * SUSTAINED))


def test_the_cheapest_that_fits_comes_first() -> None:
    small = offers(JobNeeds((cost(1e12),), 10**9, 10**9), HERE, 2)
    assert small[0].flavor.name == "cpu-basic" and small[0].timeout == 1800
    long = offers(JobNeeds((cost(1e19),), 10**9, 10**9), HERE, 2)
    assert long[0].dollars == min(one.dollars for one in long)
    assert long[0].timeout >= 2 * long[0].seconds and long[0].most_dollars >= 2 * long[0].dollars
    found = priced(JobNeeds((cost(smallest=40 << 30, hidden=10**11),), 10**11, 10**11))
    assert found["cpu-upgrade"][2] == "memory" and found["l4x1"][2] == "memory"
    assert found["cpu-xl"][2] is None and found["l40sx1"][2] == "memory"
    assert found["a100-large"][2] is None


def test_the_table_is_of_one_day_and_names_flavours_that_hf_knows() -> None:
    hub = pytest.importorskip("huggingface_hub")
    source, flavors = read_flavors()
    assert source["read"] and "jobs-pricing" in source["source"]
    assert {flavor.name for flavor in flavors} <= {one.value for one in hub.JobHardware}


def test_words_of_a_job() -> None:
    words = job_words("l4x1", 5400, "ffn-surgeon==1", ["surgeon", "prune", "a/b"], ["x:/y"])
    assert words[:8] == ["hf", "jobs", "uv", "run", "--flavor", "l4x1", "--timeout", "90m"]
    assert words[8:] == ["-s", "HF_TOKEN", "--with", "ffn-surgeon==1", "-v", "x:/y", "--", *words[-3:]]
    assert [timeout_word(seconds) for seconds in (1800, 7200)] == ["30m", "2h"]
