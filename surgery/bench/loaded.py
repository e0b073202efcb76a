"""What a runtime gives to be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Generate = Callable[[list[list[int]], int], None]  # (prompts, new tokens of each)


@dataclass(frozen=True)
class Loaded:
    """A loaded model: `generate`, the versions that compute, tokens in the vocabulary, peak device memory."""

    generate: Generate
    versions: dict[str, str]
    vocabulary: int
    device_bytes: Callable[[], int | None] = lambda: None
