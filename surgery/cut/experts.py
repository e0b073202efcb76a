"""Routed experts of a mixture: those that stay get new numbers, and the router gets narrower."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from surgery.checkpoint.transformers_model import build_config, text_config
from surgery.cut.config_width import set_width
from surgery.cut.groups import Cut, Group, Kept
from surgery.cut.planned_model import check_planned
from surgery.cut.tensors import Take, TensorEdit, joined_edits
from surgery.errors import PlanError, UnsupportedModelError
from surgery.model.meta_model import LayerEdit, MetaModel, StoredParameter
from surgery.model.routers import mask_experts, router_tensors
from surgery.plan.kind_plan import EXPERTS, KindPlan

# Config keys: how many experts, groups of them, experts a token goes to, and groups it chooses first.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
GROUPS = ("n_group", "num_expert_group", "num_expert_groups")
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk")
CHOSEN_GROUPS = ("topk_group", "num_limited_groups")


@dataclass(frozen=True)
class RoutedExperts:
    """The routed experts of every layer, a group of E members each."""

    where: str

    def groups(self, meta_model: MetaModel) -> list[Group]:
        """One group for each layer with routed experts; what they compute leaves with their routing."""
        counts = expert_counts(meta_model)
        return [Group(number, EXPERTS, count, (), ()) for number, count in counts.items()]

    def edits(self, meta_model: MetaModel, kept: Kept) -> dict[str, TensorEdit]:
        """Experts stored one by one: dropped, or written under the place of each. Stacked ones and routers:
        the members that stay.
        """
        edits: dict[str, TensorEdit] = {}
        for number, layer in enumerate(meta_model.layers):
            if (number, EXPERTS) not in kept:
                continue
            members, ffns = kept[number, EXPERTS], meta_model.ffns[number]
            count = sum(ffn.stacked for ffn in ffns)
            axes = {one.path: one.axis for one in router_tensors(layer, ffns)}
            stacks = {ffn.site.down.rpartition(".")[0] for ffn in ffns if ffn.stacked}
            prefix = f"{meta_model.layers_path}.{number}."
            for stored in meta_model.layer_parameters[number]:
                path = stored.targets[0].removeprefix(prefix)
                if path.rpartition(".")[0] in stacks:
                    edits |= _expert_edits(meta_model, stored, count, members)
                elif path in axes:
                    edits |= _router_edits(meta_model, stored, axes[path], count, members)
        return edits

    def config(self, config: dict[str, Any], kept: Kept) -> dict[str, Any]:
        """config.json with the new number of experts."""
        (after,) = {len(members) for (_, name), members in kept.items() if name == EXPERTS}
        config = copy.deepcopy(config)
        keys = count_keys(config)
        for key, before in keys.items():
            set_width(config, key, before, after)
        return config


def onto(meta_model: MetaModel, cut: Cut, part: KindPlan) -> Cut:
    """`cut` without the experts that `part` removes. Raises PlanError for a number that can't be.

    An expert is written under the name that `cut` gives to the tensor in its new place, in a layer that may
    have a new number.
    """
    check_count(meta_model, {len(members) for members in part.kept.values()})
    kind = RoutedExperts(meta_model.checkpoint.name)
    edits = {
        name: replace(edit, name=cut.edits.get(edit.name, edit).name if edit.name else None)
        for name, edit in kind.edits(meta_model, part.kept).items()
    }
    return replace(
        cut,
        groups=(*cut.groups, *kind.groups(meta_model)),
        kept=cut.kept | part.kept,
        edits=joined_edits(cut.edits, edits),
        config=kind.config(cut.config, part.kept),
        reroute=rerouted(meta_model, part.kept),
    )


def rerouted(meta_model: MetaModel, kept: Kept) -> LayerEdit:
    """A layer edit after which no token is routed to a removed expert."""

    def edit(number: int, layer: nn.Module) -> None:
        members = kept.get((number, EXPERTS))
        if members is None:
            return
        ffns = meta_model.ffns[number]
        removed = torch.ones(sum(ffn.stacked for ffn in ffns), dtype=torch.bool)
        removed[members] = False
        mask_experts(layer, router_tensors(layer, ffns), removed.nonzero()[:, 0])

    return edit


def expert_counts(meta_model: MetaModel) -> dict[int, int]:
    """Layer -> number of its routed experts, of the layers that have any."""
    counts = {number: sum(ffn.stacked for ffn in ffns) for number, ffns in enumerate(meta_model.ffns)}
    return {number: count for number, count in counts.items() if count}


def count_keys(config: dict[str, Any]) -> dict[str, int]:
    """The config keys that hold the number of routed experts, with it; several where a config repeats it."""
    text = text_config(config)
    stated = {key: text[key] for key in COUNTS if isinstance(text.get(key), int) and text[key] > 1}
    if stated:
        return stated
    built = build_config(config, "config.json").get_text_config()
    found = {key: getattr(built, key, None) for key in COUNTS}
    return {key: value for key, value in found.items() if isinstance(value, int) and value > 1}


def group_count(meta_model: MetaModel) -> int:
    """Groups of experts that a token chooses among first; 1 where there are none."""
    return max(1, _number(meta_model, GROUPS))


def check_count(meta_model: MetaModel, counts: set[int]) -> None:
    """Raise PlanError for a number of experts that the router can't choose from.

    It has to be the same in every layer, hold the experts that a token goes to, and be divided by the groups
    that a token chooses first, with two experts in each at least.
    """
    groups, chosen = group_count(meta_model), _number(meta_model, CHOSEN)
    limited = _number(meta_model, CHOSEN_GROUPS) if groups > 1 else 0
    least = max(chosen, 1)
    if groups > 1:
        least = max(least, 2 * groups, -(-chosen * groups // max(1, limited)))
    before = set(expert_counts(meta_model).values())
    if len(counts) == 1 and len(before) == 1:
        (count,) = counts
        if least <= count <= max(before) and count % groups == 0:
            return
    raise PlanError(
        "the experts can't be cut to this number",
        where="--keep-experts",
        expected=f"{least} to {max(before, default=0)}"
        + (f", in multiples of the router's {groups} groups" if groups > 1 else ""),
        found=", ".join(map(str, sorted(counts))),
    )


def check_experts(meta_model: MetaModel) -> None:
    """Raise UnsupportedModelError, from headers and config, for a model whose experts can't be cut."""
    counts = expert_counts(meta_model)
    if not counts or len(set(counts.values())) > 1 or not count_keys(meta_model.checkpoint.config):
        raise UnsupportedModelError(
            "this model has no routed experts that can be cut",
            where=meta_model.checkpoint.name,
            expected="layers with the same number of routed experts, which the config names",
            found=", ".join(map(str, sorted(set(counts.values())))) or "no routed experts",
            next_step="leave the experts whole",
        )
    step = group_count(meta_model)
    (count,) = set(counts.values())
    if count > step:
        kept = {(number, EXPERTS): torch.arange(count - step) for number in counts}
        base = Cut((), {}, {}, meta_model.checkpoint.config)
        kind = RoutedExperts(meta_model.checkpoint.name)
        check_planned(
            meta_model,
            replace(base, edits=kind.edits(meta_model, kept), config=kind.config(base.config, kept)),
        )


