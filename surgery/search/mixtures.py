"""Which layers, attentions and whole FFNs go beside channels: first mixtures, then neighbours of the best."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from surgery.errors import PlanError
from surgery.plan.kind_plan import SUBLAYER_GROUPS, KindPlan, layers_plan, sublayer_plan
from surgery.plan.prune_plan import PrunePlan
from surgery.plan.search_plan import SearchStep
from surgery.search.single_costs import Item
from surgery.search.sizes import WHOLE, Fitter, Size

TOGETHER = 6  # configurations measured in one pass
COUNTS = {  # tried of one kind at first
    "layers": (1, 2, 4, 8, 16, 32),
    "attention": (2, 4, 8, 12, 20, 36),
    "whole-ffn": (1, 2, 4, 8),
}
NEAR = 3  # items of a kind, from the cheapest that stays and the costliest that goes, tried as neighbours
FIRST_LEVELS = 3  # numbers of heads or experts that go in every layer, tried at first: the lowest that do
BETTER = 0.005  # share by which KL must fall for a configuration to be better: less is noise

Measure = Callable[[list[PrunePlan]], list[float]]
Mixture = frozenset[Item]


@dataclass(frozen=True)
class Levels:
    """A kind of which as many members go in every layer: `steps` are numbers that may go, ascending, and
    `plan(n)` removes n.
    """

    steps: list[int]
    plan: Callable[[int], KindPlan]


@dataclass
class Search:
    """Finds the mixture of cuts that costs the least KL, with FFNs as wide as the target then allows.

    `costs` are what single cuts cost, nats a token; these may go. `layers` is the number of layers, `fixed`
    what goes in any case. `measure` gives the KL of whole configurations, as of Trials. `levels` are the
    kinds that go by a number in every layer; a mixture has one item (kind, number) of such a kind at most.
    """

    fitter: Fitter
    measure: Measure
    costs: dict[Item, float]
    layers: int
    fixed: tuple[KindPlan, ...] = ()
    levels: dict[str, Levels] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = dict.fromkeys(kind for kind, _ in self.costs)
        self.orders = {
            kind: sorted((item for item in self.costs if item[0] == kind), key=lambda item: self.costs[item])
            for kind in kinds
        }
        self.steps: list[SearchStep] = []
        self.plans: dict[Mixture, tuple[PrunePlan, Size] | None] = {}
        self.found: dict[Mixture, float] = {}
        self.best: Mixture = frozenset()

    def plan(self, mixture: Mixture) -> PrunePlan | None:
        """The plan that meets the target without these; None where none does."""
        if mixture not in self.plans:
            self.plans[mixture] = self.fitter.widest((*self.fixed, *self._parts(mixture)))
        widest = self.plans[mixture]
        return None if widest is None else widest[0]

    def size_of(self, mixture: Mixture) -> Size:
        """Size of the FFNs in a mixture that has a plan."""
        widest = self.plans[mixture]
        assert widest is not None
        return widest[1]

    def _parts(self, mixture: Mixture) -> list[KindPlan]:
        layers = _numbers(mixture, "layers")
        parts = [
            levels.plan(number) for kind, levels in self.levels.items() for number in _numbers(mixture, kind)
        ]
        for sublayer in SUBLAYER_GROUPS:
            have = [number for kind, number in self.costs if kind == sublayer]
            gone = _numbers(mixture, sublayer)
            parts += [sublayer_plan(sublayer, have, gone)] if gone else []
        return parts + ([layers_plan(self.layers, layers)] if layers else [])

    def first(self) -> list[Mixture]:
        """No cut but FFN channels, and the cheapest of each kind by themselves, as many as COUNTS says; those
        that can meet the target.

        A mixture with whole FFNs ends the row of its kind: no more need go. Where FFNs stay whole in any
        case, that is the only one of its kind.
        """
        found = [frozenset[Item]()] if self.plan(frozenset()) is not None else []
        for kind, order in self.orders.items():
            for count in COUNTS[kind] if self.fitter.ffn else range(1, len(order)):
                mixture = frozenset(order[:count])
                if count >= len(order) or self.plan(mixture) is None:
                    continue
                found.append(mixture)
                if self.size_of(mixture) == WHOLE:
                    break
        for kind, levels in self.levels.items():
            fewer = (frozenset({(kind, number)}) for number in levels.steps)
            found += itertools.islice((one for one in fewer if self.plan(one) is not None), FIRST_LEVELS)
        return found

    def run(self, seconds: float, steps: int | None = None) -> PrunePlan:
        """Measure the first mixtures, then neighbours of the best, for about so many seconds; or, where a
        finished search is told again, as many `steps` as it took.

        Raises PlanError where nothing meets the target.
        """
        started, first = time.monotonic(), self.first()
        if not first:
            raise self._unreachable()
        if len(first) > 1:
            self._try(first)
        self.best = self._best(first[0])
        took = (time.monotonic() - started) / -(-len(first) // TOGETHER)
        while len(first) > 1 and (
            time.monotonic() - started + took < seconds if steps is None else len(self.steps) < steps
        ):
            unknown = [one for one in self._neighbours() if one not in self.found and self.plan(one)]
            near = list(dict.fromkeys(unknown))[:TOGETHER]
            if not near:
                break
            before = time.monotonic()
            self._try(near)
            took = time.monotonic() - before
            self.best = self._best(first[0])
        plan = self.plan(self.best)
        assert plan is not None
        return plan

    def _try(self, wanted: list[Mixture]) -> None:
        for start in range(0, len(wanted), TOGETHER):
            some = wanted[start : start + TOGETHER]
            plans = [plan for one in some if (plan := self.plan(one)) is not None]
            for mixture, plan, kl in zip(some, plans, self.measure(plans), strict=True):
                least = min(self.found.values(), default=None)
                gain = least - kl if least is not None and kl < least * (1 - BETTER) else None
                self.found[mixture] = kl
                gone = {kind: tuple(_numbers(mixture, kind)) for kind in (*self.orders, *self.levels)}
                self.steps.append(SearchStep(gone, plan.width_after, kl, gain))

    def _best(self, first: Mixture) -> Mixture:
        """The first of the configurations that no later one is clearly better than."""
        best = first
        for mixture, kl in self.found.items():
            if kl < self.found.get(best, float("inf")) * (1 - BETTER):
                best = mixture
        return best

    def _neighbours(self) -> Iterator[Mixture]:
        """The best mixture with an item more, one less, two more, or one for another of its kind; the most
        promising by single costs first.
        """
        orders = self.orders.items()
        stay = {kind: [item for item in order if self._may_go(item)] for kind, order in orders}
        go = {kind: [item for item in reversed(order) if item in self.best] for kind, order in orders}
        for place in range(NEAR):
            for kind in self.orders:
                for more in stay[kind][place : place + 1]:
                    yield self._with(more)
                for less in go[kind][place : place + 1]:
                    yield self.best - {less}
        yield from self._other_levels()
        for kind in self.orders:
            if len(stay[kind]) > 1:
                yield self._with(*stay[kind][:2])
            for less in go[kind][:NEAR]:
                for more in stay[kind][:NEAR]:
                    yield self._with(more) - {less}
        for kind in self.orders:
            for more in stay[kind][NEAR:]:
                yield self._with(more)

    def _other_levels(self) -> Iterator[Mixture]:
        """The best mixture with a kind that goes by number a step more, and a step less."""
        for kind, levels in self.levels.items():
            steps = [0, *levels.steps]
            (now,) = _numbers(self.best, kind) or [0]
            rest = self.best - {(kind, now)}
            for place in (steps.index(now) + 1, steps.index(now) - 1):
                if 0 <= place < len(steps):
                    yield rest | ({(kind, steps[place])} if steps[place] else set())

    def _may_go(self, item: Item) -> bool:
        """Whether an item can join the best mixture: something of the layer stays, unless all of it goes."""
        kind, number = item
        others = {"layers"} if kind == "layers" else {"layers", *SUBLAYER_GROUPS}
        return not any((other, number) in self.best for other in others)

    def _with(self, *items: Item) -> Mixture:
        """The best mixture and `items`; an attention or an FFN goes with its layer."""
        gone = {(sublayer, n) for kind, n in items if kind == "layers" for sublayer in SUBLAYER_GROUPS}
        return (self.best - gone) | frozenset(items)

    def _unreachable(self) -> PlanError:
        target = self.fitter.target
        return PlanError(
            "no cut of these kinds meets the target",
            where=target.option,
            expected=target.text(target.amount),
            next_step="allow more kinds with --cuts, or a larger target",
        )


def _numbers(mixture: Mixture, kind: str) -> list[int]:
    """Layers that items of one kind are in."""
    return sorted(number for name, number in mixture if name == kind)
