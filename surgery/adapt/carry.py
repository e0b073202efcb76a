"""Which indices of an adapter's tensors a cut keeps.

A LoRA adds s B A to a linear's weight W [O, I]; A [r, I], B [O, r]. A cut takes rows of gate and up, so rows
of their B, and columns of down, so columns of its A. All other adapters stay as they are: no cut changes what
goes into or out of their linears.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.checkpoint.manifest import MANIFEST
from surgery.cut.groups import GroupKey
from surgery.cut.tensors import Take, TensorEdit
from surgery.engine.open_model import Model
from surgery.errors import CheckpointError, UnsupportedModelError, UsageError
from surgery.model.ffn import Ffn, is_conv1d
from surgery.model.meta_model import MetaModel
from surgery.model.slices import Slice

PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB])")
EXPERTS = re.compile(r"\.experts(\.|$)")


@dataclass(frozen=True)
class KeptChannels:
    """The channels of one FFN that stay: `indices` [K] of `before`; -1 where a padded folder has zeros."""

    indices: torch.Tensor
    before: int


def kept_channels(model: Model) -> dict[GroupKey, KeptChannels]:
    """(Layer, FFN) -> the channels that a folder kept of its dense model, from its surgeon.json.

    Raises UsageError for a folder that was not cut or lost more than channels, CheckpointError when
    surgeon.json tells another cut.
    """
    plan = _plan(model)
    meta_model = model.meta_model
    found: dict[GroupKey, KeptChannels] = {}
    for number, (ffns, layer) in enumerate(zip(meta_model.ffns, plan["layers"], strict=True)):
        entries = layer.get("ffns", {ffns[0].name: layer} if ffns else {})
        for ffn in ffns:
            kept = torch.tensor(entries[ffn.name]["kept"], dtype=torch.long)
            if len(kept) > ffn.width:
                raise CheckpointError(
                    "surgeon.json tells of more channels than the folder has",
                    where=f"layer {number}, {ffn.name}",
                    expected=str(ffn.width),
                    found=str(len(kept)),
                )
            padded = torch.cat([kept, kept.new_full((ffn.width - len(kept),), -1)])
            before = plan["widths"][ffn.site.width_key]["before"] * meta_model.width_multiplier(ffn)
            found[number, ffn.name] = KeptChannels(padded, before)
    return found


def _plan(model: Model) -> dict[str, Any]:
    plan: dict[str, Any] | None = None
    if MANIFEST in model.checkpoint.file_names:
        plan = model.checkpoint.read_json(MANIFEST).get("plan")
    if plan is None:
        raise UsageError(
            "surgeon did not cut this folder",
            where=model.name,
            expected=f"a {MANIFEST} with a plan",
            next_step="name a folder that `surgeon prune` wrote; an adapter fits any other as it is",
        )
    if plan.get("cuts"):
        raise UsageError(
            "only FFN channels may be cut, for an adapter to be carried",
            where=model.name,
            found=", ".join(plan["cuts"]),
            next_step="name a folder that was cut with --sparsity alone",
        )
    if len(plan["layers"]) != len(model.meta_model.layers):
        raise CheckpointError(
            "surgeon.json tells of another number of layers than the folder has",
            where=model.name,
            expected=str(len(model.meta_model.layers)),
            found=str(len(plan["layers"])),
        )
    return plan


@dataclass(frozen=True)
class Target:
    """One linear that an adapter adapts: its `module` path, its cut, and its shape (O, I) before that.

    `rows` are the indices of its outputs that stay, `columns` those of its inputs, None where all do. `ffn`
    names the FFN whose down projection it is, by (layer, name); None for other linears.
    """

    module: str
    shape: tuple[int, int]
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    ffn: GroupKey | None = None

    def edit(self, name: str, part: str) -> TensorEdit:
        """The edit of one of the adapter's tensors."""
        if part == "lora_A.weight" and self.columns is not None:
            return TensorEdit(name, (Take(1, self.columns),))
        if part.startswith("lora_B") and self.rows is not None:
            return TensorEdit(name, (Take(0, self.rows),))
        return TensorEdit(name)


def targets(meta_model: MetaModel, kept: dict[GroupKey, KeptChannels], names: list[str]) -> dict[str, Target]:
    """Module -> Target of every linear that tensors of an adapter belong to, of the model that was cut.

    Raises CheckpointError for a module that the model lacks, UnsupportedModelError for one that can't be
    carried.
    """
    cut = _cut_linears(meta_model, kept)
    found = {}
    for module in dict.fromkeys(match["module"] for name in names if (match := PART.fullmatch(name))):
        found[module] = cut.get(module) or _whole(meta_model, module)
    return found


def _whole(meta_model: MetaModel, module: str) -> Target:
    """The Target of a linear or an embedding that no cut touches."""
    if EXPERTS.search(module):
        raise UnsupportedModelError(
            "adapters of routed experts can't be carried",
            where=meta_model.checkpoint.name,
            found=module,
            next_step="merge the adapter into the dense model, and cut that",
        )
    layer = _module(meta_model, module)
    if not isinstance(layer, nn.Linear | nn.Embedding) and not is_conv1d(layer):
        raise UnsupportedModelError(
            "an adapter of something that is no linear can't be carried",
            where=module,
            found=type(layer).__name__,
        )
    return Target(module, _shape(layer))


def _module(meta_model: MetaModel, module: str) -> nn.Module:
    try:
        found: nn.Module = meta_model.model.get_submodule(module)
    except AttributeError:
        raise CheckpointError(
            "the adapter is for another model: it adapts a module that this one lacks",
            where=meta_model.checkpoint.name,
            found=module,
        ) from None
    return found


def _shape(module: nn.Module) -> tuple[int, int]:
    """(Outputs, inputs) of a linear; of an embedding as peft sees it, (hidden size, vocabulary)."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if is_conv1d(module) or isinstance(module, nn.Embedding) else (rows, columns)


def _cut_linears(meta_model: MetaModel, kept: dict[GroupKey, KeptChannels]) -> dict[str, Target]:
    """Module -> Target of every linear of an FFN."""
    found: dict[str, Target] = {}
    for number, ffns in enumerate(meta_model.ffns):
        prefix = f"{meta_model.layers_path}.{number}."
        for ffn in ffns:
            if not ffn.stacked:
                channels = kept[number, ffn.name]
                found |= {one.module: one for one in _of_ffn(prefix, number, ffn, channels)}
    return found


def _of_ffn(prefix: str, number: int, ffn: Ffn, channels: KeptChannels) -> list[Target]:
    def taken(part: Slice) -> torch.Tensor:
        return part.indices(channels.indices, channels.before)

    result = []
    for part in ffn.in_slices():
        path, _, leaf = part.parameter.rpartition(".")
        if leaf == "weight":
            inputs = _shape(ffn.layer.get_submodule(path))[1]
            result.append(Target(prefix + path, (part.length(channels.before), inputs), rows=taken(part)))
    down = ffn.down_slice()
    path = down.parameter.rpartition(".")[0]
    outputs = _shape(ffn.layer.get_submodule(path))[0]
    shape, key = (outputs, down.length(channels.before)), (number, ffn.name)
    return [*result, Target(prefix + path, shape, columns=taken(down), ffn=key)]