def _number(meta_model: MetaModel, keys: Sequence[str]) -> int:
    text = meta_model.config.get_text_config()
    found = [value for key in keys if isinstance(value := getattr(text, key, None), int)]
    return max(found, default=0)


def _expert_edits(
    meta_model: MetaModel, stored: StoredParameter, count: int, members: torch.Tensor
) -> dict[str, TensorEdit]:
    """Edits of the stored tensors behind one parameter that stacks all experts."""
    if "MergeModulelist" not in stored.steps:
        for name in stored.stored:
            _check_first(meta_model, name, count)
        return {name: TensorEdit(name, (Take(0, members),)) for name in stored.stored}
    edits: dict[str, TensorEdit] = {}
    for pattern in dict.fromkeys(pattern for _, pattern in stored.sources):
        names = [name for name, own in stored.sources if own == pattern]
        places = {old: place for place, old in enumerate(members.tolist())}
        for number, name in enumerate(names):
            edits[name] = TensorEdit(names[places[number]] if number in places else None)
    return edits


def _router_edits(
    meta_model: MetaModel, stored: StoredParameter, axis: int, count: int, members: torch.Tensor
) -> dict[str, TensorEdit]:
    edits = {}
    for name in stored.stored:
        shape = meta_model.checkpoint.tensors[name].shape
        if stored.converter is not None or len(shape) <= axis or shape[axis] != count:
            raise _unknown_layout(name, shape)
        edits[name] = TensorEdit(name, (Take(axis, members),))
    return edits


def _check_first(meta_model: MetaModel, name: str, count: int) -> None:
    shape = meta_model.checkpoint.tensors[name].shape
    if shape[0] != count:
        raise _unknown_layout(name, shape)


def _unknown_layout(name: str, shape: tuple[int, ...]) -> UnsupportedModelError:
    return UnsupportedModelError(
        "these experts are stored in a layout surgeon can't cut",
        where=name,
        found=str(list(shape)),
        next_step="leave the experts whole",
    )
