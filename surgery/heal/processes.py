"""What several processes of one heal must have in common, checked before the work."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from surgery.engine import distributed
from surgery.errors import UsageError

DIGEST_BYTES = 7  # of a hash that fits an int64


def check_shares(blocks: int, block_size: int) -> None:
    """Raise UsageError where a step of `blocks` blocks leaves a process without work."""
    processes = distributed.world_size()
    if blocks < processes:
        raise UsageError(
            "fewer blocks in a step than processes",
            expected=f"--batch-tokens {processes * block_size} or more, and as many --tokens",
            found=f"{blocks} x {block_size} tokens for {processes} processes",
        )


def check_same(inputs: dict[str, Any], device: torch.device) -> None:
    """Raise UsageError unless all processes give equal `inputs`, by name of what they are."""
    found = [_number(value) for value in inputs.values()]
    own = torch.tensor(found, device=device)
    low, high = distributed.all_reduce_min(own.clone()), distributed.all_reduce_max(own.clone())
    differing = [name for name, same in zip(inputs, (low == high).tolist(), strict=True) if not same]
    if differing:
        raise UsageError(
            "the processes of this job were not given the same",
            where=", ".join(differing),
            next_step="start the same command, with the same files, on every machine",
        )


def _number(value: Any) -> int:
    """A number that differs for values of different JSON."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:DIGEST_BYTES])
