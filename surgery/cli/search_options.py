"""The options of `surgeon compare` that set a target and what may go for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from surgery import defaults
from surgery.cli.options import collected
from surgery.cli.target_values import (
    default_kinds,
    duration,
    kinds_of,
    one_target,
    search_seconds,
    target_amount,
)
from surgery.cut.kinds import KINDS
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.budget.target import Target
    from surgery.engine.open_model import Model


@dataclass(frozen=True)
class SearchOptions:
    """A target for all cuts, and the kinds that may go for each."""

    target_params: str | None
    target_size: str | None
    search_cuts: tuple[tuple[str, ...], ...]
    search_time: float | None

    @property
    def target(self) -> Target | None:
        """The target that is given. Raises UsageError for two."""
        from surgery.budget.target import PARAMS, SIZE, Target

        stated = one_target({PARAMS: self.target_params, SIZE: self.target_size})
        return None if stated is None else Target(stated[0], target_amount(*stated))

    def cuts(self, model: Model) -> tuple[tuple[str, ...], ...]:
        """The kinds of each search; none without a target."""
        if self.target is None:
            return ()
        return self.search_cuts or (default_kinds(model),)

    @property
    def seconds(self) -> float:
        """What each search may take."""
        return search_seconds(self.search_time)

    def check(self, model: Model, sparsities: tuple[float, ...], searches: bool = False) -> None:
        """Refuse, before any work, what goes only with a target or not with it, and one out of reach."""
        from surgery.engine.distributed import world_size
        from surgery.search.plan_to_target import check_target

        target = self.target
        if world_size() > 1 and (target is not None or searches):
            raise UsageError(
                "a search runs in one process",
                where="--allocations searched" if target is None else target.option,
                next_step="search alone, then compare plans with --sparsity",
            )
        if target is None:
            if self.search_cuts or (self.search_time is not None and not searches):
                raise UsageError(
                    "--cuts is for a target, --search-time for that and for --allocation searched",
                    next_step="give --target-params",
                )
            return
        if sparsities:
            raise UsageError("a target takes the place of --sparsity")
        for kinds in self.cuts(model):
            if "vocab" in kinds:
                raise UsageError(
                    "how many tokens stay is not searched for: KL compares models of the same tokens",
                    where="--cuts",
                    next_step="leave vocab out",
                )
            check_target(model, target, kinds)


def _each(
    _: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
    return tuple(kinds_of(value, parameter) for value in values)


search_options = collected(
    SearchOptions,
    "search",
    [
        click.option(
            "--target-params",
            metavar="NUMBER",
            help="In place of --sparsity: cuts of at most so many parameters, as 1B, searched for.",
        ),
        click.option("--target-size", metavar="BYTES", help="The same in bytes on disk, as 4GB."),
        click.option(
            "--cuts",
            "search_cuts",
            metavar="KINDS",
            multiple=True,
            callback=_each,
            help=f"What may go for a target, of {', '.join(KINDS)}, separated by commas; repeat to compare. "
            f"[default: {','.join(defaults.TARGET_CUTS)}]",
        ),
        click.option(
            "--search-time",
            metavar="TIME",
            callback=duration,
            help="Stop trying mixtures and widths of layers after this time, as 20m, for each search. "
            f"[default: {defaults.SEARCH_SECONDS / 60:.0f}m]",
        ),
    ],
)
