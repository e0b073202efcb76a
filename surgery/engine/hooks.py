"""Hooks on a resident layer: FFN activations, module inputs and outputs, and restoring its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.model.experts import EXPERT_OBSERVER, OUTPUT_OBSERVER
from surgery.model.ffn import Ffn


@dataclass(frozen=True)
class FfnCall:
    """One call of the FFN named `ffn`: u [..., F] is its down projection's input, y [..., D] the output.

    For an expert, u and y have one row per token routed to it, and `tokens` holds the positions of these rows
    in the flattened batch; `tokens` is None for other FFNs. u and y are part of the autograd graph.
    """

    ffn: str
    tokens: torch.Tensor | None
    u: torch.Tensor
    y: torch.Tensor


@contextlib.contextmanager
def observed(ffns: list[Ffn], observe: Callable[[FfnCall], None]) -> Iterator[None]:
    """Within the block, every call of one of `ffns` is passed to `observe`."""
    handles = []
    stacks: list[Any] = []
    try:
        for ffn in ffns:
            if ffn.stacked:
                if ffn.module not in stacks:
                    stacks.append(ffn.module)
                continue

            def hook(
                _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, name: str = ffn.name
            ) -> None:
                observe(FfnCall(name, None, inputs[0], output))

            handles.append(ffn.module.register_forward_hook(hook))
        for module in stacks:
            setattr(module, EXPERT_OBSERVER, lambda *call: observe(FfnCall(*call)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in stacks:
            setattr(module, EXPERT_OBSERVER, None)


@contextlib.contextmanager
def expert_outputs(ffns: list[Ffn], observe: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Within the block, `observe(expert, output)` is called with what each routed expert adds to its layer's
    output, weighted by the router, [routed, D].
    """
    modules = list({id(ffn.module): ffn.module for ffn in ffns if ffn.stacked}.values())
    try:
        for module in modules:
            setattr(module, OUTPUT_OBSERVER, observe)
        yield
    finally:
        for module in modules:
            setattr(module, OUTPUT_OBSERVER, None)


@contextlib.contextmanager
def preserved(layer: nn.Module) -> Iterator[None]:
    """Restore all parameters and buffers of a resident layer when the block ends."""
    originals = [(tensor, tensor.data.clone()) for tensor in (*layer.parameters(), *layer.buffers())]
    try:
        yield
    finally:
        for parameter, original in originals:
            parameter.data.copy_(original)


class _InputReached(Exception):
    """Carries a module's input out of a layer's forward."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def input_of(module: nn.Module, run: Callable[[], object]) -> torch.Tensor:
    """The input of `module`'s first call in `run()`. The run stops there: nothing after it is computed."""

    def stop(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        raise _InputReached(arguments[0])

    handle = module.register_forward_pre_hook(stop)
    try:
        run()
    except _InputReached as reached:
        return reached.tensor
    finally:
        handle.remove()
    raise AssertionError("the layer never ran the module")


@contextlib.contextmanager
def module_inputs(modules: dict[str, nn.Module], use: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Within the block, `use(name, input)` is called before each forward of a named module."""

    def hook_of(name: str) -> Callable[..., None]:
        return lambda _, inputs: use(name, inputs[0])

    with _hooks(module.register_forward_pre_hook(hook_of(name)) for name, module in modules.items()):
        yield


@contextlib.contextmanager
def module_outputs(
    modules: dict[str, nn.Module], use: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Within the block, `use(name, output)` is called after each forward of a named module.

    A tensor it returns replaces the output; None leaves the output as it is.
    """

    def hook_of(name: str) -> Callable[..., torch.Tensor | None]:
        return lambda _, __, output: use(name, output)

    with _hooks(module.register_forward_hook(hook_of(name)) for name, module in modules.items()):
        yield


@contextlib.contextmanager
def _hooks(handles: Any) -> Iterator[None]:
    """Register the hooks of `handles`, an iterable of handles, and remove them when the block ends."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()
