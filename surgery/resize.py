"""Cutting tensors: the one place where kept channels meet weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from surgery.checkpoint import Checkpoint, TensorEntry
from surgery.errors import PlanError
from surgery.families import FfnLayout
from surgery.plan import ResizePlan
from surgery.skeleton import Skeleton
from surgery.stream import LayerEdit


@dataclass(frozen=True)
class TensorCut:
    """A stored tensor whose `axis` runs over the channels of `layer`."""

    layer: int
    axis: int


def tensor_cuts(skeleton: Skeleton) -> dict[str, TensorCut]:
    """Stored tensor name -> how it is cut: gate and up rows and their biases, down columns; the down bias stays."""
    cuts = {}
    layout = skeleton.layout
    axes = {f"{row}.{leaf}": 0 for row in layout.rows for leaf in ("weight", "bias")} | {
        f"{layout.down}.weight": 1
    }
    for layer in range(len(skeleton.layers)):
        for parameter, axis in axes.items():
            stored = skeleton.stored_name(layer, parameter)
            if stored is not None:
                cuts[stored] = TensorCut(layer, axis)
    return cuts


def resized_shape(entry: TensorEntry, cut: TensorCut | None, plan: ResizePlan) -> tuple[int, ...]:
    """Shape of a stored tensor after the cut. Raises PlanError when plan and tensor disagree on the width."""
    if cut is None:
        return entry.shape
    if entry.shape[cut.axis] != plan.width_before:
        raise PlanError(
            "the plan is for another width",
            where=entry.name,
            expected=str(plan.width_before),
            found=str(entry.shape[cut.axis]),
        )
    shape = list(entry.shape)
    shape[cut.axis] = len(plan.layers[cut.layer].kept)
    return tuple(shape)


def cut_tensor(tensor: torch.Tensor, cut: TensorCut, plan: ResizePlan) -> torch.Tensor:
    """The kept slices of a tensor along the cut's axis, contiguous, dtype unchanged."""
    return tensor.index_select(cut.axis, plan.layers[cut.layer].kept).contiguous()


def mask_channels(layout: FfnLayout, plan: ResizePlan) -> LayerEdit:
    """A layer edit that zeroes the down columns a plan removes: the same function as the cut model, by another route."""

    def edit(number: int, layer: nn.Module) -> None:
        weight = layer.get_submodule(layout.down).weight.data
        assert isinstance(weight, torch.Tensor)
        removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        removed[plan.layers[number].kept.to(weight.device)] = False
        weight[:, removed] = 0

    return edit


def checkpoint_cuts(checkpoint: Checkpoint) -> dict[str, TensorCut]:
    """`tensor_cuts` of a checkpoint whose model has not been built yet."""
    return tensor_cuts(Skeleton(checkpoint, torch.float32))
