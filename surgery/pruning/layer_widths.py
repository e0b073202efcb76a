"""search_widths: better widths per layer for the same number of channels, by measuring whole configurations.

Every round measures, in one pass, the KL of the present widths, and of every layer a step narrower and a
step wider (`measure_width_costs`). Then channels move from the layers where a step costs the least to those
where it gains the most, several pairs at once. A round that did not help is taken back; the next moves
half as many.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from surgery.budget.model_size import ModelSize
from surgery.budget.sensitivity_cost import sensitivity_cost
from surgery.cut.model_cut import model_cut
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.index.channel_index import ChannelIndex
from surgery.plan.kind_plan import removed_ffns, removed_layers
from surgery.plan.prune_plan import PrunePlan, channel_orders
from surgery.progress import Progress, no_progress
from surgery.repair.width_costs import WidthCosts, measure_width_costs

ROUNDS = 12  # at most
PAIRS = 8  # of layers that a step moves between, at first
STEPS = 12  # of an FFN's width
BETTER = 0.002  # share by which KL must fall: less is noise


def search_widths(
    model: Model,
    index: ChannelIndex,
    plan: PrunePlan,
    progress: Progress[Any] = no_progress,
    say: Callable[[str], None] = lambda _: None,
) -> list[int]:
    """Widths of all layers, as many channels in sum as `plan` keeps; 0 for a layer without an FFN.

    The search starts from the widths of `plan`, or from one width for all where that costs less, and leaves
    what else the plan removes as it is. KL is measured on the calibration blocks that sensitivity is measured
    on. The same arguments give the same widths.
    """
    orders = channel_orders(index, plan.method, plan.seed, plan.protect)
    blocks, block_size = index.input_ids.shape
    size = ModelSize.of(model.meta_model, model.run.dtype, block_size)
    cost = sensitivity_cost(size, blocks, block_size, model.run)
    streamed, cut = StreamedModel(model), model_cut(model.meta_model, plan, widths_only=True)
    step = max(1, round(plan.width_before / STEPS / plan.multiple_of)) * plan.multiple_of
    bare = removed_layers(plan.cuts) | removed_ffns(plan.cuts)
    whole = [len(order) for order in orders]
    least = [max(1, len(next(iter(layer.ffns.values())).protected)) for layer in plan.layers]

    def moves(widths: list[int]) -> list[list[int]]:
        """Widths a step away that each layer may have."""
        found = []
        for number, width in enumerate(widths):
            near = (width - step, width + step) if number not in bare else ()
            found.append([one for one in near if least[number] <= one <= whole[number]])
        return found

    def measured(widths: list[int], others: list[list[int]]) -> WidthCosts:
        ids = index.input_ids.long()
        return measure_width_costs(streamed, ids, orders, widths, others, cut, cost, progress)

    say("Searching for better widths of layers")
    best = [len(layer.kept) for layer in plan.layers]
    costs = measured(best, moves(best))
    say(f"Widths by single costs: KL {costs.kl:.4f} nats a token")
    alike = uniform(best, bare, least)
    if alike is not None and alike != best:
        found = measured(alike, moves(alike))
        say(f"One width: KL {found.kl:.4f}")
        best, costs = (alike, found) if found.kl < costs.kl else (best, costs)
    pairs = PAIRS
    for turn in range(1, ROUNDS + 1):
        widths = moved(best, costs, step, pairs)
        if widths == best:
            break
        last = turn == ROUNDS
        found = measured(widths, [[] for _ in widths] if last else moves(widths))
        if found.kl < costs.kl * (1 - BETTER):
            best, costs = widths, found
            say(f"Widths of round {turn}: KL {costs.kl:.4f}")
        else:
            pairs //= 2
    return best


def uniform(widths: list[int], bare: Collection[int], least: list[int]) -> list[int] | None:
    """One width for all layers but those `bare` of an FFN, the same in sum; None where there is none."""
    staying = [number for number in range(len(widths)) if number not in bare]
    width, rest = divmod(sum(widths), len(staying))
    if rest or any(least[number] > width for number in staying):
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
