"""Repair of the module through which attention writes to the residual stream, before the FFN's turn."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from surgery.mended import Change
from surgery.repair import Moments, Repair, least_squares, repair
from surgery.repair_memory import parts
from surgery.stream import LayerCall, StreamedModel

if TYPE_CHECKING:
    from surgery.mending import MendedLayer, Mender


class _Reached(Exception):
    """Carries a tensor out of a layer's forward."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def mend_attention(
    mender: Mender, number: int, layer: nn.Module, name: str, done: MendedLayer
) -> list[Repair]:
    """Refit linear `name` of the layer, in place, so that the pruned stream before the FFN comes to the dense one's.

    Several repairs where the budget makes it solve for parts of its inputs one after the other.
    """
    linear = layer.get_submodule(name)
    parameter = linear.weight
    assert isinstance(parameter, torch.Tensor)
    transposed = type(linear).__name__ == "Conv1D"
    weight = parameter.data.t() if transposed else parameter.data
    device = mender.model.device
    bias = getattr(linear, "bias", None)
    repairs = []
    for chunk in parts(weight.shape[1], len(weight), mender.budget):
        size = weight[:, chunk].shape[1]
        train, held = (Moments.zeros(len(weight), size, device) for _ in range(2))
        for part, calls in zip(mender.pruned.slices, mender.pruned.calls, strict=True):
            entering = mender.pruned.store.get(0, part, device)
            entered = _input_of(mender.model, linear, layer, entering, calls[number])
            target = mender.dense.before.get(0, part, device) - entering
            wanted = target if bias is None else target - bias
            stream = mender.dense.leaving.get(0, part, device)
            mender.add((train, held), part, entered, wanted, weight, stream, chunk=chunk)
        found = repair(train, held, least_squares)
        if found.change is not None:
            columns = torch.arange(weight.shape[1], device=device)[chunk]
            done.note(f"{name}.weight", Change(found.change, columns, transposed))
            weight[:, chunk] = (weight[:, chunk].to(found.change) + found.change).to(weight.dtype)
        repairs.append(replace(found, change=None))
    return repairs


def _input_of(
    model: StreamedModel, linear: nn.Module, layer: nn.Module, entering: torch.Tensor, call: LayerCall
) -> torch.Tensor:
    """What enters a module of the layer; the layer runs no further, which saves its FFN."""

    def stop(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        raise _Reached(arguments[0])

    handle = linear.register_forward_pre_hook(stop)
    try:
        model.run_layer(layer, entering, call)
    except _Reached as reached:
        return reached.tensor
    finally:
        handle.remove()
    raise AssertionError("the layer never ran its attention")
