"""What searches found, step by step: for the best mixture of cuts, and for widths of layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from surgery.budget.target import Target


@dataclass(frozen=True)
class SearchStep:
    """One configuration that was tried.

    removed: numbers of the layers that go, or whose attention or FFN goes, by kind; for "kv" and "experts"
    how many go in every layer. width: that of the FFNs that stay (the widest layer's). kl: KL(dense || cut
    and repaired), nats a token, on held-out calibration blocks. gain: how much less than the least before,
    nats a token; None where it is not less.
    """

    removed: dict[str, tuple[int, ...]]
    width: int
    kl: float
    gain: float | None

    def as_json(self) -> dict[str, Any]:
        """Its entry in `search.steps`."""
        removed = {kind: list(numbers) for kind, numbers in self.removed.items()}
        return {"removed": removed, "width": self.width, "kl": self.kl, "gain": self.gain}


@dataclass(frozen=True)
class SearchPlan:
    """A search: its target, what single cuts cost by themselves, and the configurations tried, in order.

    predicted: what the result will have of the target's unit. kinds: what may go. costs: KL without each
    layer or attention and without repair, nats a token, by kind and number. tokens: held-out calibration
    tokens that KL is measured on. size: of the FFNs that stay, as arguments of `make_plan`.
    """

    target: Target
    predicted: int
    kinds: tuple[str, ...]
    costs: dict[str, dict[int, float]]
    tokens: int
    steps: tuple[SearchStep, ...]
    size: dict[str, float | int]

    def as_json(self) -> dict[str, Any]:
        """The entry `plan.search` of surgeon.json."""
        how = {"context": self.target.context, "packed": self.target.packed}
        stated: dict[str, Any] = {name: value for name, value in how.items() if value}
        if self.target.speed is not None:
            stated["speed"] = asdict(self.target.speed)
        return {
            "target": {"unit": self.target.unit, "amount": self.target.amount, **stated},
            "predicted": self.predicted,
            "kinds": list(self.kinds),
            "costs": {kind: {str(key): kl for key, kl in one.items()} for kind, one in self.costs.items()},
            "tokens": self.tokens,
            "size": self.size,
            "steps": [step.as_json() for step in self.steps],
        }


@dataclass(frozen=True)
class WidthStep:
    """Widths of all layers that were tried together.

    name: "single costs", "one width", or "round 1" and so on. kl: KL(dense || cut and refitted), nats a
    token, on held-out calibration blocks. kept: whether they were better than the best before.
    """

    name: str
    kl: float
    kept: bool


@dataclass(frozen=True)
class WidthSearch:
    """A search for widths of layers: the best, 0 for a layer without an FFN, and what was tried, in order.

    tokens: held-out calibration tokens that KL is measured on.
    """

    widths: tuple[int, ...]
    tokens: int
    steps: tuple[WidthStep, ...]

    def as_json(self) -> dict[str, Any]:
        """The entry `plan.width_search` of surgeon.json."""
        return {"tokens": self.tokens, "steps": [asdict(step) for step in self.steps]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> WidthSearch:
        """The search whose entry is `fields`, with its `widths` among them."""
        steps = tuple(WidthStep(**step) for step in fields["steps"])
        return cls(tuple(fields["widths"]), fields["tokens"], steps)
