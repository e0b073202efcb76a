"""What is trained of a student: float32 masters by layer, put into a resident layer as tensors with
gradients.

Three kinds (`TrainMode`): the norms of the decoder layers, all their parameters, or low-rank adapters on
their linears beside the norms. Embeddings, final norm and head are not trained. Shapes: a linear has inputs I
and outputs O, an adapter A [r, I] and B [O, r].
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.engine.resume import Journal
from surgery.errors import UsageError
from surgery.heal.state import HeldState, State, StateFiles
from surgery.model.ffn import is_conv1d
from surgery.model.meta_model import MetaModel

LEARNING_RATES = {"lora": 2e-3, "norms": 2e-3, "all": 4e-4}  # peaks
A, B = ".lora_A", ".lora_B"


@dataclass(frozen=True)
class TrainMode:
    """`kind` is lora, norms or all; `rank` r is that of the adapters, 0 for the other kinds."""

    kind: str
    rank: int = 0

    @classmethod
    def parse(cls, text: str) -> TrainMode:
        """The mode of `--train lora:R|norms|all`. Raises UsageError for anything else."""
        found = re.fullmatch(r"lora:([1-9]\d*)|norms|all", text)
        if found is None:
            raise UsageError(
                "unknown --train", expected="lora:R with R of 1 or more, norms or all", found=text
            )
        return cls("lora", int(found[1])) if found[1] else cls(text)

    def __str__(self) -> str:
        return f"lora:{self.rank}" if self.rank else self.kind

    @property
    def learning_rate(self) -> float:
        """The peak learning rate unless another is asked for."""
        return LEARNING_RATES[self.kind]


def adapted_linears(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """Path in the layer -> (outputs O, inputs I) of each linear that gets an adapter.

    Experts stacked in one parameter are no linears and get none.
    """
    found = {}
    for path, module in layer.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            rows, columns = module.weight.shape
            found[path] = (columns, rows) if is_conv1d(module) else (rows, columns)
    return found


def direct_parameters(layer: nn.Module, mode: TrainMode) -> dict[str, tuple[int, ...]]:
    """Path in the layer -> shape of each parameter that is trained itself: norms, or all of them."""
    norms = {path for path, module in layer.named_modules() if "norm" in type(module).__name__.lower()}
    return {
        name: tuple(parameter.shape)
        for name, parameter in layer.named_parameters()
        if parameter.is_floating_point() and (mode.kind == "all" or name.rpartition(".")[0] in norms)
    }


def trained_shapes(layer: nn.Module, mode: TrainMode) -> dict[str, tuple[int, ...]]:
    """Path in the layer -> shape of each tensor that is trained: parameters themselves, then adapters."""
    shapes = direct_parameters(layer, mode)
    if mode.kind == "lora":
        for path, (rows, columns) in adapted_linears(layer).items():
            shapes |= {f"{path}{A}": (mode.rank, columns), f"{path}{B}": (rows, mode.rank)}
    return shapes


def trained_numbers(meta_model: MetaModel, mode: TrainMode) -> list[int]:
    """Trained numbers of every layer."""
    layers = meta_model.layers
    return [sum(math.prod(shape) for shape in trained_shapes(layer, mode).values()) for layer in layers]


def open_state(meta_model: MetaModel, mode: TrainMode, device: torch.device, files: Journal | None) -> State:
    """The state of what is trained, in memory, or in `files` of a journal."""
    if files is None:
        return HeldState(device)
    shapes = {
        f"{number}.{path}": shape
        for number, layer in enumerate(meta_model.layers)
        for path, shape in trained_shapes(layer, mode).items()
    }
    return StateFiles(files, shapes, device)


class Trainables:
    """What is trained, by key "layer.path in the layer": its float32 masters are those of `state`.

    - `state`: in memory unless given.
    - `scale`: an adapter adds scale · B A to its weight W [O, I]; 1 by default.
    - A is drawn uniformly from ±1/sqrt(I) with `seed`, B is 0, so that training starts at the student.
    """

    def __init__(
        self,
        meta_model: MetaModel,
        mode: TrainMode,
        seed: int,
        device: torch.device,
        state: State | None = None,
    ) -> None:
        self.meta_model = meta_model
        self.mode = mode
        self.scale = 1.0
        self.device = device
        self.state = state or HeldState(device)
        if not self.state.resumed:
            self._start(torch.Generator().manual_seed(seed))

    def _start(self, generator: torch.Generator) -> None:
        for number, layer in enumerate(self.meta_model.layers):
            for path, shape in trained_shapes(layer, self.mode).items():
                if path.endswith(A):
                    master = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])
                elif path.endswith(B):
                    master = torch.zeros(shape)
                else:
                    master = self._stored(number, path)
                self.state.start(f"{number}.{path}", master)

    @property
    def masters(self) -> dict[str, torch.Tensor]:
        """Float32 masters by key, as they are now; on the device, or in files."""
        return self.state.masters

    def _stored(self, number: int, path: str) -> torch.Tensor:
        """A parameter as the checkpoint has it, in the layout of memory; a copy."""
        parameter = self.meta_model.stored_parameter(number, path)
        tensors = [self.meta_model.checkpoint.read(name) for name in parameter.stored]
        name = f"{self.meta_model.layers_path}.{number}.{path}"
        return self.meta_model.assemble(parameter, tensors)[name]

    @property
    def count(self) -> int:
        """Trained numbers."""
        return sum(master.numel() for master in self.masters.values())

    def of_layer(self, number: int) -> dict[str, torch.Tensor]:
        """Path in the layer -> master."""
        start = f"{number}."
        return {key.removeprefix(start): one for key, one in self.masters.items() if key.startswith(start)}

    @contextlib.contextmanager
    def installed(
        self, number: int, layer: nn.Module, leaves: dict[str, torch.Tensor] | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Within the block, the resident layer computes with the masters, cast to the compute dtype.

        Yields path -> the tensor that takes gradients; `leaves`, when given, are those of an earlier call.
        """
        cast = self._leaves(number) if leaves is None else leaves
        handles: list[Any] = []
        adapted = [path.removesuffix(A) for path in cast if path.endswith(A)]
        for path, leaf in cast.items():
            if not path.endswith((A, B)):
                module, _, name = path.rpartition(".")
                layer.get_submodule(module)._parameters[name] = leaf  # type: ignore[assignment]
        for path in adapted:
            hook = adapter_hook(cast[path + A], cast[path + B], self.scale)
            handles.append(layer.get_submodule(path).register_forward_hook(hook))
        try:
            yield cast
        finally:
            for handle in handles:
                handle.remove()

    def _leaves(self, number: int) -> dict[str, torch.Tensor]:
        prefix = f"{self.meta_model.layers_path}.{number}."
        leaves: dict[str, torch.Tensor] = {}
        for path, master in self.of_layer(number).items():
            if path.endswith((A, B)):
                cast = master.to(self.device, self.meta_model.dtype)
                leaves[path] = cast.detach().requires_grad_(True)
            else:
                dtype = self.meta_model.compute_dtype(prefix + path)
                leaves[path] = nn.Parameter(master.to(self.device, dtype))
        return leaves

    def has(self, number: int, path: str) -> bool:
        """Whether the parameter at `path` of a layer is trained, itself or by an adapter."""
        key = f"{number}.{path}"
        return key in self.masters or f"{key.removesuffix('.weight')}{A}" in self.masters

    def trained(self, number: int, path: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """The parameter at `path` after training, float32 on the CPU; None where it was not trained.

        `tensor` is its value before, in the layout of memory: W + scale · B A for an adapted linear.
        """
        direct = self.masters.get(f"{number}.{path}")
        if direct is not None:
            return direct.detach().cpu()
        module = path.removesuffix(".weight")
        a, b = (self.masters.get(f"{number}.{module}{suffix}") for suffix in (A, B))
        if a is None or b is None or module == path:
            return None
        added = self.scale * (b.to(self.device) @ a.to(self.device)).detach().cpu()
        linear = self.meta_model.layers[number].get_submodule(module)
        return tensor.float() + (added.T if is_conv1d(linear) else added)


def adapter_hook(a: torch.Tensor, b: torch.Tensor, scale: float) -> Callable[..., torch.Tensor]:
    """A forward hook that adds scale · B A x to a linear's output."""

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + scale * ((inputs[0] @ a.T) @ b.T)

    return hook
