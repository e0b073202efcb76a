"""Cutting tensors: the one place where kept channels meet weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from surgery.checkpoint import TensorEntry
from surgery.errors import PlanError, UnsupportedModelError
from surgery.ffn import EXPERT, Ffn, ParameterCut
from surgery.plan import ResizePlan
from surgery.skeleton import Assembly, Skeleton
from surgery.stream import LayerEdit


@dataclass(frozen=True)
class TensorCut:
    """A stored tensor whose `axis` runs over the channels of `ffns` of a layer.

    Of one FFN as `parts` blocks of F, or `interleaved`; of several (stacked experts) with the FFN as first axis.
    """

    layer: int
    axis: int
    ffns: tuple[str, ...]
    parts: int = 1
    interleaved: bool = False
    stacked: bool = False

    def width(self, entry: TensorEntry) -> int:
        """Channels the stored tensor holds."""
        return entry.shape[self.axis] // self.parts


def tensor_cuts(skeleton: Skeleton) -> dict[str, TensorCut]:
    """Stored tensor name -> how it is cut: gate and up rows and their biases, down columns; the down bias stays."""
    found: dict[str, TensorCut] = {}
    for layer, ffns in enumerate(skeleton.ffns):
        prefix = f"{skeleton.layers_path}.{layer}."
        parameters = {prefix + name: (ffn, cut) for ffn in ffns for name, cut in ffn.cuts().items()}
        for assembly in skeleton.inside[layer]:
            if assembly.targets[0] in parameters:
                ffn, cut = parameters[assembly.targets[0]]
                found |= _stored_cuts(skeleton, assembly, layer, ffn, cut)
    return found


def _stored_cuts(
    skeleton: Skeleton, assembly: Assembly, layer: int, ffn: Ffn, cut: ParameterCut
) -> dict[str, TensorCut]:
    """How the stored tensors behind a parameter are cut: as it is itself, but where a converter lays them out anew."""
    if assembly.converter is None:
        units = tuple(ffn.units) if cut.stacked else (ffn.key,)
        whole = TensorCut(layer, cut.axis, units, cut.parts, cut.interleaved, cut.stacked)
        return _checked(skeleton, {assembly.stored[0]: whole}, ffn)
    steps = assembly.steps
    if steps - {"MergeModulelist", "Concatenate", "Chunk", "Transpose"}:
        raise UnsupportedModelError(
            "these weights are stored in a layout surgeon can't cut",
            where=assembly.stored[0],
            found=", ".join(sorted(steps)),
        )
    merged, axis = "MergeModulelist" in steps, cut.axis
    if "Transpose" in steps:
        axis = {1: 2, 2: 1}[axis] if cut.stacked else 1 - axis
    parts = cut.parts * len(assembly.targets) // len(assembly.converter.source_patterns)
    found = {}
    seen: dict[str, int] = {}
    for stored, pattern in assembly.sources:
        expert = seen.get(pattern, 0)
        seen[pattern] = expert + 1
        if merged:
            found[stored] = TensorCut(layer, axis - 1, (f"{EXPERT}{expert}",), parts, cut.interleaved)
        else:
            units = tuple(ffn.units) if cut.stacked else (ffn.key,)
            found[stored] = TensorCut(layer, axis, units, parts, cut.interleaved, cut.stacked)
    return _checked(skeleton, found, ffn)


def _checked(skeleton: Skeleton, cuts: dict[str, TensorCut], ffn: Ffn) -> dict[str, TensorCut]:
    for name, cut in cuts.items():
        shape = skeleton.checkpoint.tensors[name].shape
        if shape[cut.axis] != cut.parts * ffn.width:
            raise UnsupportedModelError(
                "a stored tensor does not run over the channels as its family's should",
                where=name,
                expected=f"{cut.parts * ffn.width} along axis {cut.axis}",
                found=str(list(shape)),
            )
    return cuts


def resized_shape(entry: TensorEntry, cut: TensorCut | None, plan: ResizePlan) -> tuple[int, ...]:
    """Shape of a stored tensor after the cut. Raises PlanError when plan and tensor disagree on the width."""
    if cut is None:
        return entry.shape
    kept = plan.layers[cut.layer].ffns[cut.ffns[0]].kept
    if len(kept) and int(kept[-1]) >= cut.width(entry):
        raise PlanError(
            "the plan is for another width",
            where=entry.name,
            expected=f"more than {int(kept[-1])} channels",
            found=str(cut.width(entry)),
        )
    shape = list(entry.shape)
    shape[cut.axis] = cut.parts * plan.stored_width(cut.layer, cut.ffns[0])
    return tuple(shape)


def cut_tensor(tensor: torch.Tensor, cut: TensorCut, plan: ResizePlan) -> torch.Tensor:
    """The kept slices of a tensor along the cut's axis, contiguous, dtype unchanged; zeros where the plan pads."""
    if not cut.stacked:
        return _take(tensor, cut, cut.axis, cut.ffns[0], plan)
    slices = [_take(one, cut, cut.axis - 1, unit, plan) for one, unit in zip(tensor, cut.ffns, strict=True)]
    return torch.stack(slices)


def _take(tensor: torch.Tensor, cut: TensorCut, axis: int, unit: str, plan: ResizePlan) -> torch.Tensor:
    kept = plan.layers[cut.layer].ffns[unit].kept
    width = tensor.shape[axis] // cut.parts
    parts = torch.arange(cut.parts)
    if cut.interleaved:
        places = (kept[:, None] * cut.parts + parts).flatten()
    else:
        places = (kept + parts[:, None] * width).flatten()
    taken = tensor.index_select(axis, places).contiguous()
    padding = plan.stored_width(cut.layer, unit) - len(kept)
    return _pad(taken, cut, axis, padding) if padding else taken


def _pad(tensor: torch.Tensor, cut: TensorCut, axis: int, channels: int) -> torch.Tensor:
    """Add zero channels behind the others, in each of the parts."""
    pieces = [tensor] if cut.interleaved else list(tensor.chunk(cut.parts, axis))
    shape = list(tensor.shape)
    shape[axis] = channels * (cut.parts if cut.interleaved else 1)
    return torch.cat([part for piece in pieces for part in (piece, tensor.new_zeros(shape))], axis)


def mask_channels(plan: ResizePlan, ffns: list[list[Ffn]]) -> LayerEdit:
    """A layer edit that zeroes the down columns a plan removes: the same function as the cut model, by another route."""

    def edit(number: int, _: nn.Module) -> None:
        for ffn in ffns[number]:
            for place, unit in enumerate(ffn.units):
                weight = ffn.down_weight(place)
                removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
                removed[plan.layers[number].ffns[unit].kept.to(weight.device)] = False
                weight[:, removed] = 0

    return edit
