"""Parsing and formatting of byte counts and durations."""

from __future__ import annotations

import re

from surgery.errors import UsageError

UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 1024,
    "mi": 1024**2,
    "gi": 1024**3,
    "ti": 1024**4,
}


def parse_bytes(text: str) -> int:
    """Bytes from text such as '8GiB', '500M', '1073741824'. Raises UsageError for other text."""
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None:
        raise UsageError("not an amount of memory", expected="a number with a unit, as 8GiB", found=text)
    return int(float(match[1]) * UNITS[match[2] or ""])


def format_bytes(count: int) -> str:
    """A byte count as text in KiB, MiB or GiB."""
    if count < 1 << 20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"


def format_duration(seconds: float) -> str:
    """A duration as text in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
