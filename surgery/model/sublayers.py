"""Where attention and FFN of a decoder layer are: the module, and the linear that writes to the stream."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from surgery.model.families import DENSE
from surgery.model.ffn import Ffn, is_conv1d
from surgery.model.slices import Slice

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo")


@dataclass(frozen=True)
class SublayerSite:
    """The attention or the FFN of a decoder layer: paths of its module and its output linear in the layer."""

    module: str
    output: str

    def output_slices(self, layer: nn.Module) -> tuple[Slice, ...]:
        """All input columns of the output linear, and its bias: without them the sublayer adds nothing."""
        linear = layer.get_submodule(self.output)
        axis = 0 if is_conv1d(linear) else 1
        weight = linear.get_parameter("weight")
        found = [Slice(f"{self.output}.weight", axis, weight.shape[axis])]
        if getattr(linear, "bias", None) is not None:
            found.append(Slice(f"{self.output}.bias", 0, weight.shape[1 - axis]))
        return tuple(found)


def attention_site(layer: nn.Module) -> SublayerSite | None:
    """The attention of a layer; None for a layer without one, such as a recurrent one."""
    from surgery.loading import ATTENTION_MODULES

    children = dict(layer.named_children())
    for name in ATTENTION_MODULES:
        if name in children:
            inner = {path.rpartition(".")[2]: path for path, _ in children[name].named_modules() if path}
            output = next((inner[one] for one in OUTPUTS if one in inner), None)
            if output is not None:
                return SublayerSite(name, f"{name}.{output}")
    return None


def ffn_site(layer: nn.Module, ffns: list[Ffn]) -> SublayerSite | None:
    """The FFN of a layer whose FFNs are `ffns`.

    None for a layer that has another number of FFNs or routed experts, and for one whose FFN is not a module
    of its own with the hidden states for its only input.
    """
    from surgery.loading import FFN_MODULES

    if [ffn.name for ffn in ffns] != [DENSE]:
        return None
    site = ffns[0].site
    modules = {path.rpartition(".")[0] for path in (site.down, *site.in_projections)}
    name = modules.pop()
    if modules or name not in FFN_MODULES:
        return None
    parameters = inspect.signature(layer.get_submodule(name).forward).parameters.values()
    needed = [one for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return SublayerSite(name, site.down) if len(needed) == 1 else None
