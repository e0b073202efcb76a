"""Ffn: one feed-forward network of a decoder layer, with access to its weights by channel.

Shape letters: D hidden_size, F intermediate width.
"""

from __future__ import annotations

import torch
from torch import nn

from surgery.model.families import DENSE, EXPERT, FfnSite
from surgery.model.slices import Slice


class Ffn:
    """One FFN of a decoder layer: a dense FFN, a shared FFN, or a single routed expert.

    - `name` is unique in its layer ("dense", "shared", "expert.3"); files use it.
    - `kind` is "dense", "shared" or "experts"; `expert` is the expert's number, None for the other kinds.
    - `width` is F, `module` the module whose input or attribute gives the activations.

    Experts of one layer are `stacked` in the parameters of one module. Weights may be on the meta device.
    """

    def __init__(
        self, site: FfnSite, layer: nn.Module, name: str, kind: str, expert: int | None = None
    ) -> None:
        self.site = site
        self.layer = layer
        self.name = name
        self.kind = kind
        self.expert = expert
        parent = site.down.rpartition(".")[0]
        self.module = layer.get_submodule(parent if self.stacked else site.down)
        self.width = self.down_weight().shape[1]

    @property
    def stacked(self) -> bool:
        """Whether this is an expert, whose weights are one slice of stacked parameters."""
        return self.expert is not None

    def down_weight(self) -> torch.Tensor:
        """W_down [D, F], as a view: writing to it sets the weights."""
        if self.stacked:
            return self._oriented(self._expert_weight(self.site.down), self.transposed)
        return self._linear_weight(self.site.down)

    def in_weights(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(W_gate, or None without a gate; W_up), each [F, D], as views."""
        projections = self.site.in_projections
        if self.stacked:
            weights = [self._oriented(self._expert_weight(projections[0]), self.transposed)]
        else:
            weights = [self._linear_weight(path) for path in projections]
        if len(weights) == 2:
            return weights[0], weights[1]
        if not self.site.fused:
            return None, weights[0]
        if self._interleaved:
            return weights[0][::2], weights[0][1::2]
        return weights[0][: self.width], weights[0][self.width :]

    def down_bias(self) -> torch.Tensor | None:
        """The bias [D] of the down projection, as a view; None where it has none."""
        found = self._bias
        return None if found is None else found[self.expert] if self.stacked else found

    @property
    def transposed(self) -> bool:
        """Whether the parameter stores W_down as [F, D]."""
        if self.stacked:
            return bool(getattr(self.module, "is_transposed", True))  # Llama 4's experts lack the attribute
        return is_conv1d(self.module)

    @property
    def down_name(self) -> str:
        """Path, inside the layer, of the parameter that holds W_down."""
        return self.site.down if self.stacked else f"{self.site.down}.weight"

    @property
    def bias_name(self) -> str | None:
        """Path, inside the layer, of the down projection's bias; None where it has none."""
        if self._bias is None:
            return None
        return f"{self.site.down}_bias" if self.stacked else f"{self.site.down}.bias"

    def down_slice(self) -> Slice:
        """The Slice of the channels in W_down: its input columns."""
        if self.stacked:
            return Slice(self.down_name, 1 if self.transposed else 2, expert=self.expert)
        return Slice(self.down_name, 0 if self.transposed else 1)

    def in_slices(self) -> tuple[Slice, ...]:
        """The Slices of the channels in the gate and up projections and their biases."""
        parts = 2 if self.site.fused else 1
        if self.stacked:
            path = self.site.in_projections[0]
            found = [Slice(path, 2 if self.transposed else 1, 1, parts, self._interleaved, self.expert)]
            if getattr(self.module, "has_bias", False):
                found.append(Slice(f"{path}_bias", 1, 1, parts, self._interleaved, self.expert))
            return tuple(found)
        found = []
        for path in self.site.in_projections:
            linear = self.layer.get_submodule(path)
            found.append(Slice(f"{path}.weight", int(is_conv1d(linear)), parts=parts))
            if getattr(linear, "bias", None) is not None:
                found.append(Slice(f"{path}.bias", 0, parts=parts))
        return tuple(found)

    @property
    def _bias(self) -> torch.Tensor | None:
        found = getattr(self.module, "down_proj_bias" if self.stacked else "bias", None)
        return found.data if isinstance(found, torch.Tensor) else None

    @property
    def _interleaved(self) -> bool:
        return self.stacked and self.site.fused and not getattr(self.module, "is_concatenated", True)

    def _expert_weight(self, path: str) -> torch.Tensor:
        stack = getattr(self.module, path.rpartition(".")[2])
        assert isinstance(stack, torch.Tensor) and self.expert is not None
        return stack.data[self.expert]

    def _linear_weight(self, path: str) -> torch.Tensor:
        linear = self.layer.get_submodule(path)
        assert isinstance(linear.weight, torch.Tensor)
        return self._oriented(linear.weight.data, is_conv1d(linear))

    @staticmethod
    def _oriented(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
        return weight.t() if transposed else weight


def find_ffns(sites: tuple[FfnSite, ...], layer: nn.Module) -> list[Ffn]:
    """The FFNs of a decoder layer among `sites`; each routed expert is an FFN."""
    present = [site for site in sites if _has(layer, site)]
    found: list[Ffn] = []
    counts: dict[str, int] = {}
    for site in present:
        number = counts.get(site.kind, 0)
        counts[site.kind] = number + 1
        if site.kind == "experts":
            experts = len(layer.get_parameter(site.down))
            found += [Ffn(site, layer, f"{EXPERT}{expert}", "experts", expert) for expert in range(experts)]
            continue
        single = len(present) == 1  # a shared FFN without routed experts counts as dense
        name = DENSE if single else f"{site.kind}_{number}" if number else site.kind
        found.append(Ffn(site, layer, name, name))
    return found


def ffn_named(ffns: list[Ffn], name: str) -> Ffn:
    """The FFN named `name`. Raises KeyError where there is none."""
    for ffn in ffns:
        if ffn.name == name:
            return ffn
    raise KeyError(name)


def _has(layer: nn.Module, site: FfnSite) -> bool:
    names = (*site.in_projections, site.down)
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
    """Whether a linear stores its weight transposed, [in, out], as GPT-2's Conv1D does."""
    return type(linear).__name__ == "Conv1D"
