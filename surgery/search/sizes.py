"""The widest FFNs that meet a target beside what else goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from surgery.budget.target import Target
from surgery.cut.groups import Cut
from surgery.cut.model_cut import model_cut
from surgery.cut.tensors import edited_specs
from surgery.engine.open_model import Model
from surgery.errors import PlanError
from surgery.plan.kind_plan import KindPlan
from surgery.plan.prune_plan import PrunePlan
from surgery.plan.widths import default_multiple
from surgery.quantize.packed_size import packed_specs

MEAN_STEPS = 8  # steps of the mean width within a multiple
STEPS = 64  # shares of the channels that are tried where a model has several widths

Size = dict[str, float | int]  # one of sparsity and width, as of make_plan
WHOLE: Size = {"sparsity": 0.0}
Build = Callable[[tuple[KindPlan, ...], Size], PrunePlan]


def amount_of(model: Model, cut: Cut, target: Target) -> int:
    """What the result of a cut has of the target's unit."""
    packed = target.packed
    specs = packed_specs(model.meta_model, cut) if packed else edited_specs(model.checkpoint, cut.edits)
    return target.measure(specs, cut.config, model.name)


@dataclass(frozen=True)
class Fitter:
    """Makes plans that meet `target`.

    `build(parts, size)` makes the plan that removes `parts` and has the FFNs' `size`, arguments of
    `make_plan`. With `ffn` false FFNs keep all channels. `multiple_of` is what widths are multiples of; with
    `per_layer` the mean width need not be.
    """

    model: Model
    target: Target
    build: Build
    ffn: bool = True
    multiple_of: int | None = None
    per_layer: bool = False

    def amount(self, plan: PrunePlan) -> int:
        """What the result of a plan has of the target's unit."""
        return amount_of(self.model, model_cut(self.model.meta_model, plan, widths_only=True), self.target)

    def sizes(self) -> list[Size]:
        """Sizes of FFNs that may be asked for, the smallest first, whole FFNs last."""
        if not self.ffn:
            return [WHOLE]
        widths = self.model.meta_model.widths()
        if len(widths) > 1:
            return [{"sparsity": 1 - step / STEPS} for step in range(1, STEPS + 1)]
        (before,) = widths.values()
        multiple = self.multiple_of or default_multiple(before)
        step = max(1, multiple // MEAN_STEPS) if self.per_layer else multiple
        narrower: list[Size] = [{"width": width} for width in range(multiple, before, step)]
        return [*narrower, WHOLE]

    def widest(self, parts: tuple[KindPlan, ...]) -> tuple[PrunePlan, Size] | None:
        """The plan with the widest FFNs that meets the target without `parts`, and their size; None where
        none does.
        """
        sizes = self.sizes()
        best: tuple[PrunePlan, Size] | None = None
        low, high = 0, len(sizes) - 1
        while low <= high:
            middle = (low + high) // 2
            plan = self._plan(parts, sizes[middle])
            if plan is None:  # narrower than what is protected
                low = middle + 1
            elif self.amount(plan) <= self.target.amount:
                best, low = (plan, sizes[middle]), middle + 1
            else:
                high = middle - 1
        return best

    def _plan(self, parts: tuple[KindPlan, ...], size: Size) -> PrunePlan | None:
        try:
            return self.build(parts, size)
        except PlanError:
            return None
