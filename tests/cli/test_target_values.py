"""Numbers that options take."""

from __future__ import annotations

import pytest

from surgery.budget.target import PARAMS
from surgery.cli.heal_options import parse_count
from surgery.cli.target_values import target_amount
from surgery.errors import UsageError


@pytest.mark.parametrize(
    ("text", "number"), [("1B", 10**9), ("1.235B", 1_235_000_000), ("94.7M", 94_700_000), ("500k", 500_000)]
)
def test_numbers_of_parameters(text: str, number: int) -> None:
    assert target_amount(PARAMS, text) == parse_count(text) == number


def test_what_is_no_number_names_its_option() -> None:
    with pytest.raises(UsageError, match="not a number of parameters; in --target-params"):
        target_amount(PARAMS, "a billion")
