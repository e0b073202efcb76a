"""FFNs of a decoder layer as objects: their weights per channel, how their parameters are cut, what flows through them.

Shape letters: E experts, T tokens, D hidden_size, F intermediate width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from surgery.families import FfnSite

EXPERTS_IMPLEMENTATION = "surgeon"
DENSE, EXPERT = "dense", "expert."  # names of FFNs; experts are numbered
Note = Callable[[str, torch.Tensor | None, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class ParameterCut:
    """How a parameter of a layer runs over the channels of one site.

    Its `axis` is `parts` x F long: the parts one after the other or, when `interleaved`, channel by channel. `stacked`
    parameters hold all experts along their first axis, each of which keeps channels of its own.
    """

    site: str
    axis: int
    parts: int = 1
    interleaved: bool = False
    stacked: bool = False


class Ffn:
    """An FFN site in one decoder layer, whether its weights are on the meta device or in memory.

    `key` is "dense", "shared" or "experts"; `units` the FFNs it consists of: itself, or "expert.0", "expert.1", …
    """

    def __init__(self, site: FfnSite, layer: nn.Module, key: str) -> None:
        self.site = site
        self.layer = layer
        self.key = key
        self.stacked = site.kind == "experts"
        home = site.down.rpartition(".")[0]
        self.module = layer.get_submodule(home if self.stacked else site.down)
        self.width = self.down_weight(0).shape[1]

    @property
    def units(self) -> list[str]:
        """Names of the FFNs this site holds."""
        if not self.stacked:
            return [self.key]
        return [f"{EXPERT}{number}" for number in range(len(self._stack(self.site.down)))]

    def down_weight(self, expert: int = 0) -> torch.Tensor:
        """W_down [D, F] of one unit: a view, through which weights can be set."""
        if self.stacked:
            return self._oriented(self._stack(self.site.down)[expert], self._transposed)
        return self._linear_weight(self.site.down)

    def row_weights(self, expert: int = 0) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(W_gate or None, W_up), each [F, D], of one unit: views."""
        if self.stacked:
            rows = [self._oriented(self._stack(self.site.rows[0])[expert], self._transposed)]
        else:
            rows = [self._linear_weight(row) for row in self.site.rows]
        if len(rows) == 2:
            return rows[0], rows[1]
        if not self.site.fused:
            return None, rows[0]
        if self._interleaved:
            return rows[0][::2], rows[0][1::2]
        return rows[0][: self.width], rows[0][self.width :]

    @property
    def transposed(self) -> bool:
        """Whether memory holds W_down as [F, D]."""
        return self._transposed if self.stacked else is_conv1d(self.module)

    def down_bias(self, expert: int = 0) -> torch.Tensor | None:
        """The bias [D] of one unit's down projection, which is no part of what its channels must produce: a view."""
        found = self._bias
        return None if found is None else found[expert] if self.stacked else found

    @property
    def bias_name(self) -> str | None:
        """Path of the bias of the down projection inside the layer, None where it has none."""
        if self._bias is None:
            return None
        return f"{self.site.down}_bias" if self.stacked else f"{self.site.down}.bias"

    @property
    def _bias(self) -> torch.Tensor | None:
        found = getattr(self.module, "down_proj_bias" if self.stacked else "bias", None)
        return found.data if isinstance(found, torch.Tensor) else None

    def cuts(self) -> dict[str, ParameterCut]:
        """Parameter path inside the layer -> how it is cut. The bias of the down projection stays."""
        parts = 2 if self.site.fused else 1
        if self.stacked:
            flipped = self._transposed
            row, down = self.site.rows[0], self.site.down
            fused = ParameterCut(self.key, 2 if flipped else 1, parts, self._interleaved, True)
            found = {row: fused, down: ParameterCut(self.key, 1 if flipped else 2, stacked=True)}
            if getattr(self.module, "has_bias", False):
                found[f"{row}_bias"] = ParameterCut(self.key, 1, parts, self._interleaved, True)
            return found
        found = {}
        for row in self.site.rows:
            linear = self.layer.get_submodule(row)
            found[f"{row}.weight"] = ParameterCut(self.key, int(is_conv1d(linear)), parts)
            if getattr(linear, "bias", None) is not None:
                found[f"{row}.bias"] = ParameterCut(self.key, 0, parts)
        found[f"{self.site.down}.weight"] = ParameterCut(self.key, 1 - int(is_conv1d(self.module)))
        return found

    @property
    def _transposed(self) -> bool:
        return bool(getattr(self.module, "is_transposed", True))  # Llama 4's, which say nothing, are

    @property
    def _interleaved(self) -> bool:
        return self.stacked and self.site.fused and not getattr(self.module, "is_concatenated", True)

    def _stack(self, path: str) -> torch.Tensor:
        stack = getattr(self.module, path.rpartition(".")[2])
        assert isinstance(stack, torch.Tensor)
        return stack.data

    def _linear_weight(self, path: str) -> torch.Tensor:
        linear = self.layer.get_submodule(path)
        assert isinstance(linear.weight, torch.Tensor)
        return self._oriented(linear.weight.data, is_conv1d(linear))

    @staticmethod
    def _oriented(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
        return weight.t() if transposed else weight


def bind(sites: tuple[FfnSite, ...], layer: nn.Module) -> list[Ffn]:
    """The FFNs a decoder layer has."""
    found = []
    counts: dict[str, int] = {}
    for site in sites:
        if not _has(layer, site):
            continue
        number = counts.get(site.kind, 0)
        counts[site.kind] = number + 1
        found.append(Ffn(site, layer, f"{site.kind}_{number}" if number else site.kind))
    if len(found) == 1 and not found[0].stacked:
        found[0].key = DENSE  # a shared FFN that shares with nothing
    return found


def _has(layer: nn.Module, site: FfnSite) -> bool:
    names = (*site.rows, site.down)
    try:
        for name in names:
            if site.kind == "experts":
                layer.get_parameter(name)
            else:
                layer.get_submodule(name)
    except AttributeError:
        return False
    return True


def is_conv1d(linear: nn.Module) -> bool:
    return type(linear).__name__ == "Conv1D"


@contextlib.contextmanager
def observed(ffns: list[Ffn], note: Note) -> Iterator[None]:
    """While open, each FFN that runs calls `note(unit, tokens, u, y)`.

    u [..., F] is the input of its down projection and y [..., D] the output, in the graph autograd sees. For an expert
    they have one row per token routed to it, whose positions in the flattened batch are `tokens`; otherwise None.
    """
    handles = []
    try:
        for ffn in ffns:
            if ffn.stacked:
                ffn.module._surgeon_note = note  # type: ignore[assignment]
                continue

            def keep(
                _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, key: str = ffn.key
            ) -> None:
                note(key, None, inputs[0], output)

            handles.append(ffn.module.register_forward_hook(keep))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for ffn in ffns:
            if ffn.stacked:
                ffn.module._surgeon_note = None  # type: ignore[assignment]


def experts_forward(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Routed experts, one after the other, so that each one's activation can be seen.

    transformers' fused kernels compute the same without ever holding it apart. hidden [T, D]; index, weights [T, k].
    """
    output = torch.zeros_like(hidden)
    note = getattr(module, "_surgeon_note", None)
    row = "gate_up_proj" if module.has_gate else "up_proj"
    rows, row_biases = getattr(module, row), getattr(module, f"{row}_bias", None)
    for expert in torch.unique(top_k_index).tolist():
        # transposed, so that rows come in the order transformers' own loop has them: results are equal to the bit
        place, tokens = torch.where((top_k_index == expert).t())
        row_bias = None if row_biases is None else row_biases[expert]
        down_bias = module.down_proj_bias[expert] if module.has_bias else None
        projected = _linear(hidden[tokens], rows[expert], row_bias, module.is_transposed)
        u = module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
        y = _linear(u, module.down_proj[expert], down_bias, module.is_transposed)
        if note is not None:
            note(f"{EXPERT}{expert}", tokens, u, y)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        output = output.index_add(0, tokens, (y * top_k_weights[tokens, place, None]).to(output.dtype))
    return output


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    if transposed:
        return x @ weight if bias is None else x @ weight + bias
    return functional.linear(x, weight, bias)


def scaled_experts_forward(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Llama 4's experts, which get every token, scaled by its routing score: by zero where it isn't routed to them.

    hidden [E * T, D]; only the rows that are not zero are computed, the others come out as zero.
    """
    stacked = hidden.view(module.num_experts, -1, module.hidden_size)
    note = getattr(module, "_surgeon_note", None)
    outputs = []
    for expert, x in enumerate(stacked):
        (tokens,) = torch.where(x.detach().abs().amax(-1) > 0)
        gate, up = (x[tokens] @ module.gate_up_proj[expert]).chunk(2, dim=-1)
        u = up * module.act_fn(gate)
        y = u @ module.down_proj[expert]
        if note is not None and len(tokens):
            note(f"{EXPERT}{expert}", tokens, u, y)
        outputs.append(torch.zeros_like(x).index_copy(0, tokens, y))
    return torch.stack(outputs).view(-1, module.hidden_size)


def show_experts(model: nn.Module) -> None:
    """Make every experts module of a model run through `experts_forward`, or its like for Llama 4."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
    for module in model.modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "config"):
            cast(Any, module.config)._experts_implementation = EXPERTS_IMPLEMENTATION
        elif type(module).__name__ == "Llama4TextExperts":
            experts: Any = module
            experts.is_transposed, experts.is_concatenated, experts.has_bias = True, True, False
            experts.forward = functools.partial(scaled_experts_forward, experts)
