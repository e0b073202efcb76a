"""Byte counts as people write them."""

from __future__ import annotations

import pytest

from surgery.byte_units import parse_bytes
from surgery.errors import UsageError


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 << 30), ("1.5g", 1_500_000_000), ("1TB", 10**12), (" 2 ti", 2 << 40), ("512", 512)],
)
def test_byte_counts(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "lots", ".", "1.2.3GiB", "-1G", "8 giants"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not an amount of memory"):
        parse_bytes(text)
