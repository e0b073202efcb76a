"""search_widths: better widths per layer for the same number of channels, by measuring whole configurations.

Every round measures, in one pass, the KL of the present widths, and with layers a step narrower and a step
wider (`measure_width_costs`). Then channels move from the layers where a step costs the least to those where
it gains the most, several pairs at once. A round that did not help is taken back; the next moves half as
many. The first round tries both steps of every layer; later ones those that promised most when they were
last tried, and the others in turn.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Collection
from typing import Any

from surgery import defaults
from surgery.budget.model_size import ModelSize
from surgery.budget.sensitivity_cost import width_search_cost
from surgery.cut.model_cut import model_cut
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal, noted_once
from surgery.engine.streamed_model import StreamedModel
from surgery.index.channel_index import ChannelIndex
from surgery.plan.prune_plan import PrunePlan
from surgery.plan.ranking import channel_orders
from surgery.plan.search_plan import WidthSearch, WidthStep
from surgery.progress import Progress, no_progress
from surgery.repair.methods import REPAIRS
from surgery.repair.sensitivity import split_blocks
from surgery.repair.width_costs import WidthCosts, measure_width_costs

ROUNDS = 32  # at most
PAIRS = 8  # of layers that a step moves between, at first
PROMISING = 12  # steps of each direction that are tried in every round
TURNS = 3  # rounds in which each of the other steps is tried once
STEPS = 12  # of an FFN's width
BETTER = 0.002  # share by which KL must fall in a round: less is noise


def search_widths(
    model: Model,
    index: ChannelIndex,
    plan: PrunePlan,
    *,
    seconds: float = defaults.SEARCH_SECONDS,
    journal: Journal | None = None,
    progress: Progress[Any] = no_progress,
    say: Callable[[str], None] = lambda _: None,
) -> WidthSearch:
    """Widths of all layers, as many channels in sum as `plan` keeps; 0 for a layer without an FFN.

    The search starts from the widths of `plan`, or from one width for all where that costs less, and leaves
    what else the plan removes as it is. KL is measured on the calibration blocks that sensitivity is measured
    on. No round begins when `seconds` have passed. What was measured stays in `journal`, so that an
    interrupted search goes on, and a finished one is told again.
    """

    def search() -> dict[str, Any]:
        found = _Widths(model, index, plan, journal, progress, say).search(seconds)
        return {"widths": found.widths, **found.as_json()}

    return WidthSearch.from_json(noted_once(journal, "widths", search))


class _Widths:
    """One search: what the measurements have in common."""

    def __init__(
        self,
        model: Model,
        index: ChannelIndex,
        plan: PrunePlan,
        journal: Journal | None,
        progress: Progress[Any],
        say: Callable[[str], None],
    ) -> None:
        self.orders = channel_orders(index, plan.method, plan.seed, plan.protect)
        self.ids = index.input_ids.long()
        blocks, block_size = self.ids.shape
        size = ModelSize.of(model.meta_model, model.run.dtype, block_size)
        self.cost = width_search_cost(size, blocks, block_size, model.run)
        self.streamed, self.cut = StreamedModel(model), model_cut(model.meta_model, plan, widths_only=True)
        self.method = REPAIRS.find(plan.repair)
        self.first = [len(layer.kept) for layer in plan.layers]
        self.multiple = plan.multiple_of
        self.step = max(1, round(plan.width_before / STEPS / self.multiple)) * self.multiple
        self.bare = {number for number, width in enumerate(self.first) if not width}
        self.least = [max(1, len(next(iter(layer.ffns.values())).protected)) for layer in plan.layers]
        self.journal, self.progress, self.say = journal, progress, say
        self.steps: list[WidthStep] = []
        self.gains: dict[tuple[int, int], float] = {}  # by (layer, step), when it was last tried

    def search(self, seconds: float) -> WidthSearch:
        """The best widths found in so much time."""
        started = time.monotonic()
        self.say("Searching for better widths of layers")
        best = self.first
        costs = self._measured("single costs", best, None)
        alike = uniform(best, self.bare, self.least, self.multiple)
        if alike is not None and alike != best:
            gains, self.gains = self.gains, {}  # those of other widths say little
            found = self._measured("one width", alike, costs)
            if self.steps[-1].kept:
                best, costs = alike, found
            else:
                self.gains = gains
        pairs, tried = PAIRS, [self.first, best]
        for turn in range(1, ROUNDS + 1):
            widths = moved(best, costs, self.step, pairs)
            while pairs and widths in tried:
                pairs //= 2
                widths = moved(best, costs, self.step, pairs)
            tried.append(widths)
            if widths == best or time.monotonic() - started >= seconds:
                break
            found = self._measured(f"round {turn}", widths, costs, last=turn == ROUNDS)
            if self.steps[-1].kept:
                best, costs = widths, found
            else:
                pairs //= 2
        tokens = split_blocks(self.ids)[1].numel()
        return WidthSearch(tuple(best), tokens, tuple(self.steps))

    def _measured(
        self, name: str, widths: list[int], before: WidthCosts | None, last: bool = False
    ) -> WidthCosts:
        """Costs of `widths`, and of a step away for each layer but in the `last` round; noted and said."""
        others = [[] for _ in widths] if last else self._moves(widths)

        def measure() -> dict[str, Any]:
            found = measure_width_costs(
                self.streamed,
                self.ids,
                self.orders,
                widths,
                others,
                self.cut,
                self.method,
                self.cost,
                self.progress,
            )
            return {"kl": found.kl, "others": [list(one.items()) for one in found.others]}

        digest = hashlib.sha256(json.dumps([widths, others]).encode()).hexdigest()[:16]
        told = noted_once(self.journal, f"widths-{digest}", measure)
        kl, costs = told["kl"], WidthCosts(told["kl"], [dict(one) for one in told["others"]])
        for number, (width, found) in enumerate(zip(widths, costs.others, strict=True)):
            self.gains |= {(number, other - width): kl - one for other, one in found.items()}
        kept = before is None or kl < before.kl * (1 - BETTER)
        self.steps.append(WidthStep(name, kl, kept))
        self.say(f"Widths, {name}: KL {kl:.4f} nats a token{'' if kept else ', no better'}")
        return costs

    def _moves(self, widths: list[int]) -> list[list[int]]:
        """Widths a step away that each layer is tried at in this round."""
        found: list[list[int]] = [[] for _ in widths]
        for step in (-self.step, self.step):
            gains = {
                number: self.gains.get((number, step), math.inf)
                for number, width in enumerate(widths)
                if number not in self.bare and self.least[number] <= width + step <= len(self.orders[number])
            }
            for number in to_try(gains, turn=len(self.steps)):
                found[number].append(widths[number] + step)
        return found


def to_try(gains: dict[int, float], turn: int) -> list[int]:
    """Layers, of those that can take a step, that are tried with it in round `turn`.

    `gains` are what the step gained when it was last tried, infinite where it was not yet.
    """
    promising = sorted(gains, key=lambda number: -gains[number])[:PROMISING]
    return [
        number
        for number, gain in gains.items()
        if gain == math.inf or number in promising or number % TURNS == turn % TURNS
    ]


def uniform(widths: list[int], bare: Collection[int], least: list[int], multiple: int) -> list[int] | None:
    """One width for all layers but those `bare` of an FFN, the same in sum; None where there is none that is
    such a multiple.
    """
    staying = [number for number in range(len(widths)) if number not in bare]
    width, rest = divmod(sum(widths), len(staying))
    if rest or width % multiple or any(least[number] > width for number in staying):
        return None
    return [0 if number in bare else width for number in range(len(widths))]


def moved(widths: list[int], costs: WidthCosts, step: int, pairs: int) -> list[int]:
    """`widths` with `step` channels moved between up to `pairs` pairs of layers, where single moves gain.

    They move from the layers where they cost the least to those where they gain the most.
    """
    gains, losses = dict[int, float](), dict[int, float]()
    for number, (width, others) in enumerate(zip(widths, costs.others, strict=True)):
        if width + step in others:
            gains[number] = costs.kl - others[width + step]
        if width - step in others:
            losses[number] = others[width - step] - costs.kl
    found, used = list(widths), set[int]()
    for wider in sorted(gains, key=lambda i: -gains[i]):
        free = [i for i in losses if i not in used and i != wider]
        if wider in used or not free or len(used) >= 2 * pairs:
            continue
        narrower = min(free, key=lambda i: losses[i])
        if gains[wider] <= losses[narrower]:
            continue
        found[wider] += step
        found[narrower] -= step
        used |= {wider, narrower}
    return found
