"""Where the attention of a decoder layer is: its module, and the linear that writes to the stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from surgery.model.ffn import is_conv1d
from surgery.model.slices import Slice

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo")


@dataclass(frozen=True)
class AttentionSite:
    """The attention of a decoder layer: paths of its module and of its output linear inside the layer."""

    module: str
    output: str

    def output_slices(self, layer: nn.Module) -> tuple[Slice, ...]:
        """All input columns of the output linear, and its bias: without them attention adds nothing."""
        linear = layer.get_submodule(self.output)
        axis = 0 if is_conv1d(linear) else 1
        weight = linear.get_parameter("weight")
        found = [Slice(f"{self.output}.weight", axis, weight.shape[axis])]
        if getattr(linear, "bias", None) is not None:
            found.append(Slice(f"{self.output}.bias", 0, weight.shape[1 - axis]))
        return tuple(found)


def attention_site(layer: nn.Module) -> AttentionSite | None:
    """The attention of a layer; None for a layer without one, such as a recurrent one."""
    from surgery.loading import ATTENTION_MODULES

    children = dict(layer.named_children())
    for name in ATTENTION_MODULES:
        if name in children:
            inner = {path.rpartition(".")[2]: path for path, _ in children[name].named_modules() if path}
            output = next((inner[one] for one in OUTPUTS if one in inner), None)
            if output is not None:
                return AttentionSite(name, f"{name}.{output}")
    return None
