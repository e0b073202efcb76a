"""The cut that carries out a whole plan: FFN channels first, then what else goes."""

from __future__ import annotations

from surgery.cut.ffn_channels import ffn_cut
from surgery.cut.groups import Cut
from surgery.cut.kinds import KINDS
from surgery.model.meta_model import MetaModel
from surgery.plan.prune_plan import PrunePlan

LAST = ("layers", "experts")  # in this order: they change numbers in the names of tensors


def model_cut(meta_model: MetaModel, plan: PrunePlan, *, widths_only: bool = False) -> Cut:
    """The cut of all kinds that a plan has.

    With `widths_only` no weight is read, as of `ffn_cut`. Raises PlanError for a plan of another model,
    UnsupportedModelError for a result that the model's config can't say.
    """
    cut = ffn_cut(meta_model, plan, widths_only=widths_only)
    for part in sorted(plan.cuts, key=lambda one: LAST.index(one.kind) if one.kind in LAST else -1):
        cut = KINDS.find(part.kind).add(meta_model, cut, part)
    return cut
