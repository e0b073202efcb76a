"""From slices of parameters in memory to edits of the tensors on disk that these parameters are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from surgery.cut.groups import Cut, Group, GroupKey, Kept
from surgery.cut.tensors import Take, TensorEdit
from surgery.errors import PlanError, UnsupportedModelError
from surgery.model.meta_model import LayerEdit, MetaModel, StoredParameter
from surgery.model.slices import Slice
from surgery.plan.kind_plan import KV_HEADS, SUBLAYER_GROUPS

CUTTABLE_STEPS = {
    "MergeModulelist",
    "Concatenate",
    "Chunk",
    "Transpose",
}  # of transformers' weight converters


def slice_edits(
    meta_model: MetaModel,
    groups: Iterable[Group],
    kept: Kept,
    written: dict[GroupKey, int] | None = None,
    stored: dict[int, Sequence[StoredParameter]] | None = None,
) -> dict[str, TensorEdit]:
    """Edits that keep the `kept` members of every group, by stored tensor name.

    `written` is how many members a group is written with, where that is more than it keeps: the rest are
    zeros. `stored` are the stored parameters of each layer, the model's own by default. Raises PlanError when
    a group lacks a kept member, UnsupportedModelError for a stored layout that can't be cut.
    """
    edits: dict[str, TensorEdit] = {}
    by_layer: dict[int, dict[str, list[tuple[Group, Slice]]]] = {}
    for group in groups:
        _check_members(group, kept[group.key])
        for part in group.slices:
            by_layer.setdefault(group.layer, {}).setdefault(part.parameter, []).append((group, part))
    members = {key: _padded(kept[key], (written or {}).get(key, 0)) for key in kept}
    for layer, parameters in by_layer.items():
        prefix = f"{meta_model.layers_path}.{layer}."
        for stored_parameter in (stored or {}).get(layer, meta_model.layer_parameters[layer]):
            slices = parameters.get(stored_parameter.targets[0].removeprefix(prefix))
            if slices:
                edits |= _parameter_edits(meta_model, stored_parameter, slices, members)
    return edits


def _check_members(group: Group, kept: torch.Tensor) -> None:
    if len(kept) and int(kept[-1]) >= group.size:
        raise PlanError(
            "the plan is for another width",
            where=f"layer {group.layer}, {group.name}",
            expected=f"more than {int(kept[-1])} members",
            found=str(group.size),
        )


def _padded(kept: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([kept, kept.new_full((max(0, count - len(kept)),), -1)])


def _parameter_edits(
    meta_model: MetaModel,
    stored_parameter: StoredParameter,
    slices: list[tuple[Group, Slice]],
    members: dict[GroupKey, torch.Tensor],
) -> dict[str, TensorEdit]:
    """Edits of the stored tensors behind one parameter: laid out as in memory, but where a converter changes
    that.
    """
    part = slices[0][1]
    axis, parts = part.axis, part.parts
    steps = stored_parameter.steps
    if steps - CUTTABLE_STEPS:
        raise UnsupportedModelError(
            "these weights are stored in a layout surgeon can't cut",
            where=stored_parameter.stored[0],
            found=", ".join(sorted(steps)),
        )
    if stored_parameter.converter is not None:
        parts = parts * len(stored_parameter.targets) // len(stored_parameter.converter.source_patterns)
        if "Transpose" in steps:
            axis = {1: 2, 2: 1}[axis] if part.expert is not None else 1 - axis
    edits = {}
    seen: dict[str, int] = {}
    for stored, pattern in stored_parameter.sources:
        expert = seen.get(pattern, 0)
        seen[pattern] = expert + 1
        apart = "MergeModulelist" in steps  # each expert is a stored tensor of its own
        mine = [slices[expert]] if apart else slices
        takes = [
            replace(one, axis=axis, parts=parts, expert=None).indices(members[group.key], group.size)
            for group, one in mine
        ]
        stacked = part.expert is not None and not apart
        stored_axis = axis - 1 if apart else axis
        _check_axis(meta_model, stored, stored_axis, replace(part, parts=parts).length(mine[0][0].size))
        indices = torch.stack(takes) if stacked else takes[0]
        edits[stored] = TensorEdit(stored, (Take(stored_axis, indices),))
    return edits


def _check_axis(meta_model: MetaModel, stored: str, axis: int, expected: int) -> None:
    shape = meta_model.checkpoint.tensors[stored].shape
    if shape[axis] != expected:
        raise UnsupportedModelError(
            "a stored tensor does not run over the members as its family's should",
            where=stored,
            expected=f"{expected} along axis {axis}",
            found=str(list(shape)),
        )


def mask_cut(cut: Cut) -> LayerEdit:
    """A layer edit after which a layer computes what the cut one does: members that go are masked, and no
    token is routed to an expert that goes.
    """
    mask = mask_members(cut.groups, cut.kept)

    def edit(number: int, layer: nn.Module) -> None:
        mask(number, layer)
        if cut.reroute is not None:
            cut.reroute(number, layer)

    return edit


def sublayer_groups(cut: Cut) -> list[Group]:
    """Whole attentions and FFNs, and key/value heads, of a cut."""
    return [group for group in cut.groups if group.name in (*SUBLAYER_GROUPS.values(), KV_HEADS)]


def mask_members(groups: Iterable[Group], kept: Kept) -> LayerEdit:
    """A layer edit that zeroes the columns removed members are read through.

    The model then computes what the cut one does, by another route: no tensor changes its shape.
    """
    by_layer: dict[int, list[Group]] = {}
    for group in groups:
        by_layer.setdefault(group.layer, []).append(group)

    def edit(number: int, layer: nn.Module) -> None:
        for group in by_layer.get(number, []):
            removed = torch.ones(group.size, dtype=torch.bool)
            removed[kept[group.key]] = False
            gone = removed.nonzero()[:, 0]
            for part in group.consumers:
                parameter = layer.get_parameter(part.parameter).data
                weight = parameter if part.expert is None else parameter[part.expert]
                axis = part.axis if part.expert is None else part.axis - 1
                weight.index_fill_(axis, part.indices(gone, group.size).to(weight.device), 0)

    return edit


@contextlib.contextmanager
def without_members(layer: nn.Module, group: Group, kept: torch.Tensor) -> Iterator[None]:
    """Within the block, a resident layer runs without the members of `group` that are not `kept` [K].

    Those must be masked already: the layer then puts out the same in less time. Where the members are not
    rows and columns of plain `nn.Linear`s, one each, the layer is left as it is: other modules may know their
    shape.
    """
    owners = [layer.get_submodule(part.parameter.rpartition(".")[0]) for part in group.slices]
    plain = all(type(one) is nn.Linear for one in owners) and all(part.parts == 1 for part in group.slices)
    whole = [(layer.get_parameter(part.parameter), part) for part in group.slices if plain]
    originals = [parameter.data for parameter, _ in whole]
    try:
        for parameter, part in whole:
            rows = part.indices(kept.cpu(), group.size).to(parameter.device)
            parameter.data = parameter.data.index_select(part.axis, rows)
        yield
    finally:
        for (parameter, _), original in zip(whole, originals, strict=True):
            parameter.data = original
