"""The search over mixtures, against every mixture there is."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from surgery.budget.target import PARAMS, Target
from surgery.errors import PlanError
from surgery.plan.kind_plan import KindPlan, removed_attention, removed_layers
from surgery.search.mixtures import Levels, Search

LAYERS, TARGET = 5, 60
LAYER, ATTENTION, HEAD = 10, 3, 4  # parameters that go with each
COSTS = {("layers", n): 0.1 * (n + 1) for n in range(LAYERS)}
COSTS |= {("attention", n): 0.04 + 0.03 * abs(n - 2) for n in range(LAYERS)}


class Fitter:
    """A model of 100 parameters, 10 of an FFN in each layer."""

    target = Target(PARAMS, TARGET)
    ffn = True

    def widest(self, parts: tuple[KindPlan, ...]) -> tuple[Any, dict[str, float | int]] | None:
        layers, attention = removed_layers(parts), removed_attention(parts)
        heads = sum(part.facts["heads"] for part in parts if part.kind == "kv")
        left = 100 - LAYER * len(layers) - ATTENTION * len(attention - layers) - HEAD * heads
        stay = LAYERS - len(layers)
        width = min(10, 10 - -(-(left - TARGET) // stay)) if stay else 0
        if width < 1:
            return None
        plan = SimpleNamespace(
            width_before=10, width_after=width, layers=layers, attention=attention, heads=heads
        )
        return plan, {"width": width} if width < 10 else {"sparsity": 0.0}


def kl(plan: Any) -> float:
    """Costs that don't add up: channels cost more and more, and layers beside each other cost double."""
    layers, attention = sorted(plan.layers), sorted(plan.attention)
    beside = sum(b - a == 1 for a, b in itertools.pairwise(layers))
    single = sum(COSTS["layers", n] for n in layers) + sum(COSTS["attention", n] for n in attention)
    return single + 0.2 * beside + 0.02 * (10 - plan.width_after) ** 2 + 0.5 * plan.heads


def search() -> Search:
    return Search(Fitter(), lambda plans: [kl(plan) for plan in plans], COSTS, LAYERS)  # type: ignore[arg-type]


def everything() -> float:
    """The least KL of all mixtures."""
    items = list(COSTS)
    found = search()
    mixtures = (frozenset(c) for n in range(len(items)) for c in itertools.combinations(items, n))
    plans = [
        found.plan(one) for one in mixtures if not any(("layers", n) in one for k, n in one if k != "layers")
    ]
    return min(kl(plan) for plan in plans if plan is not None)


def test_the_search_finds_the_best_of_all_mixtures() -> None:
    found = search()
    plan = found.run(60)
    assert kl(plan) == pytest.approx(everything())
    gains = [step.gain for step in found.steps if step.gain is not None]
    first = found.steps[0].kl
    assert gains and first - sum(gains) == pytest.approx(kl(plan), rel=0.01)


def test_without_time_the_first_mixtures_are_tried_all_the_same() -> None:
    found = search()
    found.run(0)
    removed = [tuple(map(len, step.removed.values())) for step in found.steps]
    assert (1, 0) in removed and (0, 2) in removed and len(removed) < 10
    assert min(step.kl for step in found.steps) == kl(found.plan(found.best))


def test_a_finished_search_is_told_again_step_by_step() -> None:
    first, again = search(), search()
    first.run(60)
    again.run(0, len(first.steps))
    assert again.steps == first.steps and again.best == first.best


def test_fewer_heads_are_one_of_the_mixtures() -> None:
    found = search()
    found.levels["kv"] = Levels([1, 2, 3], lambda fewer: KindPlan("kv", {}, {"heads": fewer}))
    found.run(60)
    tried = {step.removed["kv"] for step in found.steps}
    assert {(), (1,), (2,)} <= tried and found.best == search_best()


def search_best() -> Any:
    found = search()
    found.run(60)
    return found.best


def test_a_target_out_of_reach_is_refused() -> None:
    found = search()
    found.fitter.widest = lambda _: None  # type: ignore[method-assign]
    with pytest.raises(PlanError, match="no cut of these kinds"):
        found.run(0)
