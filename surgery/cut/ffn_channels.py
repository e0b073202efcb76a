"""FFN channels, the first kind of cut: gate and up rows and down columns go, and the width in the config
follows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint.transformers_model import text_config
from surgery.cut.groups import Cut, Group, Kept, make_cut
from surgery.cut.slice_edits import slice_edits
from surgery.cut.tensors import TensorEdit
from surgery.model.families import family_of
from surgery.model.meta_model import MetaModel
from surgery.plan.prune_plan import PrunePlan

MODELING = "modeling_per_layer"
MODELING_TEMPLATE = '''"""{name} whose decoder layers have feed-forward widths of their own.

`per_layer_config` in config.json holds them. Written by surgeon; loaded with `trust_remote_code=True`. With
surgeon installed, `import surgery.loading` does the same and no code of this repo is run.
"""

from transformers import {name}


class PerLayerForCausalLM({name}):
    def __init__(self, config):
        super().__init__(config)
        layers = self.{layers}
        for index, layer in enumerate(layers):
            layers[index] = type(layer)(config.per_layer_config[index], index)
        self.post_init()
'''


@dataclass(frozen=True)
class FfnChannels:
    """The channels of every FFN that `plan` prunes; the plan also holds the config keys of their widths."""

    plan: PrunePlan

    def groups(self, meta_model: MetaModel) -> list[Group]:
        """One group for each dense or shared FFN and each expert."""
        return [
            Group(number, ffn.name, ffn.width, (*ffn.in_slices(), ffn.down_slice()), (ffn.down_slice(),))
            for number, ffns in enumerate(meta_model.ffns)
            for ffn in ffns
        ]

    def edits(self, meta_model: MetaModel, kept: Kept) -> dict[str, TensorEdit]:
        """Rows of gate and up, columns of down; the down projection's bias stays as it is."""
        written = {(layer, name): self.plan.stored_width(layer, name) for layer, name in kept}
        return slice_edits(meta_model, self.groups(meta_model), kept, written)

    def config(self, config: dict[str, Any], kept: Kept) -> dict[str, Any]:  # noqa: ARG002 (the plan has the widths)
        """config.json with the new widths, each under the key its family uses; all else unchanged."""
        plan = self.plan
        if not plan.changes_config:
            return config
        config = copy.deepcopy(config)
        text = text_config(config)
        family = family_of(config, "config.json")
        changes = {change.key: change.after for change in plan.widths}
        for key, value in {**changes, **dict(family.config_changes if family else ())}.items():
            (config if key in config and key not in text else text)[key] = value
        if plan.per_layer_widths:
            own = {
                str(layer): {
                    c.key: c.per_layer[layer]
                    for c in plan.widths
                    if c.per_layer[layer] not in (None, c.after)
                }
                for layer in range(len(plan.layers))
            }
            text["per_layer_config"] = {layer: widths for layer, widths in own.items() if widths}
            text["allow_global_per_layer_attribute_access"] = True
            config["auto_map"] = {"AutoModelForCausalLM": f"{MODELING}.PerLayerForCausalLM"}
        return config


def ffn_cut(meta_model: MetaModel, plan: PrunePlan) -> Cut:
    """The cut that carries out a plan of FFN channels."""
    files = {}
    if plan.per_layer_widths:
        name = type(meta_model.model).__name__
        code = MODELING_TEMPLATE.format(name=name, layers=meta_model.layers_path)
        files[f"{MODELING}.py"] = code
    return make_cut(FfnChannels(plan), meta_model, plan.kept, files)
