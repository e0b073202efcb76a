"""All errors surgeon raises: what failed, where, what was expected, what was found, and the next step."""

from __future__ import annotations


def one_line(error: BaseException, most: int = 200) -> str:
    """The message of another library's error on one line, at most `most` characters; else its class."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class SurgeonError(Exception):
    """Base class of all errors that surgeon raises deliberately.

    Fields: `what` (one sentence), `where` (file, layer or option), `expected`, `found`, `next_step`; each but
    the first may be empty. `exit_code` is what the command line exits with.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: str = "", expected: str = "", found: str = "", next_step: str = ""
    ) -> None:
        self.what, self.where = what, where
        self.expected, self.found, self.next_step = expected, found, next_step
        super().__init__(what)

    def __str__(self) -> str:
        return self.message

    @property
    def message(self) -> str:
        """One line holding every field that is set."""
        parts = [self.what]
        if self.where:
            parts.append(f"in {self.where}")
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.found:
            parts.append(f"found {self.found}")
        return "; ".join(parts)


class SurgeonWarning(UserWarning):
    """Something that went another way than asked for, and cost nothing else."""


class UsageError(SurgeonError):
    """An invalid option or argument."""

    exit_code = 2


class CheckpointError(SurgeonError):
    """A checkpoint that is missing, damaged, or stored in a form surgeon refuses."""


class UnsupportedModelError(SurgeonError):
    """A model whose architecture surgeon can't index or prune."""


class CalibrationError(SurgeonError):
    """Calibration or evaluation text that can't be read or is too short."""


class IndexMismatchError(SurgeonError):
    """An index folder that is damaged or belongs to another checkpoint."""


class PlanError(SurgeonError):
    """A pruning plan that can't be carried out: a width out of range, a protected channel to be removed."""


class DestinationError(SurgeonError):
    """An output folder that exists, equals the source, or does not fit on the disk."""


class MemoryBudgetError(SurgeonError):
    """A memory budget too small for one layer and one block of tokens."""


class StorageError(SurgeonError):
    """A disk that is full or fails during a run."""


class DistributedError(SurgeonError):
    """A process of a distributed job that failed or can't be reached."""


class ReportError(SurgeonError):
    """Folders that a report can't be made from, or that can't be combined in one report."""


class NumericsError(SurgeonError):
    """NaN or infinity where finite numbers were expected."""


class AutoRoundError(SurgeonError):
    """The library auto-round failed, or what it returned can't be the matrices it was given."""


class HubError(SurgeonError):
    """A request to the Hub that failed: refused by the Hub, or no connection."""
