"""The whole attention of a layer: its tensors are not written, and its layer computes an FFN alone.

transformers' config can say so (`skip` in `per_layer_config`), its model classes do not act on it yet. Such
a checkpoint is loaded as one with widths per layer is: by `import surgery.loading`, or by its own modeling
file.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from surgery.checkpoint.transformers_model import text_config
from surgery.cut.ffn_channels import MODELING
from surgery.cut.groups import Cut, Group, Kept, add_kind
from surgery.cut.tensors import TensorEdit
from surgery.errors import PlanError, UnsupportedModelError
from surgery.model.attention import attention_site
from surgery.model.meta_model import MetaModel
from surgery.plan.kind_plan import ATTENTION, KindPlan

MODELING_TEMPLATE = '''"""{name} whose decoder layers differ: in feed-forward width, or without attention.

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


class PerLayerForCausalLM({name}):
    def __init__(self, config):
        super().__init__(config)
        layers = self.{layers}
        for index, layer in enumerate(layers):
            own = config.per_layer_config[index]
            layers[index] = type(layer)(own, index)
            if "attention" in own.skip:
                layers[index].{attention} = NoAttention(index)
        self.post_init()
'''


class WholeAttention:
    """The attention of every layer that has one, each a group of one member."""

    def groups(self, meta_model: MetaModel) -> list[Group]:
        """One group for each attention."""
        sites = {number: attention_site(layer) for number, layer in enumerate(meta_model.layers)}
        return [
            Group(number, ATTENTION, 1, (), site.output_slices(meta_model.layers[number]))
            for number, site in sites.items()
            if site is not None
        ]

    def edits(self, meta_model: MetaModel, kept: Kept) -> dict[str, TensorEdit]:
        """No tensor of a removed attention is written."""
        edits: dict[str, TensorEdit] = {}
        for number in without_attention(kept):
            site = attention_site(meta_model.layers[number])
            assert site is not None
            inside = f"{meta_model.layers_path}.{number}.{site.module}."
            for one in meta_model.layer_parameters[number]:
                if all(target.startswith(inside) for target in one.targets):
                    edits |= {name: TensorEdit(None) for name in one.stored}
        return edits

    def config(self, config: dict[str, Any], kept: Kept) -> dict[str, Any]:
        """config.json that says which layers skip attention."""
        config = copy.deepcopy(config)
        text = text_config(config)
        own = text.setdefault("per_layer_config", {})
        for number in without_attention(kept):
            own.setdefault(str(number), {})["skip"] = ["attention"]
        text["allow_global_per_layer_attribute_access"] = True
        config["auto_map"] = {"AutoModelForCausalLM": f"{MODELING}.PerLayerForCausalLM"}
        return config


def onto(meta_model: MetaModel, cut: Cut, part: KindPlan) -> Cut:
    """`cut` without the attentions that `part` removes."""
    gone = without_attention(part.kept)
    if not gone:
        return cut
    site = attention_site(meta_model.layers[gone[0]])
    assert site is not None
    name = type(meta_model.model).__name__
    code = MODELING_TEMPLATE.format(name=name, layers=meta_model.layers_path, attention=site.module)
    return add_kind(cut, WholeAttention(), meta_model, part.kept, files={f"{MODELING}.py": code})


def without_attention(kept: Kept) -> list[int]:
    """Numbers of the layers whose attention goes."""
    return sorted(layer for (layer, name), members in kept.items() if name == ATTENTION and not len(members))


def attentions(meta_model: MetaModel) -> list[int]:
    """Numbers of the layers that have an attention surgeon can remove."""
    return [number for number, layer in enumerate(meta_model.layers) if attention_site(layer) is not None]


def check_attention_removed(meta_model: MetaModel, removed: Collection[int]) -> None:
    """Raise PlanError for layers that have no attention that could go."""
    there = attentions(meta_model)
    missing = [number for number in removed if number not in there]
    if missing:
        raise PlanError(
            "these layers have no attention that could go",
            where="--drop-attention",
            expected=", ".join(map(str, there)),
            found=", ".join(map(str, missing)),
        )


def check_attention(meta_model: MetaModel) -> None:
    """Raise UnsupportedModelError for a model without an attention that can be removed."""
    if not attentions(meta_model):
        raise UnsupportedModelError(
            "no attention was found that could go",
            where=meta_model.checkpoint.name,
            expected="a layer with a module of attention and its output projection",
            next_step="leave attention out of --cuts",
        )
