"""`surgeon prune --push`: where the result goes, and its push."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.cli.common import say
from surgery.cli.options import PushOptions

if TYPE_CHECKING:
    from surgery.checkpoint.push import PushTarget
    from surgery.plan.prune_plan import PrunePlan


def push_target(
    push_to: str | None, destination: Path, options: PushOptions, overwrite: bool
) -> PushTarget | None:
    """Where --push goes; without a name, the account's repo named as the folder."""
    if push_to is None:
        return None
    from surgery.checkpoint.push import account_name

    repo = f"{account_name()}/{destination.name}" if push_to == "auto" else push_to
    return options.target(repo, overwrite)


def publish(destination: Path, target: PushTarget | None, plan: PrunePlan, quiet: bool) -> None:
    """Push the folder, where that was asked for."""
    if target is not None:
        from surgery.checkpoint.push import push_folder

        report = push_folder(destination, target, f"surgeon {plan.method}, FFN width {plan.width_after}")
        say(f"Published: {report.url}", quiet)
        if report.collection is not None:
            say(f"In the collection {report.collection}", quiet)
