"""plan_experts: which routed experts of a mixture stay, by what they add to the residual stream."""

from __future__ import annotations

from typing import Any

import torch

from surgery.budget.pass_cost import PassJob, StreamShape, pass_cost
from surgery.cut.experts import check_count, check_experts, expert_counts, group_count
from surgery.engine.hooks import expert_outputs
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.errors import PlanError
from surgery.index.channel_index import ChannelIndex
from surgery.model.families import EXPERT
from surgery.model.meta_model import MetaModel
from surgery.plan.kind_plan import EXPERTS, KindPlan
from surgery.progress import Progress, no_progress

EXPERT_SCORES = ("reap", "lp")
ExpertNorms = tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]  # as of `expert_outputs_norms`


def plan_experts(
    model: Model,
    index: ChannelIndex,
    keep: int,
    score: str = "reap",
    *,
    protect: bool = True,
    progress: Progress[Any] = no_progress,
) -> KindPlan:
    """Choose `keep` routed experts for every layer, those with the highest `score`.

    "reap" is the mean of the router's weight times the L2 norm of the expert's output, over the calibration
    tokens that are routed to the expert (Lasby et al. 2025, arXiv 2510.13999); "lp" is the sum of the loss
    proxy of its channels, as the index has it. With `protect`, experts that hold a super weight stay. Where
    the router chooses among groups of experts first, each group keeps as many. Raises PlanError for a number
    that the router can't choose from, UnsupportedModelError for a model without experts that can be cut.
    """
    if score not in EXPERT_SCORES:
        raise PlanError("unknown score of experts", expected=", ".join(EXPERT_SCORES), found=score)
    check_experts(model.meta_model)
    check_count(model.meta_model, {keep})
    norms = expert_outputs_norms(model, index.input_ids.long(), progress)
    return experts_plan(model.meta_model, index, keep, norms, score, protect=protect)


def experts_plan(
    meta_model: MetaModel,
    index: ChannelIndex,
    keep: int,
    norms: ExpertNorms,
    score: str = "reap",
    *,
    protect: bool = True,
) -> KindPlan:
    """The plan of `plan_experts`, from what `expert_outputs_norms` measured."""
    check_count(meta_model, {keep})
    reap, tokens = norms
    groups = group_count(meta_model)
    kept, layers = {}, {}
    for number, count in expert_counts(meta_model).items():
        ffns = index.layers[number].ffns
        lp = torch.stack(
            [ffns[f"{EXPERT}{expert}"].statistics["loss_proxy"].double().sum() for expert in range(count)]
        )
        own = [w.ffn for w in index.super_weights if w.layer == number and w.ffn.startswith(EXPERT)]
        fixed = sorted({int(name.removeprefix(EXPERT)) for name in own}) if protect else []
        by = (reap[number] if score == "reap" else lp).clone()
        by[fixed] = torch.inf
        members = _highest(by, keep, groups, fixed, number)
        kept[number, EXPERTS] = members
        layers[str(number)] = {
            "kept": members.tolist(),
            "protected": fixed,
            "reap": [float(f"{value:.6g}") for value in reap[number].tolist()],
            "lp": [float(f"{value:.6g}") for value in lp.tolist()],
            "lp_kept": _share(lp, members),
            "tokens_kept": _share(tokens[number].double(), members),
        }
    (before,) = set(expert_counts(meta_model).values())
    facts = {"before": before, "after": keep, "score": score, "protect": protect, "layers": layers}
    return KindPlan("experts", kept, facts)


def _highest(score: torch.Tensor, keep: int, groups: int, fixed: list[int], layer: int) -> torch.Tensor:
    """Sorted numbers of the `keep` experts with the highest score, as many from each group."""
    size, each = len(score) // groups, keep // groups
    found = []
    for group in range(groups):
        first = group * size
        if sum(first <= expert < first + size for expert in fixed) > each:
            raise PlanError(
                "more experts hold super weights than would be kept",
                where=f"layer {layer}",
                expected=f"at most {each} in a group of {size}",
                found=", ".join(map(str, fixed)),
                next_step="keep more experts, or give --no-protect",
            )
        order = score[first : first + size].argsort(descending=True, stable=True)
        found.append(order[:each] + first)
    return torch.cat(found).sort().values


def _share(values: torch.Tensor, members: torch.Tensor) -> float:
    total = float(values.sum())
    return float(values[members].sum()) / total if total > 0 else 0.0


def expert_outputs_norms(
    model: Model, ids: torch.Tensor, progress: Progress[Any] = no_progress
) -> ExpertNorms:
    """(Layer -> mean of |router weight| x ||expert output||_2 [E] float64, layer -> routed tokens [E]).

    The mean is over the tokens of `ids` [N, T] that are routed to an expert, 0 for an expert without any. One
    forward pass, with one layer in memory. Raises MemoryBudgetError.
    """
    blocks, block_size = ids.shape
    cost = pass_cost(model.meta_model, PassJob((StreamShape(blocks, block_size),)), model.run)
    streamed, count = StreamedModel(model), len(model.meta_model.layers)
    stream = TokenStream(streamed, ids, micro_batch=cost.blocks_together(block_size), place=cost.hidden_on)
    means, tokens = {}, {}
    for number, layer in progress(streamed.stream_layers(range(count)), "experts", count):
        experts = sum(ffn.stacked for ffn in streamed.ffns(number))
        sums = torch.zeros(experts, dtype=torch.float64)
        routed = torch.zeros(experts, dtype=torch.long)

        def add(
            expert: int,
            output: torch.Tensor,
            sums: torch.Tensor = sums,
            routed: torch.Tensor = routed,
        ) -> None:
            sums[expert] += float(output.float().norm(dim=-1).double().sum())
            routed[expert] += len(output)

        with expert_outputs(streamed.ffns(number), add):
            stream.forward(number, layer)
        if experts:
            means[number], tokens[number] = sums / routed.clamp_min(1), routed
    return means, tokens
