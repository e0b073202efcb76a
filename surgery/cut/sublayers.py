"""The whole attention or the whole FFN of a layer: its tensors are not written, and the layer goes without.

transformers' config can say so (`skip` in `per_layer_config`), its model classes do not act on it yet. Such
a checkpoint is loaded as one with widths per layer is: by `import surgery.loading`, or by its own modeling
file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint.transformers_model import text_config
from surgery.cut.ffn_channels import MODELING
from surgery.cut.groups import Cut, Group, Kept, add_kind
from surgery.cut.tensors import TensorEdit
from surgery.errors import PlanError, UnsupportedModelError
from surgery.model.meta_model import MetaModel
from surgery.model.sublayers import SublayerSite, attention_site, ffn_site
from surgery.plan.kind_plan import SUBLAYER_GROUPS, KindPlan, without

MODELING_TEMPLATE = '''"""{name} whose decoder layers differ in width, or have no attention or no FFN.

`per_layer_config` in config.json says how. Written by surgeon; loaded with `trust_remote_code=True`. With
surgeon installed, `import surgery.loading` does the same and no code of this repo is run.
"""

from torch import nn
from transformers import {name}


class NoAttention(nn.Module):
    """Adds nothing. Tokens are counted in the cache, by keys and values of width 1."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, *args, **kwargs):
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = kwargs.get("layer_past")
        if cache is not None:
            none = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(none, none, self.layer)
        return hidden_states * 0, None


class NoFfn(nn.Module):
    """Adds nothing."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states * 0


class PerLayerForCausalLM({name}):
    def __init__(self, config):
        super().__init__(config)
        layers = self.{layers}
        for index, layer in enumerate(layers):
            own = config.per_layer_config[index]
            layers[index] = type(layer)(own, index)
            if "attention" in own.skip:
                layers[index].{attention} = NoAttention(index)
            if "mlp" in own.skip:
                layers[index].{ffn} = NoFfn()
        self.post_init()
'''


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of a kind in every layer that has it, each a group of one member: a kind of cut.

    kind: its name, as in `--cuts`. skip: its name in transformers' `skip`. noun:
    what it is called in messages. option: what names layers to go without it. site: where it is in a layer of
    a model; None where it can't go.
    """

    kind: str
    skip: str
    noun: str
    option: str
    site: Callable[[MetaModel, int], SublayerSite | None]

    @property
    def group(self) -> str:
        """Name of its groups."""
        return SUBLAYER_GROUPS[self.kind]

    def groups(self, meta_model: MetaModel) -> list[Group]:
        """One group for each layer that has it."""
        found = []
        for number, layer in enumerate(meta_model.layers):
            site = self.site(meta_model, number)
            if site is not None:
                found.append(Group(number, self.group, 1, (), site.output_slices(layer)))
        return found

    def edits(self, meta_model: MetaModel, kept: Kept) -> dict[str, TensorEdit]:
        """No tensor of what is removed is written."""
        edits: dict[str, TensorEdit] = {}
        for number in self.removed(kept):
            site = self.site(meta_model, number)
            assert site is not None
            inside = f"{meta_model.layers_path}.{number}.{site.module}."
            for one in meta_model.layer_parameters[number]:
                if all(target.startswith(inside) for target in one.targets):
                    edits |= {name: TensorEdit(None) for name in one.stored}
        return edits

    def config(self, config: dict[str, Any], kept: Kept) -> dict[str, Any]:
        """config.json that says which layers go without."""
        config = copy.deepcopy(config)
        text = text_config(config)
        own = text.setdefault("per_layer_config", {})
        for number in self.removed(kept):
            entry = own.setdefault(str(number), {})
            entry["skip"] = sorted({*entry.get("skip", ()), self.skip})
        text["allow_global_per_layer_attribute_access"] = True
        config["auto_map"] = {"AutoModelForCausalLM": f"{MODELING}.PerLayerForCausalLM"}
        return config

    def onto(self, meta_model: MetaModel, cut: Cut, part: KindPlan) -> Cut:
        """`cut` without what `part` removes of this kind."""
        if not self.removed(part.kept):
            return cut
        names = {one.skip: one.first_module(meta_model) for one in SUBLAYERS.values()}
        code = MODELING_TEMPLATE.format(
            name=type(meta_model.model).__name__,
            layers=meta_model.layers_path,
            attention=names["attention"],
            ffn=names["mlp"],
        )
        return add_kind(cut, self, meta_model, part.kept, files={f"{MODELING}.py": code})

    def first_module(self, meta_model: MetaModel) -> str:
        """Name of the module in the first layer that has it; transformers' usual one where none has."""
        sites = (self.site(meta_model, number) for number in range(len(meta_model.layers)))
        return next((site.module for site in sites if site is not None), self.skip)

    def removed(self, kept: Kept) -> list[int]:
        """Numbers of the layers that go without it."""
        return sorted(without(kept, self.group))

    def layers(self, meta_model: MetaModel) -> list[int]:
        """Numbers of the layers that have one that can go."""
        numbers = range(len(meta_model.layers))
        return [number for number in numbers if self.site(meta_model, number) is not None]

    def check_removed(self, meta_model: MetaModel, removed: Collection[int]) -> None:
        """Raise PlanError for layers that have none that could go."""
        there = self.layers(meta_model)
        missing = [number for number in removed if number not in there]
        if missing:
            raise PlanError(
                f"these layers have no {self.noun} that could go",
                where=self.option,
                expected=", ".join(map(str, there)) or "none: this model's can't go",
                found=", ".join(map(str, missing)),
            )

    def check_model(self, meta_model: MetaModel) -> None:
        """Raise UnsupportedModelError for a model without one that can be removed."""
        if not self.layers(meta_model):
            raise UnsupportedModelError(
                f"no {self.noun} was found that could go",
                where=meta_model.checkpoint.name,
                expected=f"a layer with a module of {self.noun} and its output projection",
                next_step=f"leave {self.kind} out of --cuts",
            )


ATTENTIONS = Sublayer(
    "attention",
    "attention",
    "attention",
    "--drop-attention",
    lambda meta_model, number: attention_site(meta_model.layers[number]),
)
WHOLE_FFNS = Sublayer(
    "whole-ffn",
    "mlp",
    "dense FFN",
    "--drop-ffn",
    lambda meta_model, number: ffn_site(meta_model.layers[number], meta_model.ffns[number]),
)
SUBLAYERS = {one.kind: one for one in (ATTENTIONS, WHOLE_FFNS)}
