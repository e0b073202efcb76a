"""FFN channels, the first kind of cut: gate and up rows and down columns go, and the width in the config
follows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from surgery.checkpoint.transformers_model import text_config
from surgery.cut.config_width import set_width
from surgery.cut.extra_layers import find_extra_layers
from surgery.cut.groups import Cut, Group, GroupKey, Kept, make_cut
from surgery.cut.slice_edits import slice_edits
from surgery.cut.tensors import TensorEdit
from surgery.model.families import family_of
from surgery.model.ffn import Ffn
from surgery.model.leftovers import leftovers_json
from surgery.model.meta_model import MetaModel
from surgery.plan.prune_plan import PrunePlan
from surgery.plan.widths import WidthChange

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
    """The channels of every FFN.

    `changes` are the config keys that hold their widths. `written` is the number of channels an FFN is
    written with where that is more than it keeps: the rest are zeros. `per_layer` says whether layers differ
    in width.
    """

    changes: tuple[WidthChange, ...]
    written: dict[GroupKey, int] = field(default_factory=dict)
    per_layer: bool = False

    @classmethod
    def of(cls, plan: PrunePlan) -> FfnChannels:
        """The channels that `plan` prunes."""
        written = {(layer, name): plan.stored_width(layer, name) for layer, name in plan.kept}
        return cls(plan.widths, written, plan.per_layer_widths)

    def groups(self, meta_model: MetaModel) -> list[Group]:
        """One group for each dense or shared FFN and each expert."""
        return [ffn_group(number, ffn) for number, ffns in enumerate(meta_model.ffns) for ffn in ffns]

    def edits(self, meta_model: MetaModel, kept: Kept) -> dict[str, TensorEdit]:
        """Rows of gate and up, columns of down; the down projection's bias stays as it is."""
        return slice_edits(meta_model, self.groups(meta_model), kept, self.written)

    def config(self, config: dict[str, Any], kept: Kept) -> dict[str, Any]:  # noqa: ARG002 (the widths say it)
        """config.json with the new widths, each under the key its family uses; all else unchanged.

        Raises UnsupportedModelError when the config has another key for the same width that can't be found.
        """
        if not self.per_layer and all(change.before == change.after for change in self.changes):
            return config
        config = copy.deepcopy(config)
        text = text_config(config)
        family = family_of(config, "config.json")
        for key, value in dict(family.config_changes if family else ()).items():
            text[key] = value
        for change in self.changes:
            set_width(config, change.key, change.before, change.after)
        if self.per_layer:
            layers = len(self.changes[0].per_layer)
            own = {
                str(layer): {
                    c.key: c.per_layer[layer]
                    for c in self.changes
                    if c.per_layer[layer] not in (None, c.after)
                }
                for layer in range(layers)
            }
            text["per_layer_config"] = {layer: widths for layer, widths in own.items() if widths}
            text["allow_global_per_layer_attribute_access"] = True
            config["auto_map"] = {"AutoModelForCausalLM": f"{MODELING}.PerLayerForCausalLM"}
        return config


def ffn_group(layer: int, ffn: Ffn) -> Group:
    """The channels of one FFN of a layer, or of one expert."""
    return Group(layer, ffn.name, ffn.width, (*ffn.in_slices(), ffn.down_slice()), (ffn.down_slice(),))


def ffn_cut(meta_model: MetaModel, plan: PrunePlan, *, widths_only: bool = False) -> Cut:
    """The cut that carries out a plan of FFN channels.

    With `widths_only` no weight is read: the channels that layers beside the model keep are then not chosen,
    only their number is right, which is enough for sizes.
    """
    files = {}
    if plan.per_layer_widths:
        name = type(meta_model.model).__name__
        code = MODELING_TEMPLATE.format(name=name, layers=meta_model.layers_path)
        files[f"{MODELING}.py"] = code
    cut = make_cut(FfnChannels.of(plan), meta_model, plan.kept, files)
    return replace(cut, edits=cut.edits | leftover_edits(meta_model, plan.widths, widths_only))


def planned_cut(meta_model: MetaModel, changes: tuple[WidthChange, ...]) -> Cut:
    """A cut to new widths whose channels are not chosen yet: the first ones stand for them.

    It has the shapes and the config of the later cut, so that these can be judged before any work.
    """
    after = {change.key: change.after / change.before for change in changes}
    kept = {
        (number, ffn.name): torch.arange(round(ffn.width * after[ffn.site.width_key]))
        for number, ffns in enumerate(meta_model.ffns)
        for ffn in ffns
    }
    cut = make_cut(FfnChannels(changes), meta_model, kept)
    return replace(cut, edits=cut.edits | leftover_edits(meta_model, changes, widths_only=True))


def fates_json(meta_model: MetaModel, edits: dict[str, TensorEdit] | None = None) -> list[dict[str, Any]]:
    """What becomes of the stored tensors outside the model: the entry `outside_model` of surgeon.json.

    `edits` are those of the cut, where there is one.
    """
    cut = {name for name, edit in (edits or {}).items() if edit.name is not None}
    return leftovers_json(meta_model.leftovers, cut)


def leftover_edits(
    meta_model: MetaModel, changes: tuple[WidthChange, ...], widths_only: bool
) -> dict[str, TensorEdit]:
    """Edits of stored tensors outside the model: dropped, or their FFN channels cut as the config says."""
    dropped = {name: TensorEdit(None) for name in meta_model.dropped}
    edits: dict[str, TensorEdit] = {}
    widths = {change.key: change for change in changes}
    for extra in find_extra_layers(meta_model):
        after = {}
        for ffn in extra.ffns:
            change = widths[ffn.site.width_key]
            after[ffn.name] = ffn.width * change.after // change.before
        chosen = {name: torch.arange(width) for name, width in after.items()}
        if not widths_only:
            chosen = extra.largest(meta_model, after)
        groups = [ffn_group(extra.like, ffn) for ffn in extra.ffns]
        kept = {group.key: chosen[group.name] for group in groups}
        edits |= slice_edits(meta_model, groups, kept, stored={extra.like: extra.stored})
    return dropped | edits
