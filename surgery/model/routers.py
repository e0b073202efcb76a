"""The routers of a mixture of experts: which tensors have an entry for each expert, and masking experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from surgery.model.ffn import Ffn

MASKED = "_surgeon_masks_experts"


@dataclass(frozen=True)
class RouterTensor:
    """A tensor of a layer's router: its path inside the layer and the axis that runs over the experts.

    `logits` says whether it is a weight or a bias of the linear that computes router logits; others are added
    to scores to choose experts by.
    """

    path: str
    axis: int
    logits: bool


def router_tensors(layer: nn.Module, ffns: Sequence[Ffn]) -> list[RouterTensor]:
    """The router's tensors of a layer with routed experts `ffns`; empty without any.

    They are all parameters and buffers of the block around the experts, outside its FFNs, with an axis as
    long as there are experts.
    """
    routed = [ffn for ffn in ffns if ffn.stacked]
    if not routed:
        return []
    block = routed[0].site.down.rpartition(".")[0].rpartition(".")[0]
    inside = tuple(
        {f"{ffn.site.down.rpartition('.')[0]}." for ffn in ffns if ffn.site.down.startswith(f"{block}.")}
    )
    module = layer.get_submodule(block)
    tensors: list[tuple[str, torch.Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    found = []
    for name, tensor in tensors:
        path = f"{block}.{name}"
        if path.startswith(inside) or len(routed) not in tensor.shape:
            continue
        owner = layer.get_submodule(path.rpartition(".")[0])
        weight = getattr(owner, "weight", None)
        logits = (
            isinstance(weight, torch.Tensor) and weight.dim() == 2 and path.endswith((".weight", ".bias"))
        )
        found.append(RouterTensor(path, list(tensor.shape).index(len(routed)), logits))
    return found


def mask_experts(layer: nn.Module, tensors: Sequence[RouterTensor], removed: torch.Tensor) -> None:
    """Make the resident `layer` route no token to the `removed` experts; no tensor changes its shape.

    Their router logits become the lowest number there is: their rows of the router's weight are NaN, and the
    module that has it turns the NaN of its product into that number.
    """
    for one in tensors:
        owner = layer.get_submodule(one.path.rpartition(".")[0])
        tensor = getattr(owner, one.path.rpartition(".")[2])
        where = removed.to(tensor.device)
        if not one.logits:
            tensor.data.index_fill_(one.axis, where, lowest(tensor.dtype))
        elif tensor.dim() == 2:
            tensor.data.index_fill_(one.axis, where, float("nan"))
            _watch(owner)


def lowest(dtype: torch.dtype) -> float:
    """A number below every score, with room to add to it."""
    return torch.finfo(dtype).min / 4


def _watch(router: Any) -> None:
    """Replace NaN in the logits that `router` computes from now on; done once."""
    if getattr(router, MASKED, False):
        return
    setattr(router, MASKED, True)
    forward = router.forward

    def masked(*arguments: Any, **named: Any) -> Any:
        with _LowestForNan():
            return forward(*arguments, **named)

    router.forward = masked


class _LowestForNan(TorchFunctionMode):
    """Within it, NaN in the result of a linear is the lowest number."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        if function is nn.functional.linear:
            return torch.where(result.isnan(), lowest(result.dtype), result)
        return result
