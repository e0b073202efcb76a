"""Whole decoder layers: their tensors are not written, later layers are renumbered, the config is shortened.

Hidden states pass a removed layer by: without it the residual stream goes on as it came.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from surgery.checkpoint.transformers_model import build_config, build_model
from surgery.cut.config_depth import shortened_config
from surgery.cut.groups import Cut, Group, Kept, add_kind
from surgery.cut.tensors import TensorEdit
from surgery.errors import PlanError, UnsupportedModelError
from surgery.model.experts import show_experts
from surgery.model.leftovers import CARRY, layer_number
from surgery.model.meta_model import MetaModel
from surgery.plan.kind_plan import LAYER, KindPlan, layers_plan

PASSED: WeakKeyDictionary[MetaModel, set[tuple[int, ...]]] = WeakKeyDictionary()  # by `check_depth`
OWN_NUMBER = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx")


@dataclass(frozen=True)
class WholeLayers:
    """The decoder layers of a model, each a group of one member.

    `where` names the model in errors.
    """

    where: str

    def groups(self, meta_model: MetaModel) -> list[Group]:
        """One group for each layer."""
        return [Group(number, LAYER, 1, (), ()) for number in range(len(meta_model.layers))]

    def edits(self, meta_model: MetaModel, kept: Kept) -> dict[str, TensorEdit]:
        """Tensors of removed layers are dropped, those of later layers get a new number in their name.

        Layers beside the model are stored under the numbers after its own, which change too.
        """
        stays = kept_layers(kept)
        edits = {}
        for number, stored_parameters in enumerate(meta_model.layer_parameters):
            for name in (stored for one in stored_parameters for stored in one.stored):
                edits[name] = _renumbered(name, number, stays, len(meta_model.layers))
        for one in meta_model.leftovers:
            own = layer_number(one.name, meta_model.layers_path)
            if one.fate == CARRY and own is not None:
                edits[one.name] = _renumbered(one.name, own, stays, len(meta_model.layers))
        return edits

    def config(self, config: dict[str, Any], kept: Kept) -> dict[str, Any]:
        """config.json for the layers that stay."""
        return shortened_config(config, kept_layers(kept), self.where)


def onto(meta_model: MetaModel, cut: Cut, part: KindPlan) -> Cut:
    """`cut` without the layers that `part` removes. Raises UnsupportedModelError as `check_depth`."""
    check_depth(meta_model, kept_layers(part.kept))
    gone = frozenset(range(len(meta_model.layers))) - set(kept_layers(part.kept))
    kind = WholeLayers(meta_model.checkpoint.name)
    return add_kind(cut, kind, meta_model, part.kept, skipped=gone)


def kept_layers(kept: Kept) -> list[int]:
    """Numbers of the layers that stay."""
    return sorted(number for (number, name), members in kept.items() if name == LAYER and len(members))


def check_layers(meta_model: MetaModel) -> None:
    """Raise UnsupportedModelError for a model from which no layer alone can go."""
    count = len(meta_model.layers)
    part = layers_plan(count, [count // 2] if count > 1 else [])
    check_depth(meta_model, kept_layers(part.kept))


def check_removed(meta_model: MetaModel, removed: Collection[int]) -> None:
    """Raise PlanError for layers that are not there and for all of them, and what `check_depth` raises."""
    count = len(meta_model.layers)
    stays = [number for number in range(count) if number not in removed]
    if not stays or any(not 0 <= number < count for number in removed):
        raise PlanError(
            "these layers can't go",
            where="--drop-layers",
            expected=f"some of 0 to {count - 1}, not all",
            found=", ".join(str(number) for number in sorted(removed)),
        )
    check_depth(meta_model, stays)


def check_depth(meta_model: MetaModel, stays: list[int]) -> None:
    """Raise UnsupportedModelError unless the shortened config builds each layer as it was.

    Compares modules, the shapes of parameters and buffers, and every plain attribute (windows, rotary
    embeddings on or off, scales) of the layers that stay, built from the config before and after.
    """
    where = meta_model.checkpoint.name
    passed = PASSED.setdefault(meta_model, set())
    if tuple(stays) in passed or len(stays) == len(meta_model.layers):
        return
    config = shortened_config(meta_model.checkpoint.config, stays, where)
    model = build_model(build_config(config, where), meta_model.dtype, where)
    show_experts(model)
    layers = model.get_submodule(meta_model.layers_path)
    for place, number in enumerate(stays):
        before, after = _described(meta_model.layers[number]), _described(layers[place])
        differing = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        if differing:
            key = differing[0]
            raise UnsupportedModelError(
                "whole layers can't go: the config can't say what the layers after them are",
                where=f"{where}, layer {number}, {key}",
                expected=str(before.get(key, "nothing")),
                found=str(after.get(key, "nothing")),
                next_step="leave layers out of --cuts",
            )
    passed.add(tuple(stays))


def _described(layer: nn.Module) -> dict[str, Any]:
    """What a layer is, without its number and its weights: types, shapes and plain attributes by path."""
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        found[path] = type(module).__name__
        for name, value in vars(module).items():
            plain = value is None or isinstance(value, bool | int | float | str)
            if plain and not name.startswith("_") and name not in OWN_NUMBER:
                found[f"{path}.{name}"] = value
    tensors: dict[str, torch.Tensor] = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    found |= {f"{name} shape": tuple(tensor.shape) for name, tensor in tensors.items()}
    return found


def _renumbered(name: str, number: int, stays: list[int], count: int) -> TensorEdit:
    """The edit of a tensor stored under layer `number`; numbers from `count` on are beside the model."""
    if number < count and number not in stays:
        return TensorEdit(None)
    place = stays.index(number) if number < count else number - count + len(stays)
    return TensorEdit(re.sub(rf"(^|\.){number}\.", rf"\g<1>{place}.", name, count=1))
