"""The final norm: what a model's last hidden states go through before the output head.

Scaling its output scales the logits, which no layer can do: the norm takes away the length of its input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from surgery.engine.streamed_model import StreamedModel


class FinalNorm:
    """The final norm y = n(x) (w + o) + b of a model, whose output its own parameters can scale.

    n(x) [D] is the normalised input, w [D] the stored weight, o 0 or, where the weight is stored less one, 1;
    b [D] is a bias, where there is one. `stored` are the names of the stored tensors.
    """

    def __init__(self, model: StreamedModel, path: str, offset: float, stored: dict[str, str]) -> None:
        self.model = model
        self.path = path
        self.offset = offset
        self._stored = stored  # by the parameter's name in the module

    @property
    def stored(self) -> list[str]:
        """Names of the stored tensors."""
        return list(self._stored.values())

    @contextlib.contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Within the block, logits are those of the model with its norm's output times `scale`, as stored.

        Use it within `other_weights`.
        """
        module = self.model.model.get_submodule(self.path)
        before = {name: parameter.data for name, parameter in module.named_parameters()}
        try:
            for name, stored in self._stored.items():
                dtype = self.model.checkpoint.tensors[stored].dtype
                parameter = module.get_parameter(name)
                parameter.data = self._times(name, parameter.data, scale).to(dtype).to(parameter.dtype)
            yield
        finally:
            for name, data in before.items():
                module.get_parameter(name).data = data

    def tensor(self, stored: str, tensor: torch.Tensor, scale: float) -> torch.Tensor:
        """A stored tensor of the norm, in its dtype, that makes the norm's output `scale` times as large."""
        name = next(name for name, own in self._stored.items() if own == stored)
        return self._times(name, tensor, scale).to(tensor.dtype)

    def _times(self, name: str, tensor: torch.Tensor, scale: float) -> torch.Tensor:
        offset = self.offset if name == "weight" else 0.0
        return (tensor.double() + offset) * scale - offset


@torch.no_grad()
def find_final_norm(model: StreamedModel, hidden: torch.Tensor) -> FinalNorm | None:
    """The model's final norm; None where it has none, or one whose output its parameters do not scale.

    It is the first module with parameters that the model calls after its decoder layers, tried with `hidden`
    [n, D], outputs of the last layer. Call it within `other_weights`.
    """
    called: list[tuple[nn.Module, tuple[torch.Tensor, ...]]] = []
    inside = {id(module) for layer in model.layers for module in layer.modules()}
    with contextlib.ExitStack() as hooks:
        for layer in model.layers:
            hook = layer.register_forward_hook(lambda *_: called.clear())
            hooks.callback(hook.remove)
        for module in model.model.modules():
            if id(module) not in inside and any(True for _ in module.parameters(recurse=False)):
                hook = module.register_forward_hook(lambda own, args, _: called.append((own, args)))
                hooks.callback(hook.remove)
        model.logits(hidden)
    if not called or len(called[0][1]) != 1:  # a norm takes hidden states alone
        return None
    module, (entering,) = called[0]
    path = next(path for path, own in model.model.named_modules() if own is module)
    stored = _stored(model, path, module)
    offset = _offset(module, entering)
    return None if stored is None or offset is None else FinalNorm(model, path, offset, stored)


def _stored(model: StreamedModel, path: str, module: nn.Module) -> dict[str, str] | None:
    """Stored tensors by parameter; None unless they are a weight and perhaps a bias, stored as they are."""
    names = {f"{path}.{name}": name for name, _ in module.named_parameters()}
    found = {
        names[one.targets[0]]: one.stored[0]
        for one in model.meta_model.other_parameters
        if one.targets[0] in names and one.converter is None and len(one.stored) == 1
    }
    complete = len(found) == len(names) and "weight" in found and found.keys() <= {"weight", "bias"}
    return found if complete else None


def _offset(module: nn.Module, entering: torch.Tensor) -> float | None:
    """What the module adds to its weight before it multiplies, 0 or 1; None where it does neither."""
    parameters = list(module.parameters())
    weight, before = module.get_parameter("weight"), [parameter.data for parameter in parameters]
    if weight.dim() != 1:
        return None
    try:
        for parameter in parameters:
            parameter.data = torch.zeros_like(parameter)
        at_zero = module(entering).double()
        weight.data = torch.ones_like(weight)
        at_one = module(entering).double()
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data
    for offset in (0.0, 1.0):
        if torch.allclose(at_zero, at_one * offset / (1 + offset), rtol=1e-2, atol=0):
            return offset
    return None
