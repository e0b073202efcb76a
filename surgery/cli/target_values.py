"""Values of the options that set a target and say what may go for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from surgery import defaults
from surgery.cli.common import say
from surgery.cut.kinds import KINDS
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.engine.open_model import Model


def one_target(given: Mapping[str, str | None]) -> tuple[str, str] | None:
    """(unit, text) of the target that is given, of texts by unit. Raises UsageError for several."""
    stated = [(unit, text) for unit, text in given.items() if text is not None]
    if len(stated) > 1:
        raise UsageError(
            "one target at a time", found=", ".join(f"--target-{unit} {text}" for unit, text in stated)
        )
    return stated[0] if stated else None


def target_amount(unit: str, text: str) -> int:
    """The number in a target's text, of parameters or bytes."""
    from surgery.budget.target import PARAMS
    from surgery.byte_units import parse_bytes
    from surgery.cli.heal_options import parse_count

    return parse_count(text, "--target-params", "parameters") if unit == PARAMS else parse_bytes(text)


def default_kinds(model: Model, tell: bool = False) -> tuple[str, ...]:
    """The kinds that may go where none are named: those that the model can be cut by; with `tell`, says which
    can't.
    """
    from surgery.search.plan_to_target import usable_kinds

    usable = usable_kinds(model, defaults.TARGET_CUTS)
    for kind, reason in usable.items():
        say(f"Not cut: {KINDS[kind].label} ({reason})", quiet=not (reason and tell))
    return tuple(kind for kind, reason in usable.items() if not reason)


def kinds_of(value: str, parameter: click.Parameter) -> tuple[str, ...]:
    """Names of kinds separated by commas. Raises BadParameter for another name."""
    names = tuple(dict.fromkeys(word.strip() for word in value.split(",")))
    for name in names:
        if name not in KINDS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(KINDS)}.", param=parameter)
    return names


def kinds(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Kinds, or None where none are named."""
    return None if value is None else kinds_of(value, parameter)


def layers(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Layer numbers separated by commas, sorted."""
    return tuple(sorted(set(_numbers(value, parameter, "layer numbers, as 5,12"))))


def widths(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Numbers of channels separated by commas, in the order of layers; None where none are given."""
    return _numbers(value, parameter, "numbers, as 512,640") or None


def _numbers(value: str | None, parameter: click.Parameter, what: str) -> tuple[int, ...]:
    """Numbers separated by commas; `what` says in an error what was expected."""
    try:
        return () if value is None else tuple(int(word) for word in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not {what}", param=parameter) from error


def search_seconds(given: float | None) -> float:
    """What a search may take, where `given` is what the command line says."""
    return defaults.SEARCH_SECONDS if given is None else given


def factor(_: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A factor above 1, as 1.3x."""
    if value is None:
        return None
    try:
        found = float(value.strip().lower().removesuffix("x"))
    except ValueError:
        found = 0.0
    if not 1 < found < float("inf"):
        raise click.BadParameter(f"{value!r} is not a factor above 1, as 1.3x", param=parameter)
    return found


def duration(_: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Seconds from a number with s, m or h."""
    units = {"s": 1, "m": 60, "h": 3600}
    if value is None:
        return None
    try:
        return float(value[:-1]) * units[value[-1:].lower()]
    except (ValueError, KeyError) as error:
        raise click.BadParameter(f"{value!r} is not a time, as 90s, 20m or 2h", param=parameter) from error
